import json

import pytest

from trl_extensions.core.generation.replies import Unreadable, read_reply, schema_json
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.core.runs.resumable import failures_path
from trl_extensions.tnt.annotate import annotate_rows
from trl_extensions.tnt.annotate.judge import JudgeAnnotator, Quotes, find_quote


class ScriptedJudge:
    """Gives the next of the answers scripted for a text, found by the text in the question; in reverse order."""

    name = "scripted"

    def __init__(self, script):
        self.script = {text: list(answers) for text, answers in script.items()}
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        for index in reversed(range(len(prompts))):
            asked = "".join(message["content"] for message in prompts[index])
            [text] = [text for text in self.script if f"<answer>\n{text}\n</answer>" in asked]
            yield index, Generation(self.script[text].pop(0), "stop", 5)


def quotes(*found):
    return json.dumps({"quotes": found}, ensure_ascii=False)


def annotate(script, *, prompts=None, **options):
    engine = ScriptedJudge(script)
    judge = JudgeAnnotator(engine, "insults", **options)
    texts = list(script)
    found = judge.annotate(texts, prompts or ["why?"] * len(texts))
    return judge, engine, [[text[s.start : s.end] for s in spans] for text, spans in zip(texts, found, strict=True)]


def test_quotes_become_spans_at_every_occurrence():
    text = "You idiot. What an idiot! Idiots."
    judge = JudgeAnnotator(ScriptedJudge({text: [quotes("idiot", "What an idiot")]}), "insults")
    assert judge.annotate([text], [""]) == [[(4, 9, "unwanted"), (11, 24, "unwanted"), (19, 24, "unwanted")]]
    assert +judge.counts == {}
    assert judge.failures == {}


def test_quotes_of_a_japanese_text():
    _, _, [found] = annotate({"これは「馬鹿」な話だ。馬鹿げている。": [quotes("馬鹿", "話だ。")]})
    assert found == ["馬鹿", "話だ。"]  # the first in quotation marks, where it stands alone


