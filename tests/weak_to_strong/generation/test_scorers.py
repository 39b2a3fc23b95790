"""Scorers on the real things: alt-profanity-check, a tiny classifier, `evaluate` modules by path, a scripted judge."""

import json

import pytest

from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.weak_to_strong.evaluation import harm_of
from trl_extensions.weak_to_strong.generation.scorers import (
    JudgeScorer,
    check_scores,
    checked_range,
    phrases_scorer,
    plan_scorer,
)


TEXTS = ["You damn idiot.", "Have a nice day.", "The cat sat on the mat."]

MODULE = """
import datasets
import evaluate


class Shout(evaluate.Measurement):
    def _info(self):
        features = datasets.Features({{{features}}})
        return evaluate.MeasurementInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, {inputs}, factor=1):
        values = [factor * sum(letter.isupper() for letter in text) for text in {first}]
        return {output}
"""


def create_scorer(settings):
    return plan_scorer(settings).build()


@pytest.fixture
def module(tmp_path):
    """Writes an `evaluate` module that counts capitals, and returns its path."""

    def write(name, output, inputs=("predictions",)):
        path = tmp_path / name / f"{name}.py"
        path.parent.mkdir()
        features = ", ".join(f'"{entry}": datasets.Value("string")' for entry in inputs)
        path.write_text(MODULE.format(features=features, inputs=", ".join(inputs), first=inputs[0], output=output))
        return str(path)

    return write


def test_profanity_is_a_probability_and_lower_is_better():
    predict = pytest.importorskip("profanity_check", reason="pip install alt-profanity-check").predict_prob
    scorer = create_scorer("profanity")
    scores = scorer.score([""] * 3, TEXTS)
    assert scores == list(predict(TEXTS)) and scores[0] > 0.5 > max(scores[1:])
    assert (scorer.name, scorer.higher_is_better, scorer.settings) == ("profanity", False, {"kind": "profanity"})
    assert scorer.score([], []) == []


def test_a_classifier_gives_the_probability_of_the_label_named(tmp_path):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "cat", "damn", "mat", "nice"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    labels = {0: "kind", 1: "toxic", 2: "odd"}
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.6, id2label=labels, label2id={v: k for k, v in labels.items()},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["damn cat", "nice mat cat", "mat"]
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist() for text in texts]
    for label, place, better in (("toxic", 1, False), ("kind", 0, True)):
        settings = {"kind": "classifier", "model": str(tmp_path), "label": label, "higher_is_better": better}
        scorer = create_scorer(settings | {"name": label})
        assert scorer.score([""] * 3, texts) == pytest.approx([row[place] for row in expected], abs=1e-5)
        assert (scorer.name, scorer.higher_is_better, scorer.settings) == (label, better, settings)
    with pytest.raises(ValueError, match="more than two labels; set `label` to one of 'kind', 'toxic', 'odd'"):
        create_scorer({"kind": "classifier", "model": str(tmp_path)})


