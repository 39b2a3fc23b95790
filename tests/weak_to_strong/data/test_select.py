"""What the strong model learns from, on rows small enough to work out by hand."""

import numpy as np
import pytest

from trl_extensions.weak_to_strong.data.select import keep_confident, keep_rows, to_continuations, to_sft_dataset


class TestConfidentLabels:
    # Confidences |2 p - 1|: .8 .2 .6 .9 .1
    FIVE = np.array([[p, 1 - p] for p in (0.9, 0.6, 0.2, 0.05, 0.45)])

    @pytest.mark.parametrize(
        ("share", "kept"), [(0.4, [0, 3]), (0.6, [0, 2, 3]), (1.0, [0, 1, 2, 3, 4]), (0.5, [0, 3])]
    )
    def test_a_share(self, share, kept):
        assert keep_confident(self.FIVE, share)[0].tolist() == kept

    def test_a_class_that_would_be_lost_is_named(self):
        # Class 0: rows 0 to 3 (.9 .8 .7 .6 sure), class 1: rows 4 and 5 (.2 .1)
        labels = np.array([[p, 1 - p] for p in (0.95, 0.9, 0.85, 0.8, 0.4, 0.45)])
        with pytest.raises(ValueError, match=r"class 'bad', predicted for 2 of 6 rows, .*larger share"):
            keep_confident(labels, 4 / 6, class_names=["good", "bad"])

    def test_a_class_that_is_never_predicted_is_not_missed(self):
        labels = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.4, 0.35, 0.25]])
        assert keep_confident(labels, 2 / 3)[0].tolist() == [0, 1]

    def test_ties_are_broken_by_the_seed_and_not_by_position(self):
        labels = np.array([[1.0, 0.0], [0.0, 1.0]] * 100)
        chosen = keep_confident(labels, 0.5)[0].tolist()
        assert chosen == keep_confident(labels, 0.5)[0].tolist() != keep_confident(labels, 0.5, seed=1)[0].tolist()
        assert max(chosen) > 150 and chosen == sorted(set(chosen)) and len(chosen) == 100

    def test_summary_is_one_line(self):
        _, summary = keep_confident(self.FIVE, 0.6, class_names=["safe", "unsafe"])
        assert "kept 3 of 5 rows (1 'safe', 2 'unsafe'), each of confidence 0.60 or more; dropped 2" in summary
        assert "\n" not in summary

    @pytest.mark.parametrize("share", [0, 0.0, 1.5, -0.1, float("nan")])
    def test_bad_shares(self, share):
        with pytest.raises(ValueError, match="`share` is"):
            keep_confident(self.FIVE, share)

    def test_no_rows(self):
        with pytest.raises(ValueError, match="must have the shape"):
            keep_confident(np.empty((0, 2)), 1.0)


def row(row_id, prompt, text, score, model="a", **columns):
    return {"id": row_id, "prompt": prompt, "completion": text, "model": model, "scores": {"tox": score}} | columns


ROWS = [
    row("1", "p", "fine", 0.1),
    row("2", "p", "rude", 0.9),
    row("3", "p", "so so", 0.5, model="b"),
    row("4", "q", "  ", None, model="b"),
    row("5", "q", "cut o", 0.0, truncated=True),
    row("6", "q", "odd", None),
    row("7", "q", "good", 0.2, model="b"),
    row("8", "q", "good\n", 0.2),
    row("9", "r", "bad", 0.8, model="b"),
]


def kept(**options):
    rows, report = keep_rows(ROWS, scorer="tox", higher_is_better=False, **options)
    return [entry["id"] for entry in rows], report


def test_without_a_limit_no_score_decides():
    ids, report = kept()
    assert ids[:4] == ["1", "2", "3", "6"] and ids[4] in ("7", "8") and ids[5:] == ["9"]
    assert report.dropped["unscored"] == 0 and report.dropped["empty"] == report.dropped["duplicate"] == 1
    # .1 .9 .5 .2 .8; the one without a score counts for nothing
    assert report.mean_kept == pytest.approx(0.5)


