"""The order of rows is a pure function, every row once, like lengths together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.data.order import epoch_batches, steps_per_epoch

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=300).map(np.array)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_every_row_once_and_one_small_batch_at_most(
    lengths: np.ndarray, size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sum(len(batch) < size for batch in batches) <= 1
    assert max(map(len, batches)) <= size
    assert len(batches) == steps_per_epoch(len(lengths), size)


def test_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = np.arange(200) % 17

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(lengths, 8, seed, epoch)).tolist()

    np.random.seed(0)
    first = order(1, 0)
    np.random.seed(1)
    assert order(1, 0) == first
    assert order(2, 0) != first
    assert order(1, 1) != first


def test_rows_of_like_length_are_together_and_short_ones_not_first() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 128, size=1600)
    batches = epoch_batches(lengths, 16, 3, 0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert lengths.sum() / padded > 0.9
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4
