"""Which texts go together, by hand."""

from trl_extensions.core.modeling.batches import plan_batches


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