def test_every_reason_is_counted_once():
    ids, report = kept(threshold=0.5)
    assert ids[:2] == ["1", "3"] and ids[2:] in (["7"], ["8"])  # at the threshold is kept; one of the equal answers
    assert report.dropped == {
        "empty": 1, "truncated": 1, "short": 0, "unscored": 1, "beyond_threshold": 2, "duplicate": 1,
    }  # fmt: skip
    assert report.kept + sum(report.dropped.values()) == report.rows == 9
    assert (report.prompts, report.prompts_kept) == (3, 2)
    assert report.mean_before == pytest.approx((0.1 + 0.9 + 0.5 + 0.0 + 0.2 + 0.2 + 0.8) / 7)
    assert report.mean_kept == pytest.approx((0.1 + 0.5 + 0.2) / 3)
    assert "3 of 9 answers kept, to 2 of 3 prompts; dropped: 1 empty, 1 truncated, 1 unscored" in report.summary


def test_the_direction_decides_what_is_best():
    ids, _ = kept(best_of=1)
    assert ids[0] == "1" and ids[1] in ("7", "8") and ids[2:] == ["9"]
    rows, _ = keep_rows(ROWS, scorer="tox", higher_is_better=True, threshold=0.8)
    assert [entry["id"] for entry in rows] == ["2", "9"]


def test_rank_keeps_the_best_of_each_prompt_over_all_models():
    ids, report = kept(best_of=2)
    assert ids[:2] == ["1", "3"] and ids[-1] == "9" and len(ids) == 4
    assert report.dropped["outranked"] == 1  # the rude one
    assert report.models["a"]["rows"] == 5 and report.models["b"]["rows"] == 4
    assert sum(entry["kept"] for entry in report.models.values()) == 4
    assert report.models["b"]["share"] == report.models["b"]["kept"] / 4


def test_a_budget_keeps_the_best_of_all():
    ids, report = kept(budget=2, keep_truncated=True)
    assert ids == ["1", "5"]
    assert report.dropped["over_budget"] == 4 and report.dropped["duplicate"] == 1
    assert report.models == {
        "a": {"rows": 5, "kept": 2, "share": 1.0}, "b": {"rows": 4, "kept": 0, "share": 0.0},
    }  # fmt: skip
    assert kept(budget=100)[1].dropped["over_budget"] == 0


def test_short_answers_need_a_number_of_tokens():
    rows = [row("1", "p", "a", 0.1, num_tokens=1), row("2", "p", "a b", 0.9, num_tokens=2)]
    left, report = keep_rows(rows, scorer="tox", higher_is_better=False, min_tokens=2)
    assert left == rows[1:] and report.dropped["short"] == 1
    with pytest.raises(ValueError, match="row '1' has no `num_tokens`, which `min_tokens` needs"):
        keep_rows(ROWS, scorer="tox", higher_is_better=False, min_tokens=2)


def test_ties_favour_no_model_and_do_not_depend_on_the_order():
    rows = [row(f"{m}-{i}", f"p{i}", f"{m} answers", 1.0, model=m) for m in "ab" for i in range(200)]
    left, report = keep_rows(rows, scorer="tox", higher_is_better=True, best_of=1)
    # 200 fair choices: 4 standard deviations are 28
    assert 72 <= report.models["a"]["kept"] <= 128
    turned, _ = keep_rows(rows[::-1], scorer="tox", higher_is_better=True, best_of=1)
    assert turned == left[::-1]


def test_equal_answers_to_different_prompts_are_no_duplicates():
    rows = [row("1", "p", "yes", 0.1), row("2", "q", "yes", 0.1)]
    assert keep_rows(rows, scorer="tox", higher_is_better=False)[0] == rows


