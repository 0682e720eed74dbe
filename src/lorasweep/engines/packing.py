"""Arithmetic of packing, free of any framework: rates, batches to come, lanes that fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import TrialPlan
from lorasweep.data.order import epoch_batches, steps_per_epoch

if TYPE_CHECKING:
    from numpy.typing import NDArray


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps over which the rate rises; transformers rounds the share up."""
    return math.ceil(warmup * steps)


def learning_rate(plan: TrialPlan, step: int, steps: int) -> float:
    """Rate of an optimizer step, as transformers' scheduler of that name has it.

    Args:
        plan: Names the schedule, the peak and the warm-up.
        step: Counted from 0.
        steps: Of the trial's whole budget.
    """
    warm = warmup_steps(plan.warmup, steps)
    if plan.scheduler == "constant":
        return plan.learning_rate
    if step < warm:
        return plan.learning_rate * step / max(1, warm)
    left = max(1, steps - warm)
    if plan.scheduler == "linear":
        return plan.learning_rate * max(0.0, (steps - step) / left)
    if plan.scheduler == "cosine":
        # transformers' cosine makes half a turn over the steps after warm-up.
        return plan.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warm) / left)))
    return plan.learning_rate


@dataclass(slots=True)
class Progress:
    """How far a trial is, and which rows are next: a function of its plan and the data alone.

    Attributes:
        plan: The trial.
        lengths: Tokens of each training row, ``(rows,)``.
        step: Optimizer steps done.
    """

    plan: TrialPlan
    lengths: NDArray[np.int64]
    step: int = 0
    _epoch: int = -1
    _batches: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return steps_per_epoch(len(self.lengths), self.plan.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole budget."""
        return self.plan.epochs * self.per_epoch

    @property
    def epochs_done(self) -> int:
        """Whole epochs done."""
        return self.step // self.per_epoch

    @property
    def ended(self) -> bool:
        """Whether the budget is spent."""
        return self.step >= self.steps

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.plan, self.step, self.steps)

    def next_rows(self) -> NDArray[np.int64]:
        """Rows of the next step."""
        epoch, at = divmod(self.step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = epoch_batches(self.lengths, self.plan.batch_size, self.plan.seed, epoch)
        return self._batches[at]


# Of the free bytes that a pack may take.
_SHARE = 0.6


def lanes_that_fit(free: int, per_lane: int, most: int) -> int:
    """Number of lanes for the memory at hand, at least one.

    Args:
        free: Bytes that are free with the base loaded.
        per_lane: Bytes that one more lane takes at its longest batch.
        most: Beyond this, more lanes are no faster.
    """
    return max(1, min(most, int(free * _SHARE) // max(1, per_lane)))


def lanes_fit(free: int, per_lane: int, lanes: int) -> bool:
    """Whether so many lanes, one included, have the memory that :func:`lanes_that_fit` wants."""
    return lanes * per_lane <= int(free * _SHARE)


def length_batches(split: EncodedSplit, rows: int) -> list[NDArray[np.int64]]:
    """Cut a split into batches of rows of like length, the longest first."""
    order = np.argsort(-split.lengths, kind="stable")
    return [order[at : at + rows] for at in range(0, len(order), rows)]
