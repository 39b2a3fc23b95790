"""Numbers by hand on three tokens, limits, and the fused path against the dense one."""

import itertools
import math

import pytest
import torch

from trl_extensions.core.modeling.head import OutputHead
from trl_extensions.tnt import fused_loss
from trl_extensions.tnt.fused_loss import Objective, fused_negative_loss
from trl_extensions.tnt.loss import VARIANTS, targeted_negative_loss


P, Q = (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)
LN = math.log
EPS = 1e-6
# Token 0 is written. Without it q becomes (0, 3/4, 1/4).
UNWANTED = {
    "forward": 0.75 * LN(0.75 / 0.3) + 0.25 * LN(0.25 / 0.2),
    "reverse": 0.5 * LN(0.5 / EPS)
    + 0.3 * LN(0.3 / (0.75 * (1 - EPS)))
    + 0.2 * LN(0.2 / (0.25 * (1 - EPS))),
    "unlikelihood": -LN(0.5),
    "negative_likelihood": LN(0.5),
}  # fmt: skip
KEPT = {
    "forward": 0.6 * LN(0.6 / 0.5) + 0.1 * LN(0.1 / 0.2),
    "reverse": 0.5 * LN(0.5 / 0.6) + 0.2 * LN(0.2 / 0.1),
    "likelihood": -LN(0.5),
}


def logits_of(*probabilities, dtype=torch.float64):
    return torch.tensor(probabilities, dtype=dtype).log()[None]


def loss(p, q, tokens, weights, **settings):
    return targeted_negative_loss(p, q, torch.tensor([tokens]), torch.tensor([weights]), **settings)


