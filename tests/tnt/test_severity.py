"""Severities: from the file of candidates to spans, tokens, the loss, and what is left of each candidate."""

import json

import pytest
import torch
from datasets import Dataset

from tests.tnt.test_evaluation import row as answer
from tests.tnt.test_trainer import plain_loss
from trl_extensions.core.modeling.head import OutputHead
from trl_extensions.core.runs.jsonl import read_jsonl
from trl_extensions.core.stats import wilson
from trl_extensions.tnt.annotate import annotate_rows
from trl_extensions.tnt.annotate.phrases import PhraseAnnotator
from trl_extensions.tnt.config import AnnotatorArguments
from trl_extensions.tnt.data import prepare_rows
from trl_extensions.tnt.evaluation import residual, unwanted
from trl_extensions.tnt.fused_loss import Objective, fused_negative_loss
from trl_extensions.tnt.logs import Candidate, LogRow, rows_from_logs, write_candidates
from trl_extensions.tnt.loss import VARIANTS, targeted_negative_loss


def test_severity_two_is_alpha_doubled_on_its_span_only():
    # p = (0.5, 0.3, 0.2) at three places; token 0 is written; without it q = (0.6, 0.3, 0.1) is (0, 3/4, 1/4)
    logits = torch.tensor([[[0.5, 0.3, 0.2]] * 3], dtype=torch.float64).log().requires_grad_()
    reference = torch.tensor([[[0.6, 0.3, 0.1]] * 3], dtype=torch.float64).log()
    weights = torch.tensor([[-1.0, -2.0, 1.0]])
    losses = targeted_negative_loss(logits, reference, torch.zeros(1, 3).long(), weights, variant="ff", alpha=4.0)
    losses.sum().backward()
    away = torch.tensor([0.5, 0.3 - 0.75, 0.2 - 0.25], dtype=torch.float64)  # p - d
    kept = torch.tensor([0.5 - 0.6, 0.0, 0.2 - 0.1], dtype=torch.float64)
    torch.testing.assert_close(logits.grad[0], torch.stack([4 * away, 8 * away, kept]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_is_dense(variant):
    generator = torch.Generator().manual_seed(0)
    states, weight, other = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (4, 4, 4))
    token_ids = torch.randint(0, 6, (6,), generator=generator)
    weights = torch.tensor([1.0, -2.5, -1.0, 0.5, -0.25, 1.0])
    grads = []
    for fused in (True, False):
        own = states.clone().requires_grad_()
        if fused:
            head = ref_head = OutputHead(weight, None, 1.0, None)
            scores = fused_negative_loss(own, head, other, ref_head, token_ids, weights, Objective(variant, alpha=3.0))
            total, losses = scores.total, scores.losses
        else:
            logits, reference = (x.float() @ weight.float().T for x in (own, other))
            tokens = token_ids[None], weights[None]
            losses = targeted_negative_loss(logits[None], reference[None], *tokens, variant=variant, alpha=3.0)[0]
            total = losses.sum()
        total.backward()
        grads.append((losses.detach().float(), own.grad.float()))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("text", "spans", "words"),
    [
        ("A damn fine, awful day.", [[2, 6], [13, 18]], ("damn", "awful")),
        ("くそ！ひどい日だ。", [[0, 2], [3, 6]], ("くそ", "ひどい")),
    ],
)
class TestTokens:
    def rows(self, text, spans, severities):
        return Dataset.from_list([
            {"prompt": "Q", "completion": text, "negative_spans": spans, "severities": severities},
            {"prompt": "Q", "completion": "fine", "negative_spans": [], "severities": None},
        ])  # fmt: skip

    def test_each_span_has_its_own(self, tiny_tokenizer, text, spans, words):
        plain = prepare_rows(self.rows(text, spans, None), tiny_tokenizer, max_length=None)
        weighed = prepare_rows(self.rows(text, spans, [2, 0.5]), tiny_tokenizer, max_length=None)
        ones, own = plain[0]["token_weights"], weighed[0]["token_weights"]
        assert all(isinstance(weight, int) for weight in ones) and set(ones) == {0, 1, -1}
        assert [w > 0 for w in ones] == [w > 0 for w in own] and set(own) == {0.0, 1.0, -2.0, -0.5}
        for severity, word in zip((-2.0, -0.5), words, strict=True):
            ids = [i for i, w in zip(weighed[0]["input_ids"], own, strict=True) if w == severity]
            assert tiny_tokenizer.decode(ids).strip() == word

    def test_where_spans_overlap_the_worst_counts(self, tiny_tokenizer, text, spans, words):
        rows = self.rows(text, [spans[0], spans[0]], [0.5, 3])
        assert min(prepare_rows(rows, tiny_tokenizer, max_length=None)[0]["token_weights"]) == -3.0

    @pytest.mark.parametrize("bad", [[1.0], [1.0, 0.0], "ab", [1.0, float("inf")], [[1.0], [2.0]]])
    def test_what_is_none(self, tiny_tokenizer, text, spans, words, bad):
        from trl_extensions.tnt.data import encode_text_row

        given = {"prompt": "Q", "completion": text, "negative_spans": spans, "severities": bad}
        with pytest.raises(ValueError, match=r"train row 0: `severities` must be a list with one number above 0"):
            encode_text_row(given, tiny_tokenizer, "train row 0")


