"""Ask, run, track, tell: the loop of a sweep, the same for every engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

from lorasweep.core.errors import StorageError, TrackingError
from lorasweep.core.outcomes import Outcome, TrialRecord, TrialState
from lorasweep.core.paths import run_name
from lorasweep.core.plans import TrialPlan
from lorasweep.core.protocols import Engine
from lorasweep.engines.lane_checkpoint import discard, hand_over
from lorasweep.model.checkpoint import storing, write_whole
from lorasweep.search.study import Asked, Study
from lorasweep.spec.resolve import plan_trial
from lorasweep.sweep.events import (
    Listener,
    Said,
    SweepStarted,
    TrainingEnded,
    TrialEnded,
    TrialStarted,
    Warned,
)
from lorasweep.sweep.prepare import Prepared
from lorasweep.sweep.reporter import SweepReporter
from lorasweep.sweep.runs import describe_sweep, resolved_spec, run_params, run_tags
from lorasweep.tracking.mlflow_tracker import MlflowTracker
from lorasweep.tracking.store import impatient


@dataclass(frozen=True, slots=True)
class SweepResult:
    """How a command's share of a sweep ended.

    Attributes:
        records: Every trial of the study.
        best: The winner so far; None when no trial completed.
        run_id: The parent run.
        finished: Whether the total was reached (or the space exhausted).
    """

    records: tuple[TrialRecord, ...]
    best: TrialRecord | None
    run_id: str
    finished: bool


class Worker:
    """One process's part in a sweep.

    Args:
        prepared: Data and base.
        engine: Trains the plans.
        engine_reason: Why this engine, in a few words, for people.
        study: Where points come from.
        tracker: Where runs go.
        listener: Told of everything.
    """

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        engine_reason: str,
        study: Study,
        tracker: MlflowTracker,
        listener: Listener,
    ) -> None:
        self._prepared = prepared
        self._engine = engine
        self._engine_reason = engine_reason
        self._study = study
        self._tracker = tracker
        self._listener = listener
        self._run_ids: dict[int, str] = {}
        self._in_flight: set[int] = set()
        self._deadline = float("inf")
        self._tags = run_tags(prepared, study, engine_reason)

    def run(self) -> SweepResult:
        """Carry the sweep on to its total, or to its time limit.

        Raises:
            KeyboardInterrupt: After the running trials were marked and will be taken up again.
        """
        spec = self._prepared.spec
        if spec.search.timeout_minutes is not None:
            self._deadline = time.monotonic() + 60 * spec.search.timeout_minutes
        parent = self._tracker.open_sweep(spec.name, self._tags)
        try:
            prepared = self._prepared
            write_whole(prepared.paths.spec, resolved_spec(prepared).encode(), "the spec")
            describe_sweep(prepared, self._tracker, parent)
            self._take_up(parent)
            earlier = tuple(r for r in self._study.records() if r.state.is_final)
            self._listener(
                SweepStarted(
                    spec.name,
                    spec.search.objective,
                    spec.search.trials,
                    earlier,
                    self._engine_reason,
                )
            )
            reporter = SweepReporter(
                self._study,
                self._tracker,
                self._run_ids,
                self._prepared.validation.labels,
                self._prepared.corpus.label_names,
                spec.search.objective,
                self._listener,
            )
            # Closed before anything is marked: the engine then checkpoints what is under way.
            resumption = self._study.resumption
            run = self._engine.run(self._plans(parent), reporter, resumption)
            with closing(run) as outcomes:
                for outcome in outcomes:
                    self._settle(outcome)
        except BaseException as error:
            # Ctrl-C, a kill signal, or an error that concerns all trials: whatever it is,
            # the trials under way didn't fail by themselves and will be taken up again.
            self._interrupt_running(_in_words(error), parent)
            raise
        self._listener(TrainingEnded())
        finished = self._study.remaining == 0 or self._study.exhausted
        best = self._study.best()
        if finished:
            self._tracker.finish(parent, TrialState.COMPLETED if best else TrialState.FAILED)
        else:
            self._tracker.finish(parent, TrialState.INTERRUPTED)
            self._listener(Warned("The time limit was reached before the last trial started."))
        if self._study.exhausted:
            tried = sum(r.state is not TrialState.INTERRUPTED for r in self._study.records())
            self._listener(Said(f"Every point of the space was tried: {tried} trials."))
        return SweepResult(self._study.records(), best, parent, finished)

    def _take_up(self, parent: str) -> None:
        """Close what a killed command left open, in the study and in the tracker alike."""
        # Whoever runs a worker holds the sweep's lock: see executors/in_process.py.
        abandoned = self._study.reconcile(alone=True)
        for record in abandoned:
            self._listener(
                Said(f"Trial {run_name(record.number)} was cut off earlier; it is tried again.")
            )
        states = {record.number: record.state for record in self._study.records()}
        for number, state in states.items():
            # A kill between telling the study and tidying up.
            if state.is_final and state is not TrialState.INTERRUPTED:
                discard(self._prepared.paths.checkpoint(number))
        for number, run_id in self._tracker.runs_left_open(parent):
            # A trial that the study doesn't know as running elsewhere is over: if the kill came
            # between telling the study and closing the run, the study's word is the true one.
            state = states.get(number, TrialState.INTERRUPTED)
            if state.is_final:
                self._tracker.finish(run_id, state)

    def _plans(self, parent: str) -> Iterator[TrialPlan]:
        """The points to train, asked for one by one as the engine has room for them."""
        while time.monotonic() < self._deadline:
            asked = self._study.ask()
            if asked is None:
                return
            self._in_flight.add(asked.number)
            yield self._begin(asked, parent)

    def _begin(self, asked: Asked, parent: str) -> TrialPlan:
        spec, paths = self._prepared.spec, self._prepared.paths
        folder = paths.trial(asked.number)
        plan = plan_trial(
            spec, asked.number, asked.seed, asked.parameters, folder, begins=asked.begins
        )
        with storing(plan.folder, "the folder of the trial"):
            plan.folder.mkdir(parents=True, exist_ok=True)
        self._bring_checkpoint(plan, asked.retry_of)
        tags = dict(self._tags)
        if asked.retry_of is not None:
            tags["lorasweep.retry_of"] = run_name(asked.retry_of)
        params = run_params(plan, spec.seed)
        run_id = self._tracker.start_trial(parent, asked.number, params, tags)
        self._run_ids[asked.number] = run_id
        self._study.set_run_id(asked.number, run_id)
        self._listener(
            TrialStarted(asked.number, asked.parameters, plan.epochs, retry_of=asked.retry_of)
        )
        return plan

    def _bring_checkpoint(self, plan: TrialPlan, retry_of: int | None) -> None:
        """Lay the checkpoint of the trial that was cut off where the engine looks for it.

        What lies there is of a trial of that number in a study that was deleted. The trial
        that was cut off may have taken up another one and never have come to a checkpoint
        of its own, so it is looked for along the whole chain.
        """
        discard(plan.checkpoint)
        earlier = {record.number: record.retry_of for record in self._study.records()}
        while retry_of is not None:
            if hand_over(self._prepared.paths.checkpoint(retry_of), plan.checkpoint):
                return
            retry_of = earlier[retry_of]

    def _settle(self, outcome: Outcome) -> None:
        """Tell the study first: it is the source of truth when the process dies in between."""
        told = self._study.tell(outcome)
        self._in_flight.discard(outcome.trial)
        record = next(r for r in self._study.records() if r.number == outcome.trial)
        run_id = self._run_ids.pop(outcome.trial)
        if not told:
            self._listener(Warned(f"Trial {run_name(outcome.trial)} came too late and is dropped."))
        if outcome.traceback:
            self._tracker.log_text(run_id, outcome.traceback, "traceback.txt")
            folder = self._prepared.paths.trial(outcome.trial)
            write_whole(folder / "traceback.txt", outcome.traceback.encode(), "the traceback")
        self._tracker.log_metrics(run_id, {"seconds": outcome.seconds}, step=outcome.steps)
        if record.reason:
            self._tracker.log_text(run_id, record.reason, "reason.txt")
        self._tracker.finish(run_id, record.state)
        self._listener(TrialEnded(record, self._study.best()))

    def _interrupt_running(self, reason: str, parent: str) -> None:
        """Mark the trials under way, every one of them in the study before any in the tracker.

        A disk that is full or a tracker that is gone may be why the command stops, and never
        hides the reason. The tracker is asked briefly, and no more once it refuses; the next
        command marks and closes what is open.
        """
        stopped = sorted(self._in_flight)
        states: dict[int, TrialState] = {}
        try:
            for number in stopped:
                self._study.interrupt(number, reason)
            for record in self._study.records():
                states[record.number] = record.state
                if record.number in self._in_flight:
                    self._listener(TrialEnded(record, self._study.best()))
        except StorageError:
            self._listener(
                Warned("The study can't be written; the next command marks what was under way.")
            )
            with suppress(StorageError):
                states = {record.number: record.state for record in self._study.records()}
        try:
            with impatient():
                for number in stopped:
                    if (run_id := self._run_ids.get(number)) is not None:
                        self._tracker.finish(run_id, _ended_as(states.get(number)))
                self._tracker.finish(parent, TrialState.INTERRUPTED)
        except TrackingError:
            self._listener(
                Warned(
                    "The MLflow store refuses; the next command closes the runs left open there."
                )
            )


def _ended_as(state: TrialState | None) -> TrialState:
    """How a trial ended that was under way when the command stopped, by the study's word.

    It may have been told to the study the instant before.
    """
    return state if state is not None and state.is_final else TrialState.INTERRUPTED


def _in_words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C or SIGTERM"
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
