import contextlib
import json
import math

import pytest

from trl_extensions.codeclm.pipeline.metadata import Metadata
from trl_extensions.codeclm.pipeline.steps import (
    ACTIONS,
    PROMPTS,
    Answer,
    Decode,
    Encode,
    Evol,
    InstructionsReply,
    MetadataReply,
    PromptTemplate,
    Propose,
    Rewrite,
    Rubric,
    Rubrics,
    Score,
    ScoreOne,
    again,
)
from trl_extensions.core.generation.replies import Unreadable, schema_json


TRIP = {"use_case": "planning a trip", "skills": ["geography", "budgeting"]}
STEPS = [Encode(), Propose(), Decode(), Rubrics(), Rewrite(), Evol(), Score()]


def only_turn(step, **values):
    [message] = step.messages(**values)
    assert message["role"] == "user" and message["content"] == message["content"].strip()
    return message["content"]


# What is asked


def test_what_is_asked_holds_what_it_is_about():
    braces = "Fill in {{ name }} and {% this %} & <b>that</b>"
    assert braces in only_turn(Encode(), instruction=braces, max_skills=2)
    assert "one to 2" in only_turn(Encode(), instruction="Hi", max_skills=2)
    for step in (Decode(), Rubrics()):
        text = only_turn(step, number=7, **TRIP)
        assert "planning a trip" in text and "geography, budgeting" in text and "7" in text
    text = only_turn(Rewrite(), instruction=braces, action="Make it rhyme.", **TRIP)
    assert all(part in text for part in (braces, "Make it rhyme.", "planning a trip", "geography, budgeting"))
    text = only_turn(Evol(), instruction=braces, action="Make it rhyme.")
    assert braces in text and "Make it rhyme." in text
    assert only_turn(Answer(), instruction=braces) == braces
    text = only_turn(Score(), instruction="Q?", first="one one", second="two two")
    assert text.index("Q?") < text.index("one one") < text.index("two two")
    text = only_turn(Propose(), description="help in a kitchen", number=4, max_skills=2)
    assert "help in a kitchen" in text and "4 use cases" in text and "up to 2 skills" in text


def test_one_of_something_is_asked_for_in_the_singular():
    assert "write 1 instruction for" in only_turn(Decode(), number=1, **TRIP)
    assert "write 1 rubric with its action for" in only_turn(Rubrics(), number=1, **TRIP)
    assert "Write 1 use case," in only_turn(Propose(), description="help", number=1, max_skills=3)


def test_both_orders_of_answers_are_asked_alike():
    def swap(text):
        return text.replace("AAA", "CCC").replace("BBB", "AAA").replace("CCC", "BBB")

    pairs = ({"first": "AAA", "second": "BBB"}, {"first": "BBB", "second": "AAA"})
    one, two = (only_turn(Score(), instruction="Q?", **pair) for pair in pairs)
    assert one != two and swap(one) == two
    one, two = (only_turn(ScoreOne(), instruction="Q?", which=which, **pairs[0]) for which in ("first", "second"))
    assert one != two and one.replace("is the answer of assistant 1", "is the answer of assistant 2") == two


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_the_form_is_shown_and_is_the_schema(step):
    """What is asked for in words, and what an engine is held to, are one thing."""
    values = TRIP | {"number": 2, "max_skills": 2, "instruction": "Q", "action": "A", "description": "D"}
    text = only_turn(step, first="1", second="2", **values)
    shown = json.loads(step.form.replace(", ...", ""))
    assert all(f'"{name}"' in text for name in shown)
    assert set(step.schema.model_validate(shown).model_dump()) == set(shown)


# Replies


