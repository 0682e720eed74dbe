"""A trial in a pack, and what a pack did."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from peft import PeftModel

from lorasweep.core.records import Outcome, TrialPlan, TrialState
from lorasweep.engines.packing import Progress
from lorasweep.model.lane_weights import LaneState
from lorasweep.model.packed_lora import LaneSettings


@dataclass(slots=True, eq=False)
class Lane:
    """A trial under way.

    Attributes:
        plan: The trial.
        progress: Steps done, rows to come.
        adapter: Its PEFT model without frozen weights: names and shapes to save by.
        settings: Scaling and dropout.
        began: ``time.perf_counter()`` at its start.
        losses: Losses since the last report.
        evaluated: Epochs whose evaluation is behind it.
        parked: Weights and moments while it has no place in the pack.
        outcome: How it ended; None while it runs.
    """

    plan: TrialPlan
    progress: Progress
    adapter: PeftModel
    settings: LaneSettings
    began: float
    losses: list[float] = field(default_factory=list)
    evaluated: int = 0
    parked: LaneState | None = None
    outcome: Outcome | None = None

    @property
    def due(self) -> bool:
        """Whether an epoch has ended that is not evaluated yet."""
        return self.outcome is None and self.progress.epochs_done > self.evaluated

    @property
    def seconds(self) -> float:
        """Wall time since it began."""
        return time.perf_counter() - self.began

    def end(self, state: TrialState, reason: str = "", trace: str = "") -> None:
        """Settle how it ended."""
        self.outcome = Outcome(
            self.plan.number, state, self.progress.step, self.seconds, reason, trace
        )


@dataclass(slots=True)
class PackUse:
    """What a pack did, for reports and benchmarks.

    Attributes:
        steps: Pack steps; each is one optimizer step of every lane in it.
        lane_steps: Optimizer steps of all trials.
        tokens: Real tokens of training and evaluation.
        attended: Tokens that attention computed for them, its padding included.
        halved: Times that memory ran out and the lanes were halved.
        bytes_per_lane: What one more lane takes at its longest batch; None until measured.
        idle_places: Sum over pack steps of places without a lane while plans remained.
    """

    steps: int = 0
    lane_steps: int = 0
    tokens: int = 0
    attended: int = 0
    halved: int = 0
    bytes_per_lane: int | None = None
    idle_places: int = 0
