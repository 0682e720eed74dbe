"""Trials under way: report their epochs, keep their leases, tell how they ended.

A process may be killed at any moment: the change of a trial's state is one transaction, and
whatever was RUNNING without an owner is found by :meth:`RunningTrials.reconcile`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from lorasweep.core.outcomes import (
    EpochEvaluation,
    Outcome,
    TrialFacts,
    TrialRecord,
    TrialState,
    Verdict,
)
from lorasweep.search import ledger
from lorasweep.search.lease import Lease, Owner
from lorasweep.search.ledger import Ledger
from lorasweep.search.pruners import build_pruner, rung_reached
from lorasweep.search.suggest import as_view
from lorasweep.spec.schema import SearchSpec

_FINAL = {
    TrialState.COMPLETED: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
    TrialState.INTERRUPTED: OptunaState.FAIL,
}


class RunningTrials(Ledger):
    """A study's trials, for whoever works on those that are running.

    Several processes may hold the same study: what must not interleave is done under a
    lock file beside the database.

    Args:
        database: The SQLite file.
        storage: Connected to it.
        name: The study's name in it.
        spec: The search.
        seed: The sweep's seed.
        owner: Who runs the trials that this object begins.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        database: Path,
        storage: optuna.storages.RDBStorage,
        name: str,
        *,
        spec: SearchSpec,
        seed: int,
        owner: Owner,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(database, storage, name)
        self._spec = spec
        self._owner = owner
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._lock = lock_of(database)
        self._pruner = build_pruner(spec.pruner, seed)

    # ---- while a trial runs ----------------------------------------------------------

    def renew(self, number: int) -> None:
        """Say that the trial is still being worked on. Cheap enough for every step."""
        now = self._clock()
        lease = self._leases.get(number)
        if lease is not None and lease.is_worth_renewing(now):
            self._leases[number] = Lease.until(self._owner, now)
            self._note(number, ledger.LEASE, self._leases[number].to_json())

    def set_run_id(self, number: int, run_id: str) -> None:
        """Remember the trial's MLflow run."""
        self._note(number, ledger.RUN_ID, run_id)

    def set_facts(self, number: int, facts: TrialFacts) -> None:
        """Remember what the engine knows of the trial once its model is built."""
        self._note(number, ledger.FACTS, asdict(facts))

    def report(
        self,
        number: int,
        evaluation: EpochEvaluation,
        score: float,
        metrics: Mapping[str, float],
    ) -> Verdict:
        """Take note of an epoch's score and decide how the trial goes on.

        Args:
            number: The trial.
            evaluation: Says which epoch it was and which share of the budget is spent. One that
                a trial that was cut off had told before counts at its rung, but isn't judged a
                second time: by now others have come further than they had then.
            score: The objective; NaN is never an improvement.
            metrics: All validation metrics of this epoch.

        Returns:
            ``keep`` when the score is strictly better than the trial's best so far.
            ``go_on`` is True after the last epoch: there is nothing left to give up.
        """
        trial = self._trial(number)
        if trial.state.is_finished():  # another process took it for abandoned
            return Verdict(keep=False, go_on=False)
        progress = dict(trial.user_attrs.get(ledger.PROGRESS, {}))
        best = progress.get("score")
        keep = math.isfinite(score) and (best is None or score > best)
        if keep:
            best = float(score)
            progress |= {"score": best, "best_epoch": evaluation.epoch, "metrics": dict(metrics)}
        progress["history"] = [*progress.get("history", []), [evaluation.epoch, float(score)]]
        progress["seconds"] = evaluation.seconds
        last = evaluation.epoch >= evaluation.epochs
        share = 1.0 if last else evaluation.share
        rung = rung_reached(self._spec.pruner, share, trial.intermediate_values)
        value = math.nan if best is None else best
        why = "" if rung is None else self._judge(trial, evaluation.epoch, rung, value)
        if why:
            progress["pruned"] = why
        self._note(number, ledger.PROGRESS, progress)
        self.renew(number)
        return Verdict(keep=keep, go_on=not why)

    def _judge(self, trial: FrozenTrial, epoch: int, rung: int, value: float) -> str:
        """Store the value at the rung, and say why the trial is to be pruned, if it is.

        The pruner sees only trials that count, and is asked once for each epoch of a place.
        """
        with ledger.storage_errors(self._database):
            self._storage.set_trial_intermediate_value(trial._trial_id, rung, value)
        slot = trial.user_attrs[ledger.SLOT]
        trials = self._trials()
        earlier = ledger.decided(trials, slot, epoch)
        if earlier is not None:
            return earlier
        known = [(t, ledger.raw_point(t)) for t in ledger.counting(trials)]
        view = as_view(known, self._spec, self._name)
        own = next(t for t in view.get_trials() if t.user_attrs[ledger.SLOT] == slot)
        if not self._pruner.prune(view, own):
            return ""
        if math.isnan(value):
            return f"at {rung} % of its budget its {self._spec.objective} was no number"
        return f"at {rung} % of its budget others were ahead of {value:.4f}"

    # ---- how a trial ends ------------------------------------------------------------

    def tell(self, outcome: Outcome) -> bool:
        """Take note of how a trial ended, as its engine saw it.

        A trial that completed without one finite score is stored as failed.

        Returns:
            False when the trial had ended already (it was taken for abandoned, and its
            point was given to another): then nothing changes and the result is dropped.
        """
        more = {"seconds": outcome.seconds, "clock": outcome.clock}
        return self._end(outcome.trial, outcome.state, outcome.reason, more)

    def interrupt(self, number: int, reason: str) -> bool:
        """End a trial that was cut off through no fault of its own; its point will be retried.

        Returns:
            False when it had ended already.
        """
        return self._end(number, TrialState.INTERRUPTED, reason)

    def reconcile(self, *, alone: bool = False) -> tuple[TrialRecord, ...]:
        """Interrupt every running trial whose process is dead or whose lease has expired.

        Args:
            alone: The caller holds the sweep and knows that nobody else is working on it, so
                that every running trial is abandoned: also one of a host that a restarted
                container no longer is.

        Returns:
            Those trials.
        """
        ended = []
        with self._exclusive():
            for trial in self._trials():
                if trial.state.is_finished():
                    continue
                lease = Lease.from_json(trial.user_attrs.get(ledger.LEASE))
                why = lease.why_over(self._clock())
                if alone and not why and trial.number not in self._leases:
                    why = "its process is gone"
                if why and self._end(trial.number, TrialState.INTERRUPTED, why):
                    ended.append(self.record(trial.number))
        return tuple(ended)

    def _end(
        self, number: int, state: TrialState, reason: str, more: Mapping[str, float] | None = None
    ) -> bool:
        """The one place where a trial's state changes.

        What is to be known of the end is written first, and the state last: until then the
        trial counts as running, and a kill in between leaves a trial to be retried.
        """
        if state not in _FINAL:
            raise ValueError(f"trial {number} can't end as {state}")
        with self._exclusive():
            trial = self._trial(number)
            if trial.state.is_finished():
                return False
            progress = trial.user_attrs.get(ledger.PROGRESS, {})
            score = progress.get("score")
            if state is TrialState.COMPLETED and score is None:
                state = TrialState.FAILED
                reason = reason or "no evaluation of it gave a finite score"
            if state is TrialState.PRUNED:  # the engine says when, and only the study why
                reason = ": ".join(filter(None, (reason, progress.get("pruned"))))
            ended: dict[str, Any] = {"state": state.value, "reason": reason, **(more or {})}
            self._storage.set_trial_user_attr(trial._trial_id, ledger.ENDED, ended)
            value = score if state is TrialState.COMPLETED else None
            self._study.tell(number, value, state=_FINAL[state])
            self._leases.pop(number, None)
            return True

    # ---- storage ---------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock that keeps processes from asking or ending at the same time."""
        with ledger.storage_errors(self._database), self._lock:
            yield

    def _note(self, number: int, key: str, value: Any) -> None:
        """Write an attribute; a trial that has ended keeps what it has."""
        with ledger.storage_errors(self._database):
            try:
                self._storage.set_trial_user_attr(self._trial(number)._trial_id, key, value)
            except optuna.exceptions.UpdateFinishedTrialError:
                return


def lock_of(database: Path) -> FileLock:
    """The lock file beside the database: held to make a study, to ask, and to end a trial."""
    return FileLock(database.with_name(f"{database.name}.lock"))