def metadata(use_case, *skills):
    return json.dumps({"use_case": use_case, "skills": skills}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (metadata("planning a trip", "geography", "budgeting"), ("planning a trip", "geography", "budgeting")),
        (metadata("旅行の計画。", "地理", "予算"), ("旅行の計画", "地理", "予算")),
        (f"<think>a task?</think>```json\n{metadata('planning', 'maps')}\n```", ("planning", "maps")),
        (metadata("planning", "maps", "...", "none", "time", "Maps", "so many words that it is no skill"),
         ("planning", "maps", "time")),
    ],
)  # fmt: skip
def test_metadata(text, expected):
    assert Encode().parse(text) == Metadata(expected[0], expected[1:])
    assert len(Encode().parse(text, max_skills=1).skills) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Use case: planning\nSkills: maps", "not JSON"),
        (metadata("...", "maps"), "no use case"),
        (metadata("planning"), "no skill"),
        (metadata("word " * 26, "maps"), "at most 25 words"),
        ('{"use_case": "planning"}', "skills"),
    ],
)
def test_metadata_that_are_none(text, reason):
    with pytest.raises(Unreadable, match=reason):
        Encode().parse(text)


def test_several_metadata():
    reply = f'{{"metadata": [{metadata("planning", "maps", "time")}, {metadata("...", "x")}, {metadata("a", "b")}'
    found = Propose().parse(reply + "]}", max_skills=1, number=5)
    assert found == [Metadata("planning", ("maps",)), Metadata("a", ("b",))]
    assert Propose().parse(reply + "]}", number=1) == [Metadata("planning", ("maps", "time"))]
    assert len(Propose().parse(reply + ', {"use_ca', truncated=True)) == 2, "what was cut off is left out"
    with pytest.raises(Unreadable, match="no use case"):
        Propose().parse(f'{{"metadata": [{metadata("-", "x")}]}}')


RAIN, BIRDS = "Write a poem about rain.", "List three birds."


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"instructions": [RAIN, BIRDS]}),
        json.dumps([RAIN, BIRDS]),
        f"1. {RAIN}\n2. {BIRDS}\n",
        f"<think>1. {RAIN}</think>\n```json\n{json.dumps([RAIN, BIRDS])}\n```",
    ],
)
def test_instructions(text):
    assert Decode().parse(text) == [RAIN, BIRDS]
    assert Decode().parse(text, number=1) == [RAIN]


def test_instructions_with_quotes_are_whole_or_unreadable():
    """A quotation mark without its backslash must not make a shorter instruction."""
    whole = 'Translate the English phrase "good morning" into French.'
    with contextlib.suppress(Unreadable):
        assert Decode().parse(f'["{whole}", "{RAIN}"]') == [whole, RAIN]
    with contextlib.suppress(Unreadable):
        assert Rewrite().parse(f'{{"new_instruction": "{whole}"}}', instruction="Translate.") == whole
    assert Decode().parse(json.dumps([whole, RAIN])) == [whole, RAIN]


def test_an_instruction_that_was_cut_off_is_left_out():
    assert Decode().parse(f'["{RAIN}", "List thr', truncated=True) == [RAIN]
    assert Decode().parse("1. 雨についての詩を書いてください。\n2. 鳥の名", truncated=True) == [
        "雨についての詩を書いてください。"
    ]


@pytest.mark.parametrize("text", ["", "<think>so", "Here are [some] ideas: I can't help with that.", "[]", '["..."]'])
def test_no_instructions(text):
    with pytest.raises(Unreadable):
        Decode().parse(text)


def test_rubrics():
    rows = [
        {"rubric": "Length", "action": "Ask for a hundred words."},
        {"rubric": "Size", "action": "Ask for a HUNDRED words!"},
        {"rubric": "Form", "action": "..."},
        {"rubric": "Form", "action": "Form"},
        {"rubric": "Form", "action": "Ask for a table."},
    ]
    expected = [Rubric(**rows[0]), Rubric(**rows[4])]
    assert Rubrics().parse(json.dumps({"rubrics": rows})) == expected
    assert Rubrics().parse(json.dumps(rows), number=1) == expected[:1]
    with pytest.raises(Unreadable, match="no rubric with an action"):
        Rubrics().parse(json.dumps(rows[2:4]))


def test_a_model_that_hands_in_the_prompt_is_found_out():
    def example_of(step):
        lines = only_turn(step, number=2, **TRIP).splitlines()
        return json.loads(next(line for line in lines if line.startswith("{")))

    shown = example_of(Decode())["instructions"]
    assert len(shown) == 2
    reply = {"instructions": [shown[0], "Where is Rome?", shown[1].upper()]}
    assert Decode().parse(json.dumps(reply)) == ["Where is Rome?"]
    with pytest.raises(Unreadable, match="repeats the question"):
        Decode().parse(json.dumps({"instructions": shown}))
    own = {"rubric": "How far it is", "action": "Make it further away."}
    [found] = Rubrics().parse(json.dumps([*example_of(Rubrics())["rubrics"], own]))
    assert found.action == "Make it further away."


