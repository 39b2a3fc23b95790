"""The trainer's scoring against a plain loop: one sequence at a time, full logits, no batching."""

import pytest
import torch

from tests.conftest import make_tiny_model
from trl_extensions.core.modeling.chunked import chunked_kl, dense_kl, token_logps
from trl_extensions.core.modeling.head import last_hidden_states, output_head
from trl_extensions.sami.collator import DataCollatorForSAMI
from trl_extensions.sami.loss import sami_loss
from trl_extensions.sami.scores import rows_of, score_matched, score_pairs


ROWS = [
    {"prompt_input_ids": [[5, 6, 7], [8, 9, 10, 11, 12]], "completion_input_ids": [[20, 21], [22, 23, 24, 2]]},
    {"prompt_input_ids": [[30], [31, 32]], "completion_input_ids": [[33, 34, 35, 36, 37], [38]]},
]
THREE = {"prompt_input_ids": [[5, 6], [7], [8, 9, 10]], "completion_input_ids": [[11, 12], [13], [14, 15, 16]]}


def plain_logps(model, prompt, completion):
    """Log-probabilities of one completion's tokens from full logits of one unpadded sequence."""
    logits = model(torch.tensor([prompt + completion])).logits[0]
    logps = logits.log_softmax(-1)
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


LAYOUTS = pytest.mark.parametrize("share_prefix", [False, True])


