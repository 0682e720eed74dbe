"""A sweep's study in a database: open it, and ask for the points to train.

Optuna by ask and tell; the telling is in :mod:`lorasweep.search.running`. It may be killed at
any moment: a trial and all that identifies it are written in one transaction, and the point
of a trial that was interrupted is asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from lorasweep.core.errors import SpecError
from lorasweep.core.plans import Resumption
from lorasweep.core.seeding import derive_seed
from lorasweep.search import ledger, points, samplers
from lorasweep.search.identity import STUDY_ID, create_or_compare
from lorasweep.search.lease import Lease, Owner
from lorasweep.search.ledger import Ledger
from lorasweep.search.running import RunningTrials, lock_of
from lorasweep.search.suggest import (
    Suggestion,
    plain_distributions,
    plain_values,
    resolve,
    suggest,
)
from lorasweep.spec.schema import SearchSpec


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


def reachable(spec: SearchSpec) -> int:
    """Trials that a search comes to: its total, or as many as it has points if that is less."""
    if spec.sampler.kind == "points":
        size: int | None = len(spec.sampler.points or ())
    else:
        size = points.size(spec.space.dimensions)
    return spec.trials if size is None else min(size, spec.trials)


class Study(RunningTrials):
    """A study that can be asked and told; make one with :meth:`open`."""

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
        super().__init__(database, storage, name, spec=spec, seed=seed, owner=owner, clock=clock)
        self._seed = seed
        self._rank = rank

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
            with lock_of(database):
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
        return reachable(self._spec)

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