OLD = "Write a packing list for a weekend in Rome."
NEW = "Write a packing list for a weekend in Rome in January, for two people who share one small bag."
ACTION = "Add a limit that the answer has to keep to."


def rewrite(text, step=None, **options):
    values = {"instruction": OLD, "action": ACTION} | options
    return (step or Rewrite()).parse(json.dumps({"new_instruction": text}), **values)


@pytest.mark.parametrize("step", [Rewrite(), Evol()], ids=["rewrite", "evol"])
@pytest.mark.parametrize(
    "text",
    [
        NEW,
        "Fix this function, and say what it costs:\n\n```python\ndef f(x):\n    return x\n```",
        "Sort these:\n1. pear\n2. apple\n\nGive a reason for each.",
        "写一首关于雨的诗，不超过二十个字。",
        'Explain what "to be or not to be" means to "you".',
    ],
)
def test_the_new_instruction_stays_as_it_is(step, text):
    assert rewrite(text, step) == text
    assert rewrite(f"**New instruction:** {text}", step) == text
    assert step.parse(f"<think>x</think>{json.dumps({'new_instruction': text})}", instruction=OLD) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no new instruction"),
        ("New instruction: ...", "no new instruction"),
        (OLD, "unchanged"),
        (f"New instruction: {OLD.upper()}", "unchanged"),
        (ACTION, "the change was repeated"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("Make the given instruction harder by adding a limit.", "talks about the old instruction"),
        ("```python\nprint('shirt')\n```", "looks like an answer"),
        ("Sure, you will need a coat.", "looks like an answer"),
        ("word " * 400, "400 words are too many for an instruction made of 9"),
    ],
)
def test_what_is_no_new_instruction_has_a_reason(text, reason):
    with pytest.raises(Unreadable, match=reason) as error:
        rewrite(text)
    assert "\n" not in str(error.value)


def test_other_forms_and_beginnings_are_no_new_instruction():
    with pytest.raises(Unreadable):
        rewrite(NEW, truncated=True)
    for text in (NEW, f"New instruction: {NEW}", "<think>Hm"):
        with pytest.raises(Unreadable):
            Rewrite().parse(text, instruction=OLD)


def test_evol_actions_are_distinct_sentences():
    assert len(set(ACTIONS)) == 6
    assert all(action.endswith(".") and action[0].isupper() for action in ACTIONS)


@pytest.mark.parametrize("text", ["4", " Yes.\n", "```\nx\n```", "I'm sorry for your loss. Here is a letter: ..."])
def test_answers(text):
    assert Answer().parse(text) == text.strip()


def test_an_answer_has_no_thoughts_and_may_be_cut_off():
    for marks in ("<think>{}</think>", "<reasoning>{}</reasoning>", "[THINK]{}[/THINK]", "◁think▷{}◁/think▷"):
        assert Answer().parse(marks.format("2 + 2") + "\n\n4") == "4"
    assert Answer().parse("It is a long", truncated=True) == "It is a long"


def test_a_refusal_with_an_answer_is_an_answer():
    text = "I'm sorry, but I can't see your list. " + "Here is how you can sort one by yourself, step by step. " * 8
    assert Answer().parse(text) == text.strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("<think>so</think> ", "only thoughts"),
        ("Yes. <|message|>so", "thoughts are left"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m really sorry, but I cannot help you with this request.", "refusal"),
        ("As an AI language model, I don't have personal opinions.", "refusal"),
        ("I cannot fulfill this request.", "refusal"),
        ("Es tut mir leid, aber dabei kann ich nicht helfen.", "refusal"),
        ("Lo siento, no puedo ayudar con eso.", "refusal"),
        ("对不起，我无法帮助您。", "refusal"),
        ("大変申し訳ございませんが、そのご依頼にはお答えできません。", "refusal"),
    ],
)
def test_no_answer_has_a_reason(text, reason):
    with pytest.raises(Unreadable, match=reason):
        Answer().parse(text)