def test_the_trainer_weighs_them(rows, make_trainer, tiny_model):
    severe = Dataset.from_list([r | {"severities": [5.0] * len(r["negative_spans"])} for r in rows])
    first = []
    for dataset, alpha in ((severe, 2.0), (rows, 10.0), (rows, 2.0)):
        trainer = make_trainer(dataset, alpha=alpha, max_steps=1, per_device_train_batch_size=6, learning_rate=0.0)
        expected = plain_loss(tiny_model, tiny_model, trainer.train_dataset, variant="ff", alpha=alpha)
        trainer.train()
        first.append(trainer.state.log_history[0]["loss"])
        assert float(first[-1]) == pytest.approx(expected.item(), rel=1e-4)
    assert float(first[0]) == pytest.approx(float(first[1]), rel=1e-5) and float(first[0]) > 2 * float(first[2])


@pytest.mark.parametrize(("bad", "worse"), [("damn", "bloody hell"), ("くそ", "ばかやろう")])
def test_candidates_give_theirs_to_what_is_marked(tmp_path, bad, worse):
    entries = [Candidate(bad, severity=2.0, variants=(f"{bad} it",)), Candidate(worse, severity=5.0)]
    write_candidates(tmp_path / "candidates.yaml", entries)
    arguments = AnnotatorArguments(candidates=str(tmp_path / "candidates.yaml"))
    texts = [f"{bad} it", f"{worse}! {bad}", "fine"]
    given = [{"id": str(i), "prompt": "Q", "completion": text} for i, text in enumerate(texts)]
    annotate_rows(given, arguments.build(), tmp_path / "annotated.jsonl")
    made = [json.loads(line) for line in (tmp_path / "annotated.jsonl").read_text().splitlines()]
    assert [row.get("severities") for row in made] == [[2.0], [5.0, 2.0], None]
    assert {mark["label"] for mark in made[0]["annotations"]} == {bad}  # a form counts with its candidate
    logs = [LogRow(i, "Q", text, text) for i, text in enumerate(texts)]
    assert [row.get("severities") for row in rows_from_logs(logs, entries)] == [[2.0], [5.0, 2.0], None]
    # Marked again, by nobody else, they stay
    annotate_rows(made, [], tmp_path / "again.jsonl")
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [row.get("severities") for row in again] == [[2.0], [5.0, 2.0], None]
    assert arguments.settings()["candidates"] == {bad: 2.0, f"{bad} it": 2.0, worse: 5.0}


@pytest.mark.parametrize(("bad", "other"), [("damn", "bloody"), ("くそ", "ばか")])
def test_given_severities_stay_with_their_spans(tmp_path, bad, other):
    text = f"x {bad} y {other} z {bad}"
    places = [[text.index(other), text.index(other) + len(other)], [2, 2 + len(bad)]]  # not in order
    row = {"id": "0", "prompt": "Q", "completion": text, "negative_spans": places, "severities": [3.0, 0.5]}
    for annotators, expected in ([[], [0.5, 3.0]], [[PhraseAnnotator([bad])], [1.0, 3.0, 1.0]]):
        path = tmp_path / f"{len(annotators)}.jsonl"
        annotate_rows([row], annotators, path)
        [made] = read_jsonl(path)
        assert made["negative_spans"] == sorted(made["negative_spans"]) and made["severities"] == expected
    again = tmp_path / "again.jsonl"
    annotate_rows([made | {"severities": [1.0, 4.0, 1.0]}], [], again)  # edited by hand
    assert read_jsonl(again)[0]["severities"] == [1.0, 4.0, 1.0]
    with pytest.raises(ValueError, match="row '0': `severities` must be a list"):
        annotate_rows([row | {"severities": [0.0, 1.0]}], [], tmp_path / "bad.jsonl")


def test_what_is_left_of_each_by_hand():
    def marked(index, text, *marks):
        own = answer(index, text, *([0, 1] for _ in marks))
        return own | {"annotations": [{"label": label, "severity": severity} for label, severity in marks]}

    before = [
        marked(0, "a", ("worst", 5.0)), marked(1, "b", ("mild", 1.0)), marked(2, "c", ("mild", 1.0), ("worst", 5.0)),
        answer(3, "d", [0, 1]),  # marked by somebody who gave neither
    ]  # fmt: skip
    after = [marked(0, "a"), marked(1, "b", ("mild", 1.0)), marked(2, "c", ("mild", 1.0)), answer(3, "d")]
    left = residual(before, after)
    assert [(c["label"], c["severity"]) for c in left] == [("worst", 5.0), ("mild", 1.0)]  # 5 x 2, 1 x 2
    assert [(c["original"]["value"], c["patched"]["value"]) for c in left] == [(0.5, 0.0), (0.5, 0.5)]
    assert (left[0]["patched"]["low"], left[0]["patched"]["high"]) == wilson(0, 4)
    # (5 + 1 + 5 + 1) / 4 and (1 + 1) / 4: of what was there, weighed, 10 / 12 are gone, unweighed 2 / 4
    assert (unwanted(before)["severity"]["value"], unwanted(after)["severity"]["value"]) == (3.0, 0.5)
    assert (unwanted(before)["share"]["value"], unwanted(after)["share"]["value"]) == (1.0, 0.5)