def test_the_judge_sees_task_prompt_and_output():
    script = {"plain {x}": [quotes()], "chat": [quotes()]}
    prompts = ["why {y}?", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how?"}]]
    _, engine, found = annotate(script, prompts=prompts)
    assert found == [[], []]
    [(asked, params)] = engine.calls
    assert [[message["role"] for message in chat] for chat in asked] == [["user", "assistant"] * 2 + ["user"]] * 2
    first, second = (chat[-1]["content"] for chat in asked)
    for part in ("insults", "why {y}?", "plain {x}", "at most 8"):
        assert part in first
    for part in ("insults", "system: be kind\nuser: how?", "chat"):
        assert part in second
    assert params == GenerationParams(max_new_tokens=300, schema=schema_json(Quotes))


def test_the_worked_examples_are_right():
    """What the judge is shown must be what it is asked for: readable, and quoted from the text."""
    _, engine, _ = annotate({"text": [quotes()]})
    [([chat], _)] = engine.calls
    shown = list(zip(chat[:-1:2], chat[1::2], strict=True))
    assert len(shown) == 2
    for question, reply in shown:
        answer = question["content"].split("<answer>\n")[1].removesuffix("\n</answer>")
        assert all(quote in answer for quote in read_reply(reply["content"], Quotes).quotes)


def test_quotes_that_are_not_there_are_counted_and_dropped():
    judge, engine, found = annotate({"You idiot.": [quotes("idiot", "moron", "You are")], "Fine.": [quotes()]})
    assert found == [["idiot"], []]
    assert +judge.counts == {"not_in_text": 2}
    assert len(engine.calls) == 1


def test_a_text_of_which_no_quote_can_be_placed_is_asked_about_again_and_is_never_clean():
    script = {"Some evil.": [quotes("bad"), quotes("evil")], "Fine.": [quotes("bad"), quotes("mad", "sad")]}
    judge, engine, found = annotate(script)
    assert found == [["evil"], []]
    assert judge.failures == {1: (quotes("bad"), quotes("mad", "sad"))}
    assert +judge.counts == {"not_in_text": 4, "misquoted": 1}
    assert [len(asked) for asked, _ in engine.calls] == [2, 2]


def test_quotes_beyond_the_limit_are_counted_and_repeated_ones_are_one():
    letters = list("abcdefghij")
    judge, _, found = annotate({" ".join(letters): [quotes("a", *letters)]})
    assert found == [letters[:8]]
    assert +judge.counts == {"over_limit": 2}


def test_an_unreadable_answer_is_asked_for_again_and_then_set_aside():
    params = GenerationParams(max_new_tokens=9, temperature=0.9, seed=4)
    script = {"one idiot": ["Hmm, hard to say."], "two": [quotes()], "three": ["??"], "": [], "four": [quotes()]}
    script["one idiot"].append('["idiot"]')
    script["three"].append("I would rather not.")
    judge, engine, found = annotate(script, params=params)
    assert found == [["idiot"], [], [], [], []]
    assert judge.counts["unread"] == 1
    assert judge.failures == {2: ("??", "I would rather not.")}
    (asked, first), (again, second) = engine.calls
    assert (len(asked), len(again)) == (4, 2)  # the empty text is never asked about
    assert (first.seed, first.max_new_tokens, second.seed) == (4, 9, 5)
    assert "Hmm, hard to say." in again[0][-2]["content"] and again[0][-3] == asked[0][-1]
    engine.script["one idiot"] = [quotes()]
    assert judge.annotate(["one idiot"], [""]) == [[]]
    assert judge.failures == {}  # of the last call
    assert judge.counts["unread"] == 1  # of all


def test_the_report_counts_what_the_judge_got_wrong_and_keeps_its_words(tmp_path):
    rows = [{"id": text, "completion": text} for text in ("good evil", "bad idiot", "odd")]
    script = {"good evil": [quotes("evil", "bad")], "bad idiot": [quotes("idiot")], "odd": ["well", "well?"]}
    report = annotate_rows(rows, [JudgeAnnotator(ScriptedJudge(script), "insults")], tmp_path / "out.jsonl")
    assert report.counts == {"judge": {"not_in_text": 1, "unread": 1}}
    assert (report.rows, report.with_span, report.set_aside) == (2, 2, 1)
    assert "judge: 1 not_in_text, 1 unread" in report.summary
    [aside] = read_jsonl(failures_path(tmp_path / "out.jsonl"))
    assert aside["failures"] == [{"by": "judge", "answers": ["well", "well?"]}]


@pytest.mark.parametrize("reply", ['["a b", "c"]', '```json\n{"quotes": ["a b", "c"]}\n```', "1. a b\n2. c"])
def test_replies_of_engines_without_schemas(reply):
    assert read_reply(reply, Quotes).quotes == ["a b", "c"]


@pytest.mark.parametrize("reply", ["", "None", "I cannot help with that.", "[1, 2]", '{"passages": ["a"]}'])
def test_replies_that_cannot_be_read(reply):
    with pytest.raises(Unreadable):
        read_reply(reply, Quotes)


@pytest.mark.parametrize(
    ("quote", "text", "found"),
    [
        ("idiot", "An idiot, idiot.", ["idiot", "idiot"]),
        ("ass", "class and ass and asset", ["ass"]),  # whole words first
        ("idiot", "two idiots", ["idiot"]),  # but the quote is in the text
        ("a  b\nc", "x a b c y", ["a b c"]),
        ("a b", "x a \n\t b y", ["a \n\t b"]),
        ('it\'s "so"', "well it’s “so” so", ["it’s “so”"]),
        ("it’s", "well it's what it’s", ["it's", "it’s"]),
        ('"idiot"', "You idiot!", ["idiot"]),
        ("wait... no—never", "wait… no-never", ["wait… no-never"]),
        ("wait…", "and wait... what", ["wait..."]),
        ("  idiot ", "You idiot!", ["idiot"]),
        ("Idiot", "You idiot!", []),
        ("", "You idiot!", []),
        ('""', "You idiot!", []),
        ("ab", "a b", []),
        ("You idiot!", "You idiot!", ["You idiot!"]),
    ],
)
def test_quotes_are_mapped_back_to_exact_places(quote, text, found):
    assert [text[start:end] for start, end in find_quote(quote, text)] == found


def test_settings_hold_what_the_spans_depend_on():
    settings = JudgeAnnotator(ScriptedJudge({}), " made-up \n facts").settings
    assert settings["task"] == "made-up facts"
    assert (settings["engine"], settings["max_quotes"], settings["params"]["max_new_tokens"]) == ("scripted", 8, 300)
    assert json.loads(json.dumps(settings))["kind"] == "judge"


def test_bad_arguments():
    with pytest.raises(ValueError, match="`task` is empty"):
        JudgeAnnotator(ScriptedJudge({}), " ")