def random_case(dtype=torch.float64, tokens=12, vocabulary=7, hidden=5, seed=0):
    """States, heads and a mix of kept, unwanted and unscored tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weights = torch.tensor(([1, -1, 0, 1] * tokens)[:tokens])
    return {
        "states": normal(tokens, hidden),
        "weight": normal(vocabulary, hidden),
        "ref_states": normal(tokens, hidden + 1),
        "ref_weight": normal(vocabulary, hidden + 1),
        "token_ids": torch.randint(0, vocabulary, (tokens,), generator=generator),
        "weights": weights,
    }


class TestByHand:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_three_tokens(self, variant, dtype):
        unwanted, kept = VARIANTS[variant]
        p, q = logits_of(P, P, P, dtype=dtype), logits_of(Q, Q, Q, dtype=dtype)
        value = loss(p, q, [0, 0, 0], [-1, 1, 0], variant=variant, alpha=3.0)
        assert value.dtype == dtype
        assert value[0].tolist() == pytest.approx([3 * UNWANTED[unwanted], KEPT[kept], 0.0], abs=1e-5)

    def test_smoothing_over_the_vocabulary(self):
        # The target (0, 3/4, 1/4) plus 0.1 everywhere, over 1.3; kept: q plus 0.1 everywhere, over 1.3
        unwanted = sum(p * LN(p / ((d + 0.1) / 1.3)) for p, d in zip(P, (0, 0.75, 0.25), strict=True))
        kept = sum(p * LN(p / ((q + 0.1) / 1.3)) for p, q in zip(P, Q, strict=True))
        value = loss(
            logits_of(P, P), logits_of(Q, Q), [0, 0], [-1, 1],
            variant="rr", smoothing=0.1, smooth_over="vocabulary",
        )  # fmt: skip
        assert value[0].tolist() == pytest.approx([unwanted, kept], abs=1e-9)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_logits_may_be_shifted(self, variant):
        p, q = logits_of(P, P), logits_of(Q, Q)
        expected = loss(p, q, [0, 0], [-1, 1], variant=variant)
        torch.testing.assert_close(loss(p + 1e3, q - 1e3, [0, 0], [-1, 1], variant=variant), expected)


class TestAtTheOriginal:
    @pytest.mark.parametrize("variant", ["ff", "rr", "rf"])
    def test_kept_tokens_have_neither_loss_nor_gradient(self, variant):
        p = logits_of(Q, Q).requires_grad_()
        value = loss(p, logits_of(Q, Q), [0, 2], [1, 1], variant=variant)
        (grad,) = torch.autograd.grad(value.sum(), p)
        assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12

    def test_unwanted_tokens_cost_the_mass_they_leave(self):
        # Sum over j != y of q_j / (1 - q_y) * log(1 / (1 - q_y))
        value = loss(logits_of(Q, Q), logits_of(Q, Q), [0, 2], [-1, -1], variant="ff")
        assert value[0].tolist() == pytest.approx([-LN(0.4), -LN(0.9)], abs=1e-9)

    @pytest.mark.parametrize("variant", ["ff", "rr"])
    def test_the_optimum_is_the_renormalised_original(self, variant):
        logits, q = logits_of(P, P).requires_grad_(), logits_of(Q, Q)
        optimizer = torch.optim.LBFGS([logits], lr=0.5, max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16)

        def closure():
            optimizer.zero_grad()
            value = loss(logits, q, [0, 1], [-1, 1], variant=variant).sum()
            value.backward()
            return value

        optimizer.step(closure)
        unwanted, kept = logits.softmax(-1)[0].tolist()
        assert unwanted == pytest.approx([0, 0.75, 0.25], abs=1e-3)
        assert kept == pytest.approx(Q, abs=1e-4)
        assert closure().item() == pytest.approx(0, abs=1e-3)


# Logits of the policy and of the original; token 0 is written
CASES = {
    "original certain of the banned token": ((5.0, 1.0, 0.0), (200.0, 0.0, 0.0)),
    "original leaves nothing else": ((5.0, 1.0, 0.0), (0.0, -math.inf, -math.inf)),
    "policy already at zero": ((-300.0, 1.0, 0.0), (1.0, 1.0, 1.0)),
    "policy rules the token out": ((-math.inf, 1.0, 0.0), (1.0, 1.0, 1.0)),
    "policy certain of the token": ((300.0, 1.0, 0.0), (1.0, 1.0, 1.0)),
    "policy leaves nothing else": ((0.0, -math.inf, -math.inf), (1.0, 1.0, 1.0)),
    "original rules a kept token out": ((0.0, 1.0, 0.0), (-math.inf, 1.0, 1.0)),
}


class TestLimits:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("smooth_over", ["banned", "vocabulary"])
    def test_finite_with_finite_gradients(self, variant, case, smooth_over):
        policy, original = (torch.tensor([[row, row, row]]) for row in CASES[case])
        policy.requires_grad_()
        value = loss(policy, original, [0, 0, 0], [-1, 1, 0], variant=variant, smooth_over=smooth_over)
        (grad,) = torch.autograd.grad(value.sum(), policy)
        assert value.isfinite().all() and grad.isfinite().all()
        assert value[0, 2] == 0 and not grad[0, 2].any()

    def test_a_certain_original_still_says_what_else_it_would_write(self):
        # The banned token has all but e^-200 of the mass; the other two still stand 3 : 1
        original = torch.tensor([[[200.0, LN(3), 0.0]]])
        value = loss(logits_of(P, dtype=torch.float32), original, [0], [-1], variant="ff")
        assert value.item() == pytest.approx(UNWANTED["forward"], abs=1e-6)

    def test_nothing_scored(self):
        p = logits_of(P).requires_grad_()
        value = loss(p, logits_of(Q), [0], [0], variant="ff")
        assert value.tolist() == [[0.0]]
        assert not value.requires_grad or not torch.autograd.grad(value.sum(), p)[0].any()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"variant": "fr"}, "`variant` must be one of ff, rr, rf, fll, rll, ul, nl, got 'fr'"),
            ({"variant": "ff", "alpha": 0}, "`alpha` must be a number above 0, got 0"),
            ({"variant": "ff", "alpha": math.nan}, "`alpha`"),
            ({"variant": "ff", "smoothing": 0.0}, "`smoothing`"),
            ({"variant": "ff", "smooth_over": "all"}, "`smooth_over` must be one of banned, vocabulary"),
        ],
    )
    def test_settings_without_meaning(self, settings, message):
        with pytest.raises(ValueError, match=message):
            loss(logits_of(P), logits_of(Q), [0], [-1], **settings)

    def test_shapes(self):
        with pytest.raises(ValueError, match="shapes differ"):
            loss(logits_of(P), logits_of(Q, Q), [0], [-1], variant="ff")


def dense(case, head, ref_head, objective):
    """Loss, and gradients in states, weight and bias, through the definition in `tnt.loss`."""
    leaves = [tensor.clone().requires_grad_() for tensor in (case["states"], head.weight, head.bias)]
    ref_logits = project(case["ref_states"], ref_head.weight, ref_head.bias, ref_head)
    losses = targeted_negative_loss(
        project(leaves[0], leaves[1], leaves[2], head)[None], ref_logits[None], case["token_ids"][None],
        case["weights"][None], **vars(objective),
    )[0]  # fmt: skip
    return losses, torch.autograd.grad(losses.sum() * 0.7, leaves)


def project(states, weight, bias, head):
    logits = head.scale * (states @ weight.T + bias)
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def assert_fused_is_dense(case, objective, scale=1.0, softcap=None):
    generator = torch.Generator().manual_seed(9)
    bias = torch.randn(len(case["weight"]), generator=generator, dtype=torch.float64)
    head = OutputHead(case["weight"], bias, scale, softcap)
    ref_head = OutputHead(case["ref_weight"], -bias, 2.0, None)
    expected, expected_grads = dense(case, head, ref_head, objective)
    leaves = [t.float().requires_grad_() for t in (case["states"], head.weight, head.bias)]
    scored = case["weights"] != 0
    scores = fused_negative_loss(
        leaves[0][scored], OutputHead(leaves[1], leaves[2], scale, softcap), case["ref_states"][scored].float(),
        OutputHead(ref_head.weight.float(), ref_head.bias.float(), 2.0, None), case["token_ids"][scored],
        case["weights"][scored], objective,
    )  # fmt: skip
    torch.testing.assert_close(scores.losses.double(), expected[scored], atol=1e-5, rtol=1e-5)
    assert scores.total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    grads = torch.autograd.grad(scores.total * 0.7, leaves)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    return scores


class TestFused:
    @pytest.mark.parametrize("chunk", [7, 21, 10**6])
    @pytest.mark.parametrize("smooth_over", ["banned", "vocabulary"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_equals_the_definition(self, variant, smooth_over, chunk, monkeypatch):
        monkeypatch.setattr(fused_loss, "_CHUNK_ELEMENTS", chunk)  # one row, three rows, everything
        assert_fused_is_dense(random_case(), Objective(variant, 2.5, 1e-3, smooth_over))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_scaled_and_capped_logits(self, variant):
        assert_fused_is_dense(random_case(seed=1), Objective(variant, 1.5), scale=0.5, softcap=2.0)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_an_original_certain_of_the_banned_token(self, variant):
        case = random_case(seed=2)
        # Its logit lies about 60 above the rest: float32 has 1 - q_y = 0
        for t, token in enumerate(case["token_ids"]):
            direction = case["ref_weight"][token]
            case["ref_states"][t] += direction * 30 / direction.dot(direction)
        assert_fused_is_dense(case, Objective(variant))

    def test_a_second_backward_is_refused(self):
        # The first one scales the gradients in place
        case = random_case()
        scored = case["weights"] != 0
        states, ref_states = (case[name][scored].float() for name in ("states", "ref_states"))
        heads = [OutputHead(case[name].float(), None, 1.0, None) for name in ("weight", "ref_weight")]
        total = fused_negative_loss(
            states.requires_grad_(), heads[0], ref_states, heads[1], case["token_ids"][scored],
            case["weights"][scored], Objective(),
        ).total  # fmt: skip
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="taken before"):
            total.backward()

    def test_statistics(self):
        case = random_case(seed=3)
        scores = assert_fused_is_dense(case, Objective("ul"))
        generator = torch.Generator().manual_seed(9)
        bias = torch.randn(7, generator=generator, dtype=torch.float64)
        p = (case["states"] @ case["weight"].T + bias).softmax(-1)
        q = (2 * (case["ref_states"] @ case["ref_weight"].T - bias)).softmax(-1)
        rows = (case["weights"] != 0).nonzero()[:, 0].tolist()
        for place, row in enumerate(rows):
            y, target = case["token_ids"][row], q[row].clone()
            if case["weights"][row] < 0:
                target[y] = 0
                target /= target.sum()
            kl = sum(d * math.log(d / c) for d, c in zip(target.tolist(), p[row].tolist(), strict=True) if d)
            assert scores.divergence[place].item() == pytest.approx(kl, abs=1e-5)
            assert scores.entropy[place].item() == pytest.approx(-(p[row] * p[row].log()).sum().item(), abs=1e-5)
            assert scores.logps[place].item() == pytest.approx(p[row, y].log().item(), abs=1e-5)
            assert scores.ref_logps[place].item() == pytest.approx(q[row, y].log().item(), abs=1e-4)

    @pytest.mark.parametrize("variant", ["ff", "rr"])
    def test_half_precision_rounds_the_projection_only(self, variant):
        # States and weights that bfloat16 holds exactly: autocast must then change nothing
        case = random_case(seed=4)
        case |= {name: case[name].bfloat16().double() for name in ("states", "weight", "ref_states", "ref_weight")}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head = OutputHead(case["weight"].float(), None, 1.0, None)
            ref_head = OutputHead(case["ref_weight"].float(), None, 1.0, None)
            rows = case["weights"] != 0
            scores = fused_negative_loss(
                case["states"][rows].float(), head, case["ref_states"][rows].float(), ref_head,
                case["token_ids"][rows], case["weights"][rows], Objective(variant),
            )  # fmt: skip
        logits, ref_logits = case["states"] @ case["weight"].T, case["ref_states"] @ case["ref_weight"].T
        expected = targeted_negative_loss(
            logits[None], ref_logits[None], case["token_ids"][None], case["weights"][None], variant=variant
        )[0][rows]
        torch.testing.assert_close(scores.losses.double(), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("with_states", "with_weight"), itertools.product([True, False], repeat=2))
    def test_only_wanted_gradients(self, with_states, with_weight):
        case = {name: t.float() if t.is_floating_point() else t for name, t in random_case().items()}
        case["weights"] = case["weights"].clamp_min(-1).where(case["weights"] != 0, 1)
        states, weight = case["states"].requires_grad_(with_states), case["weight"].requires_grad_(with_weight)
        scores = fused_negative_loss(
            states, OutputHead(weight, None, 1.0, None), case["ref_states"],
            OutputHead(case["ref_weight"], None, 1.0, None), case["token_ids"], case["weights"], Objective(),
        )  # fmt: skip
        assert scores.total.requires_grad == (with_states or with_weight)
        if scores.total.requires_grad:
            scores.total.backward()
        assert [states.grad is not None, weight.grad is not None] == [with_states, with_weight]

    def test_no_scored_token_keeps_the_graph(self):
        case = random_case()
        states = case["states"][:0].float().requires_grad_()
        head = OutputHead(case["weight"].float().requires_grad_(), None, 1.0, None)
        scores = fused_negative_loss(
            states, head, case["ref_states"][:0].float(), head, case["token_ids"][:0], case["weights"][:0], Objective()
        )
        scores.total.backward()
        assert scores.total.item() == 0 and not head.weight.grad.any()

    def test_other_vocabularies_are_refused(self):
        case = random_case()
        with pytest.raises(ValueError, match="a vocabulary of 7 tokens, the reference one of 6"):
            fused_negative_loss(
                case["states"], OutputHead(case["weight"], None, 1.0, None), case["ref_states"],
                OutputHead(case["ref_weight"][:6], None, 1.0, None), case["token_ids"], case["weights"], Objective(),
            )  # fmt: skip
