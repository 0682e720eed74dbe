"""A sweep's trials in a database: ask for a point, report its epochs, tell how it ended.

Optuna by ask and tell. It may be killed at any moment: a trial and all that identifies it
are written in one transaction, and so is the change of its state; whatever was RUNNING
without an owner is found by :meth:`Study.reconcile`, and its point is asked for again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.core.errors import SpecError
from lorasweep.core.outcomes import (
    EpochEvaluation,
    Outcome,
    TrialFacts,
    TrialRecord,
    TrialState,
    Verdict,
)
from lorasweep.core.plans import Resumption
from lorasweep.core.seeding import derive_seed
from lorasweep.search import ledger, points, samplers
from lorasweep.search.identity import STUDY_ID, create_or_compare
from lorasweep.search.lease import Lease, Owner
from lorasweep.search.ledger import Ledger
from lorasweep.search.pruners import build_pruner, rung_reached
from lorasweep.search.suggest import (
    Suggestion,
    as_view,
    plain_distributions,
    plain_values,
    resolve,
    suggest,
)
from lorasweep.spec.schema import SearchSpec

_FINAL = {
    TrialState.COMPLETED: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.FAILED: OptunaState.FAIL,
    TrialState.INTERRUPTED: OptunaState.FAIL,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A point to train.

    Attributes:
        number: The trial's number in the study.
        parameters: Values by the spec's names, alpha resolved, lists as tuples.
        seed: The trial's seed: it depends on the sweep's seed and the parameters alone.
        retry_of: Number of the interrupted trial that had this point; None for a new one.
        begins: The engine's clock when the point was first asked for.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    retry_of: int | None = None
    begins: int = 0


class Study(Ledger):
    """A study that can be asked and told; make one with :meth:`open`.

    Several processes may hold the same study: what must not interleave is done under a
    lock file beside the database.
    """

    def __init__(
        self,
        database: Path,
        storage: optuna.storages.RDBStorage,
        name: str,
        *,
        spec: SearchSpec,
        seed: int,
        rank: int | None,
        owner: Owner,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(database, storage, name)
        self._spec = spec
        self._seed = seed
        self._rank = rank
        self._owner = owner
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._lock = _lock_of(database)
        self._pruner = build_pruner(spec.pruner, seed)

    @classmethod
    def open(
        cls,
        database: Path,
        name: str,
        spec: SearchSpec,
        seed: int,
        fingerprint: Mapping[str, str],
        *,
        rank: int | None = None,
        owner: Owner | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Study:
        """Create the study, or load it where it is there already.

        Args:
            database: The SQLite file; it and its folder are made if missing.
            name: The study's name.
            spec: The search; its total of trials may differ from the last time.
            seed: The sweep's seed.
            fingerprint: What must not change between two commands, part by part.
            rank: The rank of every trial, for alpha as its multiple in a space without rank.
            owner: Who runs the trials asked for; None for this process.
            clock: Seconds since the epoch.

        Raises:
            SpecError: When the search can't be carried out.
            ConflictError: When the study was made with another fingerprint.
            StorageError: When the database can't be used.
        """
        problems = samplers.check(spec, rank)
        if problems:
            raise SpecError(problems)
        with ledger.storage_errors(database):
            database.parent.mkdir(parents=True, exist_ok=True)
            with _lock_of(database):
                storage = ledger.open_storage(database)
                create_or_compare(storage, database, name, dict(fingerprint))
        return cls(
            database,
            storage,
            name,
            spec=spec,
            seed=seed,
            rank=rank,
            owner=owner or Owner.current(),
            clock=clock,
        )

    @staticmethod
    def peek(database: Path, name: str) -> Ledger | None:
        """Open a study for reading only; None when there is none. Creates nothing.

        Raises:
            StorageError: When the database is there and can't be read.
        """
        return ledger.peek(database, name)

    @property
    def id(self) -> str:
        """32 hex digits that tell it from an earlier study of the same name that was deleted."""
        return str(self._study.user_attrs[STUDY_ID])

    # ---- asking ----------------------------------------------------------------------

    @property
    def remaining(self) -> int:
        """Trials still to be started; interrupted ones are among them, running ones are not."""
        return max(0, self._reachable - len(ledger.counting(self._trials())))

    @property
    def exhausted(self) -> bool:
        """Whether every point of the space was asked for before the total was reached."""
        return self._reachable < self._spec.trials and self.remaining == 0

    @property
    def _reachable(self) -> int:
        """The total, or as many points as there are if that is less."""
        if self._spec.sampler.kind == "points":
            size: int | None = len(self._spec.sampler.points or ())
        else:
            size = points.size(self._spec.space.dimensions)
        return self._spec.trials if size is None else min(size, self._spec.trials)

    @property
    def resumption(self) -> Resumption:
        """What earlier commands left to the engine; ask after :meth:`reconcile`."""
        trials = self._trials()
        return Resumption(len(ledger.waiting_for_retry(trials)), ledger.clock(trials))

    def ask(self) -> Asked | None:
        """Take the next point: an interrupted one first, else a new one that no trial has tried.

        Returns:
            None when the total is reached or the space is used up.
        """
        with self._exclusive():
            trials = self._trials()
            known = ledger.counting(trials)
            if len(known) >= self._reachable:
                return None
            waiting = ledger.waiting_for_retry(trials)
            if waiting:
                earlier = waiting[0]
                again = Suggestion(ledger.raw_point(earlier), earlier.system_attrs)
                slot = earlier.user_attrs[ledger.SLOT]
                begins = earlier.user_attrs.get(ledger.BEGINS, 0)
                return self._begin(again, slot, begins, earlier.number)
            fresh = suggest(self._spec, self._seed, [(t, ledger.raw_point(t)) for t in known])
            return None if fresh is None else self._begin(fresh, len(known), ledger.clock(trials))

    def _begin(
        self, chosen: Suggestion, slot: int, begins: int, retry_of: int | None = None
    ) -> Asked:
        """Write the trial with all that identifies it, in one transaction."""
        parameters = resolve(self._spec, chosen.raw, self._rank)
        seed = derive_seed(self._seed, "trial", points.canonical(parameters))
        lease = Lease.until(self._owner, self._clock())
        distributions = plain_distributions(self._spec)
        trial = create_trial(
            state=OptunaState.RUNNING,
            params=plain_values(chosen.raw) if distributions else {},
            distributions=distributions,
            system_attrs=dict(chosen.notes),
            user_attrs={
                ledger.SLOT: slot,
                ledger.RAW: dict(chosen.raw),
                ledger.PARAMETERS: parameters,
                ledger.SEED: seed,
                ledger.BEGINS: begins,
                ledger.LEASE: lease.to_json(),
                **({} if retry_of is None else {ledger.RETRY_OF: retry_of}),
            },
        )
        study_id = self._storage.get_study_id_from_name(self._name)
        trial_id = self._storage.create_new_trial(study_id, template_trial=trial)
        number = self._storage.get_trial_number_from_id(trial_id)
        self._leases[number] = lease
        return Asked(number, parameters, seed, retry_of, begins)

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
            if state is TrialState.PRUNED:
                reason = reason or progress.get("pruned", "")
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


def _lock_of(database: Path) -> FileLock:
    return FileLock(database.with_name(f"{database.name}.lock"))
