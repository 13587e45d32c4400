"""Every sample once, whatever the number of processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfx.errors import TrainingError
from splitfx.train.data.batches import Process, shares


@given(st.integers(8, 200), st.integers(1, 50), st.integers(1, 4), st.integers(0, 5))
def test_every_sample_once(samples: int, batch: int, count: int, seed: int) -> None:
    parts = [shares(samples, batch, seed, Process(rank, count)) for rank in range(count)]
    assert sorted(i for mine in parts for part, _ in mine for i in part) == list(range(samples))
    assert len({len(mine) for mine in parts}) == 1
    for together in zip(*parts, strict=True):
        assert min(len(part) for part, _ in together) >= 2
        assert sum(share for _, share in together) == pytest.approx(count)
    one = shares(samples, max(batch, 2 * count), seed, Process())
    together = [sorted(i for part, _ in step for i in part) for step in zip(*parts, strict=True)]
    if len(one) == len(together):
        assert together == [sorted(part) for part, _ in one]


def test_too_few() -> None:
    with pytest.raises(TrainingError, match="3 training samples are too few for 2 processes"):
        shares(3, 2, 0, Process(0, 2))
