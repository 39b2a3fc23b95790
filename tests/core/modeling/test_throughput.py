"""What stands beside a progress bar, by hand."""

import io

import pytest
from tqdm.auto import tqdm

from trl_extensions.core.modeling import batches
from trl_extensions.core.modeling.batches import Throughput, written_in


def test_rate_and_padding_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(batches.time, "perf_counter", lambda: now[0])
    out = io.StringIO()
    with tqdm(total=3, file=out) as bar:
        count = Throughput(bar)
        assert count.padding_share == 0
        now[0] = 102.0
        count.add([6, 4])  # 10 tokens in 2 s, laid out as 2 x 6
        assert bar.postfix == "5 tokens/s, 17% padding"
        now[0] = 104.0
        count.add([8])
        assert (count.tokens, count.laid_out) == (18, 20)
        assert count.padding_share == pytest.approx(0.1)
        bar.update(3)
    assert "10% padding" in out.getvalue()


def test_what_a_sampler_wrote():
    assert written_in(50, 4.0) == "50 tokens in 4.0 s (12 a second)"
    assert written_in(50, 4.0, 0.25) == "50 tokens in 4.0 s (12 a second, 25% padding)"
