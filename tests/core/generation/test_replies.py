"""What models really write, and what is to be read out of it by a schema."""

import json
import time

import pytest
from pydantic import BaseModel

from trl_extensions.core.generation.replies import (
    Unreadable,
    answer_text,
    as_text,
    read_reply,
    schema_json,
    without_thoughts,
)


class Items(BaseModel):
    items: list[str]


class Text(BaseModel):
    new_text: str


class Rule(BaseModel):
    rule: str
    title: str = "none"


class Rules(BaseModel):
    """A docstring that no request depends on."""

    rules: list[Rule]


class Skills(BaseModel):
    task: str
    skills: list[str]


MARKS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),
]


class TestThoughts:
    @pytest.mark.parametrize(("start", "end"), MARKS)
    @pytest.mark.parametrize("said", ["9 2", "結論：九。"])
    def test_marks_of_many_models(self, start, end, said):
        thoughts = "So 3 for it.\n第一は九点。"
        assert without_thoughts(f"{start}{thoughts}{end}{said}") == said
        if start != "analysis":
            assert without_thoughts(f"{thoughts}{end}{said}") == said  # the chat template began them
            assert without_thoughts(f"{start}{thoughts}") == ""  # cut off

    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ("plain", "plain"),
            ("", ""),
            ("no <think>never closed", "no "),
            ("<think>a</think>x<think>b</think>y", "xy"),
            ("a</think>x<think>b</think>y", "xy"),
            ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "b"),
            ("<|channel|>final<|message|>b<|return|>", "b"),
            ("a<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>[]", "[]"),
        ],
    )  # fmt: skip
    def test_taken_off(self, text, left):
        assert without_thoughts(text) == left

    @pytest.mark.parametrize(
        "text",
        [
            "<think>a<think>b</think>c</think>d", "a</think>b</think>c", "9 2<|end|><|start|>assistant",
            "a [/THINK] b [/THINK] c", "", "<think>a", " \n"
        ],
    )  # fmt: skip
    def test_what_is_left_is_no_answer(self, text):
        with pytest.raises(Unreadable):
            answer_text(text)
        with pytest.raises(Unreadable):
            read_reply(text, Items)

    def test_long_replies_cost_no_time(self):
        begun = time.perf_counter()
        for text in ("<think>" * 20_000, "a" * 500_000 + "</think>b", "<|channel|>" * 20_000):
            without_thoughts(text)
        assert time.perf_counter() - begun < 5


GOOD = '"good morning"'


class TestRead:
    @pytest.mark.parametrize(
        ("text", "items"),
        [
            ('{"items": ["a", "b"]}', ["a", "b"]),
            ('["a", "b"]', ["a", "b"]),
            ('```json\n["a", "b"]\n```', ["a", "b"]),
            ('```\n{"items": ["a"]}\n```\n\nI hope this helps!', ["a"]),
            ('["a"]\n\nThese are all.', ["a"]),
            ("<think>[1, 2]</think>[]", []),
            ('["Run ```ls``` now.\\nThen stop.", "b"]', ["Run ```ls``` now.\nThen stop.", "b"]),
            # mistakes that leave no doubt
            (f'["Say {GOOD} in French.", "Sing."]', [f"Say {GOOD} in French.", "Sing."]),
            (f'["Sing.", "Why do we say {GOOD}?", "Dance."]', ["Sing.", f"Why do we say {GOOD}?", "Dance."]),
            (f'```json\n{{"items": ["Say {GOOD} twice.", "b"]}}\n```', [f"Say {GOOD} twice.", "b"]),
            ('["「"朝"」という語を説明して。", "詩を書いて。"]', ['「"朝"」という語を説明して。', "詩を書いて。"]),
            ('["one, "two", three", "four"]', ['one, "two", three', "four"]),
            ("['a', 'b']", ["a", "b"]),
            ("[“a”, “b”]", ["a", "b"]),
            ('["a", "b",]', ["a", "b"]),
            ('["first\nsecond", "b"]', ["first\nsecond", "b"]),
            ('{items: ["a \\u00e9 "b" c"]}', ['a é "b" c']),
            # a numbered list and nothing else
            ("1. Sing.\n2. Dance.\n", ["Sing.", "Dance."]),
            ("1) Sing.\n\n2) Dance in gear 3.", ["Sing.", "Dance in gear 3."]),
            ("１．歌って。\n２．踊って。", ["歌って。", "踊って。"]),
            ("1、雨の詩を書いて。\n2、鳥を三つ挙げて。", ["雨の詩を書いて。", "鳥を三つ挙げて。"]),
        ],
    )
    def test_lists(self, text, items):
        assert read_reply(text, Items).items == items

    @pytest.mark.parametrize(
        "text",
        [
            "I can't help with that.", "Here are [some] ideas.", 'Here you are:\n["a", "b"]', "Read this: [1, 2]",
            "[Your name], hi", '["a", "b"] and more', '["a", "b"]\n["c"]', '["a", 3]', '["a" "b"]', '["a", NaN]',
            '{"items": ["a"], "items": ["b"]}', '{"things": ["a"]}', '["a", "b"', '["one", "two", "thr',
            '["a" is good, "b"]', "[It's good, b]",
            # where does a string end?
            '["He said "yes", "no" and "so"."]', '["Write about "A", "B", "C"."]', '["a "b", "c"]',
            "1. a 2. b", "1. a\n3. b", "2. a\n3. b", "Ideas:\n1. a\n2. b", "1. a\n2. b\nThat is all.",
            "- a\n- b", "a\nb", "以下の通りです。\n1. 歌って。", "申し訳ありませんが、できません。",
        ],
    )  # fmt: skip
    def test_not_read(self, text):
        with pytest.raises(Unreadable) as caught:
            read_reply(text, Items)
        assert "\n" not in str(caught.value)

    def test_objects(self):
        assert read_reply(f'{{"new_text": "Say {GOOD} and why."}}', Text).new_text == f"Say {GOOD} and why."
        assert read_reply('{"new_text": "「"朝"」を訳して。"}', Text).new_text == '「"朝"」を訳して。'
        [one, two] = read_reply('[{rule: "Be "kind" now", title: "K"}, {"rule": "b"}]', Rules).rules
        assert (one.rule, one.title, two.rule) == ('Be "kind" now', "K", "b")
        for text in ('["a"]', "1. a", '{"new_text": 3}', '{"new_text": "a", "b": "c" d "}', '{"new_text": "a": "b"}'):
            with pytest.raises(Unreadable):
                read_reply(text, Text)

    def test_says_what_is_wrong(self):
        with pytest.raises(Unreadable, match=r"rules\.1\.rule"):
            read_reply('{"rules": [{"rule": "a"}, {"title": "b"}]}', Rules)

    @pytest.mark.parametrize("piece", ["{", "[", '{"a":', '"あ", ', "1. a\n", "```", "\\", "「あ」、", "{'a': ["])
    def test_what_never_ends_costs_no_time(self, piece):
        for text in (piece * 20_000, '{"items": ["' + piece * 3_000):
            for truncated in (False, True):
                start = time.process_time()
                with pytest.raises(Unreadable):
                    read_reply(text, Skills, truncated=truncated)
                assert time.process_time() - start < 5