def test_an_evaluate_module_by_path(module):
    path = module("shout", '{"capitals": values, "most": max(values)}')
    scorer = create_scorer({"kind": "evaluate", "module": path, "key": "capitals", "higher_is_better": False})
    assert scorer.score([""] * 3, ["AbC", "no", "NO way"]) == [2, 0, 2]
    assert scorer.score([""], ["ABC"]) == [3]
    assert (scorer.name, scorer.higher_is_better, scorer.settings["module"]) == ("shout", False, path)
    settings = {"kind": "evaluate", "module": path, "higher_is_better": True}
    scorer = create_scorer(settings | {"key": "capitals", "arguments": {"factor": 10}, "name": "loud"})
    assert scorer.score([""] * 2, ["AbC", "no"]) == [20, 0] and scorer.name == "loud"
    # one number for all texts: each is then measured alone
    scorer = create_scorer(settings | {"key": "most"})
    assert scorer.score([""] * 3, ["AbC", "no", "No"]) == [2, 0, 1]
    for key, message in (
        (None, "output None is NoneType; set `key` to one with numbers, of: 'capitals', 'most'"),
        ("loud", "output 'loud' is NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            create_scorer(settings | {"key": key}).score([""], ["a"])


def test_an_evaluate_module_whose_input_has_another_name(module):
    path = module("texts", '{"mean": sum(values) / len(values), "words": "many"}', ["data"])
    settings = {"kind": "evaluate", "module": path, "higher_is_better": True}
    assert create_scorer(settings | {"key": "mean"}).score([""] * 2, ["AB", "c"]) == [2, 0]
    with pytest.raises(ValueError, match="output 'words' is str; set `key` to one with numbers, of: 'mean', 'words'"):
        create_scorer(settings | {"key": "words"}).score([""], ["AB"])
    with pytest.raises(ValueError, match=r"its inputs are \['data'\].* set `input_name`"):
        create_scorer(settings | {"input_name": "text"})


def test_an_evaluate_module_that_cannot_be_used(module, tmp_path):
    pairs = module("pairs", '{"x": values}', ["predictions", "references"])
    with pytest.raises(ValueError, match=r"its inputs are \['predictions', 'references'\]"):
        create_scorer({"kind": "evaluate", "module": pairs, "higher_is_better": True})
    with pytest.raises(ValueError, match=r"cannot be loaded .* give the path of its \.py file") as error:
        create_scorer({"kind": "evaluate", "module": str(tmp_path / "nowhere.py"), "higher_is_better": True})
    assert "\n" not in str(error.value)


def test_the_share_of_phrases_that_are_absent():
    scorer = phrases_scorer(["cat", "as an  AI", "C++"], [r"\d{3}"])
    texts = ["A category of 99.", "The Cat, as an\nai, wrote 1234 lines of c++!", "cat-like and 123", "C++20"]
    assert scorer.score([""] * 4, texts) == [1.0, 0.0, 0.5, 0.75]
    assert scorer.higher_is_better
    assert phrases_scorer(["cat"], ignore_case=False).score([""] * 2, ["Cat", "cat"]) == [1.0, 0.0]


def test_a_config_describes_a_scorer_in_yaml():
    scorer = create_scorer("{kind: phrases, phrases: [damn, 'as an AI'], name: style}")
    assert scorer.settings["phrases"] == ["damn", "as an AI"] and scorer.name == "style"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("toxicity", "unknown kind of scorer 'toxicity'; give one of profanity, classifier"),
        ("{kind: [", "is not YAML"),
        ("{model: x}", "give a kind such as 'profanity', or a dict with `kind`"),
        (7, "give a kind such as"),
        ("{kind: profanity, threshold: 1}", "scorer of kind profanity: .*'threshold'; its arguments are name"),
        ("classifier", "scorer of kind classifier: missing .*'model'"),
        ("{kind: evaluate, module: x.py}", "missing .*'higher_is_better'"),
        ("phrases", "give `phrases` or `patterns`"),
        ("{kind: phrases, phrases: ['']}", "`phrases` is .*; give a list of texts, none of them empty"),
        ("{kind: phrases, phrases: damn}", "`phrases` is 'damn'; give a list of texts"),
        ("{kind: judge, criterion: kind, model: x, concurency: 3}", "has no key 'concurency'"),
        ("{kind: phrases, patterns: ['(']}", "pattern '\\(' is not a regular expression"),
        ("{kind: judge, criterion: kind}", "give the `model` that judges"),
    ],
)
def test_what_is_no_scorer(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        create_scorer(settings)
    assert "\n" not in str(error.value)


def test_scores_lie_in_a_range(module):
    path = module("shout", '{"capitals": values}')
    settings = {"kind": "evaluate", "module": path, "higher_is_better": False}
    assert create_scorer(settings).range == (0, 1)
    loud = create_scorer(settings | {"range": [0, 50]})
    assert loud.range == (0, 50) and loud.settings == create_scorer(settings).settings
    judge = JudgeScorer(ScriptedJudge({}), "kind")
    assert judge.range == (1, 10) and phrases_scorer(["x"]).range == (0, 1)
    check_scores([{"id": "a", "scores": {"judge": score}} for score in (1, 10, None)], judge)
    for score in (0.9, 10.5):
        with pytest.raises(
            ValueError, match=f"scorer 'judge' gave row 'a' the score {score}, outside .* 1 to 10: set"
        ):
            check_scores([{"id": "a", "scores": {"judge": score}}], judge)


def test_scores_as_harm():
    marks = {"name": "x", "range": [1, 10], "higher_is_better": True}
    rows = [{"completion": "a", "scores": {"x": mark}} for mark in (1, 4, 10)]
    assert [harm_of(row, marks) for row in rows] == pytest.approx([1, 2 / 3, 0])
    loud = {"name": "x", "range": [0, 50], "higher_is_better": False}
    assert harm_of({"completion": "a", "scores": {"x": 10}}, loud) == 0.2
    assert harm_of({"completion": "a", "scores": {"x": None}}, loud) is None
    assert harm_of({"completion": " \n", "scores": {"x": None}}, loud) == 0.0


@pytest.mark.parametrize("values", [(1, 0), (0, 0), (0, float("inf")), (0,), 5, "ab"])
def test_what_is_no_range(values):
    with pytest.raises(ValueError, match="`range` of a scorer is"):
        checked_range(values)


def test_a_plan_loads_nothing():
    plan = plan_scorer("{kind: classifier, model: /nowhere, label: toxic}")
    assert plan.settings == {"kind": "classifier", "model": "/nowhere", "label": "toxic"}
    with pytest.raises(OSError):
        plan.build()


# The judge


class ScriptedJudge:
    """Gives the next of the replies scripted for a text, found by the text in the question; in reverse order."""

    name = "scripted"

    def __init__(self, script, reason="stop"):
        self.script = {text: list(replies) for text, replies in script.items()}
        self.reason = reason
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        for index in reversed(range(len(prompts))):
            question = prompts[index][0]["content"]
            [text] = [text for text in self.script if f"<answer>\n{text}\n</answer>" in question]
            yield index, Generation(self.script[text].pop(0), self.reason, 5)


def rating(number):
    return json.dumps({"rating": number})


def test_the_judge_is_asked_once_more_and_what_cannot_be_read_is_kept():
    params = GenerationParams(max_new_tokens=9, temperature=0.5, seed=4)
    engine = ScriptedJudge({
        "good": [rating(9)], "so so": ["Well...", rating(5)], "odd": ["It has 3 parts.", rating(11)], "x": [rating(2)],
    })  # fmt: skip
    judge = JudgeScorer(engine, " polite\n and {brief} ", params=params)
    prompts = ["why {y}?", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how?"}], "", "q"]
    assert judge.score(prompts, ["good", "so so", "odd", "x"]) == [9.0, 5.0, None, 2.0]
    assert judge.failures == {2: ["It has 3 parts.", rating(11)]}
    assert judge.counts == {"retried": 2, "unparsed": 1}
    (asked, first), (again, second) = engine.calls
    assert (first.max_new_tokens, first.temperature, first.seed, second.seed) == (9, 0.5, 4, 5)
    assert "rating" in json.loads(first.schema)["properties"] and second.schema == first.schema
    assert [[message["role"] for message in chat] for chat in asked] == [["user"]] * 4
    assert "Criterion: polite and {brief}\n" in asked[0][0]["content"] and "why {y}?" in asked[0][0]["content"]
    assert "system: be kind\nuser: how?" in asked[1][0]["content"] and "(none)" in asked[2][0]["content"]
    assert [chat[0] for chat in again] == [asked[1][0], asked[2][0]]
    assert again[0][1]["content"] == "Well..."  # it is told what could not be read
    engine.script["x"] = [rating(3)]
    assert judge.score(["q"], ["x"]) == [3.0] and judge.failures == {} and judge.counts["unparsed"] == 1


def test_a_judge_that_is_cut_off_has_not_answered():
    judge = JudgeScorer(ScriptedJudge({"a": ['{"rating": 1', '{"rating": 1']}, reason="length"), "short")
    assert judge.score([""], ["a"]) == [None] and judge.failures == {0: ['{"rating": 1'] * 2}


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (rating(7), 7.0), (f"```json\n{rating(10)}\n```", 10.0), (f"<think>maybe 3</think>\n{rating(6)}", 6.0),
        (rating(0), None), (rating(11), None), ("", None), ("7", 7.0), ("8/10.", 8.0), ("10 parts", None),
        (f"<think>still {rating(7)}", None), (f"{rating(7)} {rating(8)}", None), ("評価は７です", 7.0),
    ],
)  # fmt: skip
def test_a_rating_is_read_or_not_guessed(reply, score):
    assert JudgeScorer(ScriptedJudge({"a": [reply, reply]}), "kind").score(["q"], ["a"]) == [score]


def test_a_judge_from_a_config(tiny_model_dir):
    settings = {"kind": "judge", "model": str(tiny_model_dir), "criterion": " kind ", "params": {"max_new_tokens": 4}}
    judge = create_scorer(settings)
    assert judge.params == GenerationParams(max_new_tokens=4) and judge.higher_is_better
    assert json.loads(json.dumps(judge.settings))["criterion"] == "kind"
    with pytest.raises(ValueError, match="`criterion` is empty"):
        create_scorer(settings | {"criterion": " "})


def test_a_judge_at_an_endpoint_takes_the_settings_of_any_engine():
    settings = {"kind": "judge", "model": "m", "base_url": "http://localhost:1", "criterion": "kind", "concurrency": 2}
    assert create_scorer(settings).engine.concurrency == 2