def test_scores():
    assert Score().parse('{"score_1": 8, "score_2": 6.5}') == (8, 6.5)
    assert Score().parse("8 6.5") == (8, 6.5), "a prompt of the user may ask for two numbers"
    for text in ("Both are great.", '{"score_1": 8}', '{"score_1": 11, "score_2": 1}', '{"score_1": 0, "score_2": 1}'):
        with pytest.raises(Unreadable):
            Score().parse(text)
    with pytest.raises(Unreadable):
        Score().parse("9 1", truncated=True)  # a 10, perhaps


def test_the_score_of_one_is_expected_over_digits():
    logprobs = [-math.inf] * 10
    logprobs[3], logprobs[8] = math.log(0.2), math.log(0.6)
    assert ScoreOne().expected(logprobs) == pytest.approx(1 + (3 * 0.2 + 8 * 0.6) / 0.8)
    logprobs[3], logprobs[8] = math.log(0.002), math.log(0.006)
    with pytest.raises(Unreadable, match="1%"):
        ScoreOne().expected(logprobs)


# Asking again


def test_asking_again_adds_two_turns_and_shows_the_form():
    messages = Encode().messages(instruction="Say hello.", max_skills=2)
    more = again(messages, "<think>hm</think> Hello!", "there is no use case", step=Encode())
    assert more[:1] == messages and len(messages) == 1
    assert more[1] == {"role": "assistant", "content": "Hello!"}
    assert more[2]["role"] == "user" and "there is no use case." in more[2]["content"]
    assert Encode.form in more[2]["content"]
    [turn] = again(messages, "<think>hm", "the reply is empty", step=Encode())
    assert turn["content"].startswith(messages[0]["content"]) and "the reply is empty." in turn["content"]


def test_asking_again_in_the_words_of_the_user(tmp_path):
    (tmp_path / "again.jinja").write_text("Noch einmal: {{ reason }}!", encoding="utf-8")
    messages = Encode().messages(instruction="Hi", max_skills=1)
    assert again(messages, "Hello!", "leer", step=Encode(), folder=tmp_path)[-1]["content"] == "Noch einmal: leer!"


# Prompts of the user


NAMES = sorted(path.stem for path in PROMPTS.glob("*.jinja"))