def test_chats_and_rows_without_a_model():
    rows = [
        {
            "id": i,
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": text}],
            "scores": {"tox": score},
        }
        for i, (text, score) in enumerate([("x", 0.3), ("y", 0.2)])
    ]
    left, report = keep_rows(rows, scorer="tox", higher_is_better=False, best_of=1)
    assert left == rows[1:] and report.models == {} and report.prompts == 1
    assert to_sft_dataset(left)[0] == {"prompt": rows[1]["prompt"], "completion": rows[1]["completion"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "none of 9 answers is left: .* 6 beyond_threshold .*gave 0 to 0.9.*loosen `threshold`"),
        ({"best_of": 0}, "`best_of` is 0"),
        ({"budget": 0}, "`budget` is 0"),
        ({"min_tokens": -1}, "`min_tokens` is -1"),
        ({"threshold": float("nan")}, "`threshold` is nan"),
        ({"scorer": "judge"}, r"row '1' has no score by 'judge', only \['tox'\]"),
        ({"rows": []}, "no rows to choose from"),
        ({"rows": [row("1", "p", "x", float("nan"))]}, "row '1' has the score nan"),
        ({"rows": [row("1", "p", 7, 0.1)]}, "row '1': a completion must be"),
        ({"rows": [{"id": "1", "completion": "x", "scores": {"tox": 1.0}}]}, "row '1' has no `prompt`"),
        ({"rows": [row("1", "p", "x", 0.1, truncated=True)]}, "1 truncated .*`keep_truncated`"),
        ({"rows": [row("1", "p", "x", None)], "best_of": 1}, "1 unscored; look at `failures`"),
    ],
)
def test_what_cannot_be_kept(options, message):
    rows = options.pop("rows", ROWS)
    with pytest.raises(ValueError, match=message) as error:
        keep_rows(rows, **{"scorer": "tox", "higher_is_better": False, **options})
    assert "\n" not in str(error.value)


def test_an_sft_data_set():
    rows = [row("1", "p", " a", 0.25), row("2", "q", " b", 1.0)]
    assert to_sft_dataset(rows).to_dict() == {"prompt": ["p", "q"], "completion": [" a", " b"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to train on"),
        ([row("1", "p", [{"role": "assistant", "content": "x"}], 1.0)], "row '1' mixes texts and chats"),
        (
            [row("1", "p", "x", 1.0), row("2", [{"role": "user", "content": "p"}],
             [{"role": "assistant", "content": "x"}], 1.0)],
            "row '2' mixes texts and chats",
        ),
    ],
)  # fmt: skip
def test_what_is_no_sft_data_set(rows, message):
    with pytest.raises(ValueError, match=message):
        to_sft_dataset(rows)


def test_continuations_end_only_where_they_really_did(tiny_tokenizer):
    rows = [
        {"prompt": "Boil an egg", "completion": " in water", "truncated": True},
        {"prompt": "Boil an egg", "completion": " in water", "truncated": False},
    ]
    cut, whole = to_continuations(rows, tiny_tokenizer)
    prompt = tiny_tokenizer("Boil an egg")["input_ids"]
    assert tiny_tokenizer.decode(cut["input_ids"][len(prompt) :]) == " in water"
    assert whole["input_ids"] == [*cut["input_ids"], tiny_tokenizer.eos_token_id]
    assert cut["completion_mask"] == [0] * len(prompt) + [1] * (len(cut["input_ids"]) - len(prompt))
    assert whole["completion_mask"] == [*cut["completion_mask"], 1]


def test_continuations_are_of_plain_texts(tiny_tokenizer):
    rows = [{"id": "a", "prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello"}]
    with pytest.raises(ValueError, match="row 'a' is a chat"):
        to_continuations(rows, tiny_tokenizer)


def test_weights_that_rows_bring_are_kept(tiny_tokenizer):
    rows = [row("1", "p", "a", 1.0, weight=0.5, truncated=True), row("2", "q", "b", 0.0, weight=2.0)]
    assert to_sft_dataset(rows)["weight"][:] == [0.5, 2.0]
    assert to_continuations(rows, tiny_tokenizer)["weight"][:] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("given", "column"),
    [({"messages": []}, "prompt"), ({"prompt": "p"}, "completion"), ({"completion": "c"}, "prompt")],
)
def test_rows_without_the_columns_are_refused(given, column, tiny_tokenizer):
    for make in (to_sft_dataset, lambda rows: to_continuations(rows, tiny_tokenizer)):
        with pytest.raises(ValueError, match=f"row 1 has no `{column}`.*need `prompt` and `completion`"):
            make([{"prompt": "p", "completion": "c"}, given])
