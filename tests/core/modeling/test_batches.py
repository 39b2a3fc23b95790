"""Which texts go together, and what stands beside a progress bar, by hand."""

import pytest
import torch

from trl_extensions.core.modeling import batches
from trl_extensions.core.modeling.batches import eval_mode, in_batches, plan_batches, written_in


def test_plan_batches_by_hand():
    # Rows of 8, 5, 3 and 1 prompt tokens, 2 new ones each. Budget 14: 8+2 fills one batch (2 * 10 > 14);
    # 5+2 takes two rows (2 * 7 = 14); then 1+2 is alone.
    assert plan_batches([3, 8, 1, 5], 2, 14) == [[1], [3, 0], [2]]
    assert plan_batches([3, 8], 2, 1) == [[1], [0]], "a batch has one row at least"
    assert plan_batches([4, 4, 4], 1, 1000) == [[0, 1, 2]]
    assert plan_batches([], 1, 10) == []


def test_a_batch_that_is_only_read_holds_little_padding():
    # At most 4096 / 16 = 256 tokens. Behind 1000, 800 pads with 200 and 744 with 256 more; behind 744, 700 pads with
    # 44 and 500 with 244 more
    lengths = [1000, 744, 500, 800, 700]
    assert plan_batches(lengths, 0, 4096) == [[0, 3], [1, 4], [2]]
    assert plan_batches(lengths, 1, 8192) == [[0, 3, 1, 4, 2]], "writing, every batch more costs more"
    # One row of 1000 and two of 900 hold 200 tokens of padding; one more makes 300
    assert plan_batches([900, 1000, 900], 0, 4096, numbers=[2, 1, 1]) == [[1, 0], [2]]
    assert plan_batches([90, 100], 0, 499, numbers=[2, 3]) == [[1], [0]], "five rows of 100 are more than 499"


@pytest.mark.parametrize(
    ("numbers", "shown"), [(None, "9 tokens/s, 10% padding"), ([2, 1], "14 tokens/s, 7% padding")]
)
def test_rate_and_padding_by_hand(monkeypatch, capsys, numbers, shown):
    now = iter([100.0, 102.0])
    monkeypatch.setattr(batches.time, "perf_counter", lambda: next(now))
    # 18 tokens in 2 s, laid out as 2 x 10; with two rows of 10 tokens 28 of 30
    assert list(in_batches([10, 8], 64, "reading", numbers=numbers)) == [[0, 1]]
    assert shown in capsys.readouterr().err


def test_what_a_sampler_wrote():
    assert written_in(50, 4.0) == "50 tokens in 4.0 s (12 a second)"
    assert written_in(50, 4.0, 0.25) == "50 tokens in 4.0 s (12 a second, 25% padding)"


def test_in_batches_gives_every_text_once():
    assert list(in_batches([7, 8, 6], 16, "reading", progress=False)) == [[1, 0], [2]]


def test_eval_mode_leaves_modes_as_they_were():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()).eval())
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False, False]