class TestCut:
    @pytest.mark.parametrize(
        ("text", "items"),
        [
            ('["one", "two", "thr', ["one", "two"]),
            ('["one", "two", "three"', ["one", "two"]),
            ('["one", "two",', ["one", "two"]),
            ('{"items": ["one", "two", "thr', ["one", "two"]),
            ('["one", "two"]', ["one", "two"]),
            ('{"items": ["one", "two" an', ["one"]),
            ('["Sing.", "Explain how, when and wh', ["Sing."]),
            (f'["Sing.", "Say {GOOD}, then wh', ["Sing."]),
            (f'["Say {GOOD} twice.", "b", "c', [f"Say {GOOD} twice.", "b"]),
            ('```json\n["歌って。", "踊って。", "走', ["歌って。", "踊って。"]),
            ("1. Sing.\n2. Dance.\n3. Ru", ["Sing.", "Dance."]),
        ],
    )
    def test_the_last_one_is_dropped(self, text, items):
        assert read_reply(text, Items, truncated=True).items == items

    @pytest.mark.parametrize("text", ['["on', '["one"', '{"items": [', "1. Si"])
    def test_nothing_is_complete(self, text):
        with pytest.raises(Unreadable):
            read_reply(text, Items, truncated=True)

    def test_objects(self):
        # one that is cut inside does not count, though what is missing could be left out
        text = '{"rules": [{"rule": "a", "title": "A"}, {"rule": "b", "tit'
        assert [rule.rule for rule in read_reply(text, Rules, truncated=True).rules] == ["a"]
        assert read_reply('{"task": "x", "skills": ["a", "b', Skills, truncated=True).skills == ["a"]
        for schema, text in (
            (Text, '{"new_text": "Say it, tw'),
            (Skills, '{"task": "x", "skills'),
            (Skills, '{"task": "x",'),
        ):
            with pytest.raises(Unreadable):
                read_reply(text, schema, truncated=True)


def test_schema_in_the_strict_form():
    schema = json.loads(schema_json(Rules))
    rule = schema["$defs"]["Rule"]
    assert list(rule["properties"]) == rule["required"] == ["rule", "title"]  # a field may be called title
    assert rule["additionalProperties"] is schema["additionalProperties"] is False
    assert schema["required"] == ["rules"] and "docstring" not in schema_json(Rules)


def test_prompts_as_text():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nyou"}]
    assert as_text(chat) == "system: Be kind.\nuser: Hi\nyou"
    assert (as_text("Hi"), as_text(""), as_text([])) == ("Hi", "(none)", "(none)")
