"""The order in which a trial sees its rows: one pure function, shared by every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasweep.core.seeding import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows are shuffled, cut into pools of this many batches, and sorted by length inside a pool:
# wide enough that a batch's rows are nearly equally long, narrow enough that batches stay random.
_POOL_BATCHES = 50


def epoch_batches(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the row indices of every batch of one epoch, rows of like length together.

    Every row comes exactly once; only one batch may be smaller than ``batch_size``. The
    order of batches is random, so that short texts don't come before long ones.

    Args:
        lengths: Tokens in each row, ``(rows,)``.
        batch_size: Rows a batch, ≥ 1.
        seed: The trial's seed.
        epoch: Counted from 0; each epoch has an order of its own.
    """
    rng = np.random.default_rng(derive_seed(seed, "order", epoch))
    rows = rng.permutation(len(lengths))
    pool = batch_size * _POOL_BATCHES
    batches = []
    for start in range(0, len(rows), pool):
        members = rows[start : start + pool]
        # Stable, so that rows of equal length keep their random order.
        members = members[np.argsort(-lengths[members], kind="stable")]
        batches += [members[at : at + batch_size] for at in range(0, len(members), batch_size)]
    return [batches[at] for at in rng.permutation(len(batches))]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps in one epoch over ``rows`` rows."""
    return -(-rows // batch_size)