def write(folder, text, name="encode"):
    (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    return folder


def test_there_is_a_prompt_for_each_step():
    assert NAMES == [
        "again", "answer", "decode", "encode", "evol", "propose", "rewrite", "rubrics", "score", "score_one",
    ]  # fmt: skip
    for name in NAMES:
        PromptTemplate(name)


def test_a_file_of_the_user_wins_and_the_others_stay(tmp_path):
    write(tmp_path, "\ufeffWofür ist das? {{ instruction }}\n")
    assert only_turn(Encode(tmp_path), instruction="Hallo") == "Wofür ist das? Hallo"
    assert only_turn(Decode(str(tmp_path)), number=2, **TRIP) == only_turn(Decode(), number=2, **TRIP)


def test_a_file_of_the_user_may_include_one_that_comes_along(tmp_path):
    write(tmp_path, "{% include 'answer.jinja' %}!")
    assert PromptTemplate("encode", tmp_path).render(instruction="Hi", max_skills=3) == "Hi!"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("encode", "{{ instruktion }}", "unknown variable 'instruktion'; it may use instruction, max_skills"),
        ("encode", "{{ instruction }} {{ number }}", "unknown variable 'number'"),
        ("encode", "Describe it.", "does not depend on 'instruction'"),
        ("decode", "{{ use_case }}: {{ number }}", "does not depend on 'skills'"),
        ("score_one", "{{ instruction }} {{ first }} {{ second }}", "does not depend on 'which'"),
        ("encode", "\n{{ instruction }", "line 2: "),
        ("encode", "{% for x in instruction %}", "line 1: .*correct the file"),
        ("encode", "{{ instruction.words }}", "cannot be filled in .*words"),
        ("encode", "{{ instruction | nofilter }}", "nofilter"),
        ("encode", "{{ instruction }} {{ max_skills / 0 }}", "cannot be filled in .*zero"),
        ("encode", "{{ instruction }} {{ max_skills + '' }}", "cannot be filled in"),
        ("encode", "{{ instruction }}{% include 'missing.jinja' %}", "cannot be filled in .*missing"),
        ("encode", "{{ instruction }}\n{{ max_skills.a }}", "line 2: cannot be filled in .*'a'"),
        ("encode", "{{ instruction }}\n\n{{ 説明 }}", "line 3: unknown variable '説明'"),
        ("encode", "{{ instruction }}{{ ''.__class__.__mro__ }}", "unsafe"),
        ("encode", "{{ instruction }}{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe|no attribute"),
        ("encode", "{{ instruction }}{% set d = {} %}{{ d.popitem() }}", "line 1: cannot be filled in"),
        ("encode", "{{ instruction }}{% include 'encode.jinja' %}", "recursion"),
        ("encode", "{% macro f() %}{{ f() }}{% endmacro %}{{ instruction }}{{ f() }}", "recursion"),
        ("encode", "{{ instruction }}{% for i in range(10**9) %}{% endfor %}", "makes too much"),
        ("encode", "{{ instruction }}{% for i in range(999999) %}{% endfor %}", "[Rr]ange too big"),
        ("encode", "{{ instruction }}{{ 'あ' * 10000000000 }}", "makes too much"),
        ("encodes", "{{ instruction }}", "rename it to one of encode, decode"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, name, text, message):
    write(tmp_path, text, name)
    with pytest.raises(ValueError, match=message) as error:
        PromptTemplate(name if name in NAMES else "encode", tmp_path)
    assert str(error.value).startswith(str(tmp_path / f"{name}.jinja")) and "\n" not in str(error.value)


def test_loops_in_loops_end(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_extensions.core.generation.ask._LONGEST_TIME", 0.2)
    loops = "".join(f"{{% for x{n} in range(9999) %}}" for n in range(4)) + "{% endfor %}" * 4
    write(tmp_path, "{{ instruction }}" + loops)
    with pytest.raises(ValueError, match=r"line 1: cannot be filled in .it takes more than 0.2 seconds"):
        PromptTemplate("encode", tmp_path)
    write(tmp_path, "{{ instruction }} {{ '-' * 20 }} {{ 2 * max_skills }}")
    assert PromptTemplate("encode", tmp_path).render(instruction="Hi", max_skills=3) == f"Hi {'-' * 20} 6"


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "encode.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(ValueError, match=r"encode.jinja: cannot be read as UTF-8"):
        PromptTemplate("encode", tmp_path)


def test_values_are_not_templates():
    assert PromptTemplate("answer").render(instruction="{{ 7 * 7 }} <b>&</b>") == "{{ 7 * 7 }} <b>&</b>"


@pytest.mark.parametrize(
    "text",
    [
        "{{ instruction.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }} {{ instruction }}",
        "{{ instruction }} {{ cycler.__init__.__globals__.os.popen('touch hacked').read() }}",
    ],
)
def test_a_prompt_folder_can_run_nothing(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"encode\.jinja"):
        PromptTemplate("encode", write(tmp_path, text))
    assert not (tmp_path / "hacked").exists()


def test_schemas_have_bounds_that_longer_replies_may_exceed():
    schema = json.loads(schema_json(MetadataReply))["properties"]
    assert schema["use_case"] == {"type": "string", "maxLength": 300}
    assert schema["skills"] == {"type": "array", "maxItems": 20, "items": {"type": "string", "maxLength": 100}}
    assert json.loads(schema_json(InstructionsReply))["properties"]["instructions"]["maxItems"] == 100
    assert MetadataReply(use_case="a" * 300, skills=["b"] * 30).use_case == "a" * 300


def test_a_rubric_without_an_end_is_none():
    rubrics = [{"rubric": "It asks for a date", "action": "Add a date"}, {"rubric": "It is long", "action": "x" * 500}]
    reply = json.dumps({"rubrics": rubrics})
    assert [own.action for own in Rubrics().parse(reply)] == ["Add a date"]
