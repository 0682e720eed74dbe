"""A reporter that remembers all that an engine tells, and pulls the plug where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lorasweep.core.outcomes import EpochEvaluation, Outcome, StepReport, TrialFacts, Verdict

Told = StepReport | EpochEvaluation


def keep_nothing(evaluation: EpochEvaluation) -> Verdict:
    """For tests that look at numbers alone: no adapter is written."""
    return Verdict(keep=False, go_on=True)


@dataclass
class Recorder:
    """What was told, in order; the properties show it by trial, those told of alone.

    Attributes:
        answer: Gives the verdicts.
        stop: Told what comes next; where it says yes, that is not recorded but interrupts.
        events: ``(trial, facts)`` of each start, reports, evaluations, and the outcomes that a
            test adds.
        shrunk: Lanes, and why, whenever they became fewer.
    """

    answer: Callable[[EpochEvaluation], Verdict] = lambda evaluation: Verdict(True, True)
    stop: Callable[[Told], bool] = lambda told: False
    events: list[tuple[int, TrialFacts] | Told | Outcome] = field(default_factory=list)
    shrunk: list[tuple[int, str]] = field(default_factory=list)

    def started(self, trial: int, facts: TrialFacts) -> None:
        self.events.append((trial, facts))

    def stepped(self, report: StepReport) -> None:
        self._tell(report)

    def shrank(self, lanes: int, why: str) -> None:
        self.shrunk.append((lanes, why))

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        self._tell(evaluation)
        return self.answer(evaluation)

    def _tell(self, told: Told) -> None:
        if self.stop(told):
            raise KeyboardInterrupt
        self.events.append(told)

    def _of(self, kind: type | tuple[type, ...]) -> dict[int, list]:
        found: dict[int, list] = {}
        for event in self.events:
            if isinstance(event, kind):
                found.setdefault(event.trial, []).append(event)
        return found

    @property
    def told(self) -> dict[int, list[Told]]:
        return self._of((StepReport, EpochEvaluation))

    @property
    def steps(self) -> dict[int, list[StepReport]]:
        return self._of(StepReport)

    @property
    def epochs(self) -> dict[int, list[EpochEvaluation]]:
        return self._of(EpochEvaluation)

    @property
    def losses(self) -> dict[int, list[float]]:
        return {trial: [report.loss for report in told] for trial, told in self.steps.items()}

    @property
    def logits(self) -> dict[int, list[np.ndarray]]:
        return {trial: [epoch.logits for epoch in told] for trial, told in self.epochs.items()}

    @property
    def facts(self) -> dict[int, TrialFacts]:
        return dict(event for event in self.events if isinstance(event, tuple))

    @property
    def log(self) -> list[tuple[str, int, int]]:
        """What happened, to which trial, at which of its steps."""
        return [_line(event) for event in self.events]


def _line(event: tuple[int, TrialFacts] | Told | Outcome) -> tuple[str, int, int]:
    if isinstance(event, tuple):
        return "started", event[0], 0
    if isinstance(event, Outcome):
        return event.state.value, event.trial, event.steps
    return "stepped" if isinstance(event, StepReport) else "evaluated", event.trial, event.step
