"""Nothing but the choices may tell constitutions apart: order and wording of principles are drawn anew to score."""

from collections import Counter

import pytest
import torch

from tests.conftest import make_tiny_model
from trl_extensions.core.generation.types import Generation, GenerationParams
from trl_extensions.core.inputs import Query
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.sami.evaluation import evaluate_rows
from trl_extensions.sami.principles import Principle, load_principles, sample_constitutions, save_principles
from trl_extensions.sami.sampling import EVERYTHING_BUT_EMPTY, sample_rows


LETTERS = "ABCDE"
ENGLISH = [Principle(f"p{letter}", f"Please write of {letter}.", f"Never write of {letter}.") for letter in LETTERS]
JAPANESE = [Principle(f"原則{letter}", f"{letter}について書く。", f"{letter}には触れない。") for letter in LETTERS]
PURPOSES = ("sample", "train", "eval")


def order_of(text: str) -> str:
    return "".join(character for character in text if character in LETTERS)


def draw(principles, purpose, key, num=2, **options):
    return sample_constitutions(principles, num, seed=3, key=key, purpose=purpose, **options)


@pytest.mark.parametrize("principles", [ENGLISH, JAPANESE], ids=["en", "ja"])
def test_purposes_share_choices_and_differ_in_order(principles):
    keys = [f"質問 {number}" for number in range(40)]
    drawn = {purpose: [draw(principles, purpose, key) for key in keys] for purpose in PURPOSES}
    assert drawn == {purpose: [draw(principles, purpose, key) for key in keys] for purpose in reversed(PURPOSES)}
    for one, other in (("sample", "train"), ("sample", "eval"), ("train", "eval")):
        pairs = [
            (a, b)
            for mine, theirs in zip(drawn[one], drawn[other], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        ]
        assert all(a.choices == b.choices for a, b in pairs)
        # One order in 120 comes up again: 80 pairs, 0.7 expected
        assert sum(order_of(a.text) == order_of(b.text) for a, b in pairs) <= 5


def test_every_order_is_equally_likely_whatever_the_other_draw():
    three, counts, draws = ENGLISH[:3], Counter(), 5400
    for number in range(draws):
        sampled, scored = (draw(three, purpose, str(number))[0] for purpose in ("sample", "train"))
        counts[order_of(sampled.text), order_of(scored.text)] += 1
    assert len(counts) == 36
    # Chi-square with 35 degrees of freedom is below 80 but once in 20,000 times
    assert sum((count - draws / 36) ** 2 / (draws / 36) for count in counts.values()) < 80


def test_paraphrases_are_drawn_anew(tmp_path):
    path = tmp_path / "principles.yaml"
    own = [
        Principle("brief", ("Be brief.", "Keep it short.", "短く書く。"), "Be long."),
        Principle("kind", "Be kind.", ("Be stern.", "Be gruff.")),
    ]
    save_principles(path, own)
    assert load_principles(path) == own
    seen, changed = Counter(), 0
    for number in range(600):
        sampled, scored = (draw(own, purpose, str(number), 4) for purpose in ("sample", "train"))
        for a, b in zip(sampled, scored, strict=True):
            lines = [{line.partition(" ")[2] for line in one.text.split("\n")} for one in (a, b)]
            changed += lines[0] != lines[1]
            seen.update(lines[0])
            assert len(lines[0] & {"Be brief.", "Keep it short.", "短く書く。"}) == a.choices["brief"]
    # Each of three in a third of 1,200 draws, each of two in half: five standard deviations
    assert all(abs(seen[text] - 400) < 82 for text in ("Be brief.", "Keep it short.", "短く書く。"))
    assert all(abs(seen[text] - 600) < 87 for text in ("Be stern.", "Be gruff."))
    # (+,+): 2/3 change; (+,-): 1 - 1/3 * 1/2 = 5/6; (-,+): never; (-,-): 1/2
    assert changed / 600 == pytest.approx(2 / 3 + 5 / 6 + 0 + 1 / 2, abs=0.15)


@pytest.mark.parametrize(
    ("definition", "antithesis", "message"),
    [
        ("[]", "No.", "`definition`: .*at least 1"),
        ("[Do., '  ']", "No.", "`definition`: .*at least 1"),
        ("[Do., 3]", "No.", "`definition`: .*string"),
        ("[Do., Act.]", "[No., act.]", ".*are the same"),
    ],
)
def test_bad_paraphrases_are_refused_in_one_line(tmp_path, definition, antithesis, message):
    path = tmp_path / "p.yaml"
    path.write_text(f"principles:\n- name: a\n  definition: {definition}\n  antithesis: {antithesis}\n")
    with pytest.raises(ValueError, match=f"principle 1: {message}") as error:
        load_principles(path)
    assert "\n" not in str(error.value)


def test_desired_pairs_hold_all_definitions_and_each_other_choice_alike():
    others, draws = Counter(), 3000
    for number in range(draws):
        first, second = draw(ENGLISH[:2], "sample", str(number), pairs="desired")
        assert all(first.choices.values())
        others[second.label] += 1
    # The published pairs: either principle turned round, or both; five standard deviations of a binomial
    assert set(others) == {"+pA −pB", "−pA +pB", "−pA −pB"}
    assert all(abs(count - draws / 3) < 5 * (draws * 2 / 9) ** 0.5 for count in others.values())
    four = draw(ENGLISH[:2], "sample", "q", 4, pairs="desired")
    assert len({one.label for one in four}) == 4


class OrderEngine:
    """Writes the order of the principles it was given, and nothing else."""

    name = "order"

    def generate(self, prompts, params):
        for index, prompt in enumerate(prompts):
            yield index, Generation(text=order_of(prompt), finish_reason="stop", num_tokens=5)


def accuracy(rows, column):
    """Of a model that goes by the order alone: one nat for each place at which prompt and response agree."""
    hits = []
    for row in rows:
        matrix = torch.tensor([
            [sum(a == b for a, b in zip(order_of(prompt), text, strict=True)) for text in row["completions"]]
            for prompt in row[column]
        ])  # fmt: skip
        best = matrix == matrix.amax(0)
        hits += (best.diagonal() / best.sum(0)).tolist()  # ties by lot
    return sum(hits) / len(hits)


@pytest.mark.parametrize("principles", [ENGLISH, JAPANESE], ids=["en", "ja"])
@pytest.mark.parametrize("purpose", ["train", "eval"])
def test_what_reads_the_order_alone_is_right_in_the_same_and_at_chance_in_a_fresh_one(tmp_path, principles, purpose):
    sample_rows(
        OrderEngine(), [Query.from_text(f"q{number}?") for number in range(500)], principles, purpose=purpose,
        num_constitutions=4, params=GenerationParams(8), output=tmp_path / "rows.jsonl", conversational=False,
        filters=EVERYTHING_BUT_EMPTY,
    )  # fmt: skip
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert accuracy(rows, "sampled_prompts") > 0.97  # two of four orders are equal in 5 % of the rows
    # 2,000 responses at 1/4: a standard error of about 1 %
    assert accuracy(rows, "prompts") == pytest.approx(0.25, abs=0.05)


def test_evaluation_scores_both_orders(tmp_path, tiny_tokenizer):
    queries = [Query.from_text(f"q{number}?") for number in range(4)]
    settings = {"params": GenerationParams(8), "conversational": False, "filters": EVERYTHING_BUT_EMPTY}
    for name, purpose in (("rows", "eval"), ("other", "train")):
        sample_rows(OrderEngine(), queries, ENGLISH, output=tmp_path / f"{name}.jsonl", purpose=purpose, **settings)
    rows, other = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("rows", "other"))
    model = make_tiny_model(384)
    result = evaluate_rows(model, tiny_tokenizer, rows, tmp_path / "e.json", unseen_rows=other)
    swapped = [row | {"prompts": row["sampled_prompts"]} for row in rows]
    same = evaluate_rows(model, tiny_tokenizer, swapped, tmp_path / "s.json")
    for name in ("mi_bound", "contrast_per_token", "accuracy_columns"):
        assert result["same_order"][name] == same[name]
    assert result["mi_bound"] != same["mi_bound"]
    alone = evaluate_rows(model, tiny_tokenizer, other, tmp_path / "o.json")
    assert result["held_out_principles"]["mi_bound"]["mean"] == pytest.approx(alone["mi_bound"]["mean"], abs=1e-5)
    assert result["held_out_principles"]["num_queries"] == 4
