"""What a running sweep tells whoever watches: a console, a test, a program reading JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lorasweep.core.outcomes import TrialFacts, TrialRecord
from lorasweep.core.plans import ParameterValue


@dataclass(frozen=True, slots=True)
class Said:
    """A sentence for people about what is being done."""

    message: str


@dataclass(frozen=True, slots=True)
class Warned:
    """A sentence about something that weakens the result or surprises."""

    message: str


@dataclass(frozen=True, slots=True)
class SweepStarted:
    """The loop begins.

    Attributes:
        name: The sweep's name.
        objective: Name of the metric to maximise.
        total: Trials in all.
        earlier: Trials that earlier commands have finished.
        engine: Which engine trains, and why, in a few words.
    """

    name: str
    objective: str
    total: int
    earlier: tuple[TrialRecord, ...]
    engine: str


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """A point was asked for and its training begins.

    Attributes:
        number: The trial's number.
        parameters: Sampled values.
        epochs: Epochs of its budget.
        retry_of: Number of the interrupted trial it takes up; None for a new point.
    """

    number: int
    parameters: Mapping[str, ParameterValue]
    epochs: int
    retry_of: int | None = None


@dataclass(frozen=True, slots=True)
class TrialReady:
    """The trial's model is built."""

    number: int
    facts: TrialFacts


@dataclass(frozen=True, slots=True)
class TrialStepped:
    """A training loss is known."""

    number: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class LanesShrank:
    """Fewer trials are trained at once from now on; those that have no place wait as they are.

    Attributes:
        lanes: How many, at most.
        why: In a few words.
    """

    lanes: int
    why: str


@dataclass(frozen=True, slots=True)
class TrialEvaluated:
    """An epoch was scored on the validation split.

    Attributes:
        number: The trial's number.
        epoch, epochs: Epochs done, and of its budget.
        score: The objective at this epoch.
        best: Whether it is the trial's best epoch so far.
        metrics: All validation metrics.
    """

    number: int
    epoch: int
    epochs: int
    score: float
    best: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial is over; its record says how."""

    record: TrialRecord
    best: TrialRecord | None


@dataclass(frozen=True, slots=True)
class TrainingEnded:
    """No trial is running any more; what follows is the report, if any."""


Event = (
    Said
    | Warned
    | SweepStarted
    | TrialStarted
    | TrialReady
    | TrialStepped
    | LanesShrank
    | TrialEvaluated
    | TrialEnded
    | TrainingEnded
)
Listener = Callable[[Event], None]


def nobody(event: Event) -> None:
    """A listener that doesn't."""
    del event
