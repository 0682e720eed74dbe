"""A trial in a pack, and what a pack did."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftModel

from lorasweep.core.outcomes import EpochEvaluation, Outcome, StepReport, TrialState
from lorasweep.core.plans import TrialPlan
from lorasweep.engines.packing import Progress
from lorasweep.model.lane_weights import LaneState
from lorasweep.model.packed_batch import PackedBatch
from lorasweep.model.packed_lora import LaneSettings


@dataclass(slots=True, eq=False)
class Lane:
    """A trial under way.

    Attributes:
        plan: The trial.
        progress: Steps done, rows to come.
        adapter: Its PEFT model without frozen weights: names and shapes to save by.
        settings: Scaling and dropout.
        began: ``time.perf_counter()`` at its start, put back by what a checkpoint counts.
        losses: Losses since the last report.
        evaluated: Epochs whose evaluation is behind it.
        kept: Epoch whose weights :attr:`adapter` holds, the best so far; None before the first.
        told: All that the reporter knows of its training, in order, for a trial that goes on.
        resumed: Steps taken over from a checkpoint.
        saved: The :attr:`mark` that can be gone on from: a checkpoint's, or that of the beginning.
        parked: Weights and moments while it is not in the pack; None where it begins.
        outcome: How it ended; None while it runs.
        place: Its number among those that train at the same time; it keeps it to its end.
        turn: Which of the run's plans it is, counted from 0; lanes of a pack lie in this order.
        clock: The pack's clock when it came this far.
        places: How many the pack had then; None for a lane that begins.
    """

    plan: TrialPlan
    progress: Progress
    adapter: PeftModel
    settings: LaneSettings
    began: float
    losses: list[float] = field(default_factory=list)
    evaluated: int = 0
    kept: int | None = None
    told: list[StepReport | EpochEvaluation] = field(default_factory=list)
    resumed: int = 0
    saved: tuple[int, int] = (0, 0)
    parked: LaneState | None = None
    outcome: Outcome | None = None
    place: int = 0
    turn: int = 0
    clock: int = 0
    places: int | None = None

    @property
    def due(self) -> bool:
        """Whether an epoch has ended that is not evaluated yet."""
        return self.outcome is None and self.progress.epochs_done > self.evaluated

    @property
    def mark(self) -> tuple[int, int]:
        """How far it is: steps done and epochs evaluated."""
        return self.progress.step, self.evaluated

    @property
    def seconds(self) -> float:
        """Wall time that it was under way, that before a checkpoint included."""
        return time.perf_counter() - self.began

    def note_step(
        self, step: int, rate: float, loss: float, norm: float, log_every: int
    ) -> StepReport | None:
        """Note the loss of a step whose update was made, or fail where it is no finite number.

        Args:
            step: Which of its steps it was, counted from 1; it may have made another since.
            rate: Of the step.
            loss: Of the step.
            norm: Of its gradient, before clipping.
            log_every: Steps between two reports.

        Returns:
            What the reporter is to be told now, if anything.
        """
        if self.outcome is not None:
            return None
        progress = self.progress
        if not math.isfinite(loss):
            progress.step = step - 1  # the last one that counts
            self.end(
                TrialState.FAILED,
                f"the training loss became {loss} at step {step} "
                f"of {progress.steps}; a lower learning rate may help",
            )
            return None
        self.losses.append(loss)
        if step % log_every and step < progress.steps:
            return None
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        report = StepReport(self.plan.number, step, progress.steps, mean, rate, norm)
        self.told.append(report)
        return report

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
        attended: Tokens computed for them, filling tokens and attention's padding included.
        halved: Times that memory ran out and the lanes were halved.
        bytes_per_lane: What the largest lane of the sweep takes; None until measured.
        idle_places: Sum over pack steps of places without a lane while plans remained.
        seconds: Wall time of all runs; that of reporter, plans and whoever takes the outcomes is
            in it.
        step_seconds: Wall time of the pack's steps, without telling their losses.
    """

    steps: int = 0
    lane_steps: int = 0
    tokens: int = 0
    attended: int = 0
    halved: int = 0
    bytes_per_lane: int | None = None
    idle_places: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0

    def count(self, parts: Sequence[PackedBatch], lanes: int, idle: int) -> None:
        """Add a pack step of so many lanes, with so many idle places."""
        self.steps += 1
        self.lane_steps += lanes
        self.idle_places += idle
        self.count_tokens(parts)

    def count_tokens(self, parts: Sequence[PackedBatch]) -> None:
        """Add the tokens of a pass, of all its parts."""
        self.tokens += sum(batch.tokens for batch in parts)
        self.attended += sum(batch.attended for batch in parts)

    def add_tokens(self, other: PackUse) -> None:
        """Add the tokens of another."""
        self.tokens += other.tokens
        self.attended += other.attended