@LAYOUTS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"attn_implementation": "eager"}])
def test_pairs_equal_the_plain_loop(reduction, overrides, share_prefix):
    model = make_tiny_model(64, **overrides)
    inputs = DataCollatorForSAMI(pad_token_id=0, share_prefix=share_prefix)(ROWS)
    logps, kl = score_pairs(model, inputs, reduction, None)
    assert kl is None
    expected = [
        getattr(plain_logps(model, prompt, completion), reduction)()
        for row in ROWS
        for prompt in row["prompt_input_ids"]
        for completion in row["completion_input_ids"]
    ]
    torch.testing.assert_close(logps, torch.stack(expected), atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_gradients_equal_the_plain_loop(share_prefix):
    ours, plain = make_tiny_model(64), make_tiny_model(64)
    inputs = DataCollatorForSAMI(pad_token_id=0, share_prefix=share_prefix)(ROWS)
    losses, _ = rows_of(*score_pairs(ours, inputs, "mean", None), inputs, beta=0.0)
    losses.sum().backward()
    for row in ROWS:
        matrix = torch.stack(
            [
                torch.stack(
                    [plain_logps(plain, prompt, completion).mean() for completion in row["completion_input_ids"]]
                )
                for prompt in row["prompt_input_ids"]
            ]
        )
        sami_loss(matrix).backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


@LAYOUTS
def test_queries_of_different_c_share_a_batch(share_prefix):
    model = make_tiny_model(64)
    collator = DataCollatorForSAMI(pad_token_id=0, share_prefix=share_prefix)
    together = collator([ROWS[0], THREE])
    losses, _ = rows_of(*score_pairs(model, together, "mean", None), together, beta=0.0)
    for i, row in enumerate([ROWS[0], THREE]):
        alone = collator([row])
        loss, _ = rows_of(*score_pairs(model, alone, "mean", None), alone, beta=0.0)
        assert losses[i].item() == pytest.approx(loss.item(), abs=1e-5)


@LAYOUTS
def test_kl_equals_full_distributions_and_ignores_padding(share_prefix):
    policy, original = make_tiny_model(64, seed=0), make_tiny_model(64, seed=1)
    inputs = DataCollatorForSAMI(pad_token_id=0, pad_to_multiple_of=16, share_prefix=share_prefix)(ROWS)
    with torch.no_grad():
        reference = score_matched(original, inputs)
    logps, kl = score_pairs(policy, inputs, "mean", reference)
    for row, losses in zip(ROWS, kl.split([2, 2]), strict=True):
        for prompt, completion, value in zip(
            row["prompt_input_ids"], row["completion_input_ids"], losses, strict=True
        ):
            ids = torch.tensor([prompt + completion])
            p = policy(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
            q = original(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
            assert value.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    # a query's KL is the mean over its response tokens: 2 and 4 tokens in the first row
    _, statistics = rows_of(logps, kl, inputs, beta=0.0)
    assert statistics["kl"][0].item() == pytest.approx(((2 * kl[0] + 4 * kl[1]) / 6).item(), rel=1e-5)


def test_beta_adds_kl_to_the_loss():
    policy, original = make_tiny_model(64, seed=0), make_tiny_model(64, seed=1)
    inputs = DataCollatorForSAMI(pad_token_id=0)(ROWS)
    with torch.no_grad():
        reference = score_matched(original, inputs)
        scores = score_pairs(policy, inputs, "mean", reference)
    without, statistics = rows_of(*scores, inputs, beta=0.0)
    with_kl, _ = rows_of(*scores, inputs, beta=0.5)
    torch.testing.assert_close(with_kl, without + 0.5 * statistics["kl"])


def test_statistics_by_hand():
    # one query: responses of 1 and 3 tokens; row 0 prefers its own response, row 1 the other one's
    matrix = torch.tensor([[-1.0, -2.0], [-1.5, -3.0]])
    inputs = {
        "num_constitutions": torch.tensor([2]),
        "matched": torch.tensor([True, False, False, True]),
        "pair_ids": torch.tensor([[-1, 0, -1, -1], [-1, 1, 1, 1], [-1, 2, -1, -1], [-1, 3, 3, 3]]),
    }
    _, row = rows_of(matrix.flatten(), None, inputs, beta=0.0)
    assert {name: value.item() for name, value in row.items() if name != "mi/bound"} == {
        "mi/accuracy_rows": 0.5,  # row 0: -1 > -2 right; row 1: -1.5 > -3 wrong
        "mi/accuracy_columns": 0.5,  # column 0: -1 > -1.5 right; column 1: -2 > -3 wrong
        "logps/matched": -2.0,
        "logps/mismatched": -1.75,
        "completions/mean_length": 2.0,
        "completions/min_length": 1.0,
        "completions/max_length": 3.0,
    }


def test_layout_of_a_shared_prompt_by_hand():
    row = {"prompt_input_ids": [[5, 6], [7]], "completion_input_ids": [[8], [9, 10]]}
    batch = DataCollatorForSAMI(pad_token_id=0, share_prefix=True)([row])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "num_constitutions": [2],
        "input_ids": [[5, 6, 8, 9, 10], [7, 8, 9, 10, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "pair_ids": [[-1, -1, 0, 1, 1], [-1, 2, 3, 3, -1]],
        "position_ids": [[0, 1, 2, 2, 3], [0, 1, 1, 2, 0]],
        "matched": [True, False, False, True],
    }


class TestChunkedAgainstDense:
    @pytest.mark.parametrize("reverse", [True, False])
    @pytest.mark.parametrize("extras", [{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.25}])
    def test_value_and_gradient(self, reverse, extras):
        policy, original = make_tiny_model(64, seed=0), make_tiny_model(64, seed=1)
        for name, value in extras.items():
            setattr(policy.config, name, value)
        ids = torch.arange(3, 15).view(2, 6)
        scored = torch.zeros(2, 6, dtype=torch.bool)
        scored[0, 2:], scored[1, 4:] = True, True
        states = last_hidden_states(policy, input_ids=ids)[:, :-1][scored[:, 1:]].detach().requires_grad_()
        with torch.no_grad():
            ref_states = last_hidden_states(original, input_ids=ids)[:, :-1][scored[:, 1:]]
        head, ref_head = output_head(policy, states), output_head(original, ref_states)

        logits = states @ policy.lm_head.weight.T * extras.get("logit_scale", 1.0)
        if "final_logit_softcapping" in extras:
            logits = 3.0 * (logits / 3.0).tanh()
        dense = dense_kl(logits, ref_states @ original.lm_head.weight.T, reverse=reverse)
        chunked = chunked_kl(states, head, ref_states, ref_head, reverse=reverse)
        torch.testing.assert_close(chunked, dense, atol=1e-5, rtol=1e-5)
        expected = torch.autograd.grad(dense.sum(), states)[0]
        torch.testing.assert_close(torch.autograd.grad(chunked.sum(), states)[0], expected, atol=1e-5, rtol=1e-4)

        logps = logits.log_softmax(-1).gather(-1, ids[scored][:, None])[:, 0]
        torch.testing.assert_close(token_logps(states, head, ids[scored]), logps, atol=1e-5, rtol=1e-5)

    def test_dense_kl_by_hand(self):
        p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
        # 0.5 log 2 + 0.25 log 1 + 0.25 log(1/2) = 0.25 log 2, and the same the other way round by symmetry
        assert dense_kl(p, q, reverse=True).item() == pytest.approx(0.25 * 0.6931472, abs=1e-6)
        p = torch.tensor([0.5, 0.5]).log()
        q = torch.tensor([0.8, 0.2]).log()
        assert dense_kl(p, q, reverse=False).item() == pytest.approx(
            0.8 * torch.tensor(1.6).log().item() + 0.2 * torch.tensor(0.4).log().item(), abs=1e-6
        )
