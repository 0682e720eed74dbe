"""What the database remembers of a study, read without changing anything.

A trial's attributes are written by :mod:`lorasweep.search.study` when it begins, and by
:mod:`lorasweep.search.running` from then on; their names are stated here once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from lorasweep.core.errors import Problem, StorageError
from lorasweep.core.outcomes import TrialFacts, TrialRecord, TrialState
from lorasweep.search import points
from lorasweep.search.lease import Lease

# Optuna tells of every trial at INFO; lorasweep's own console does that.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Of a trial, written with it in one transaction:
SLOT = "slot"  # the place it fills in the sweep: a retry fills the place of what it retries
RAW = "raw"  # the point as sampled
PARAMETERS = "parameters"  # the point as trained: alpha resolved
SEED = "seed"
RETRY_OF = "retry_of"
BEGINS = "begins"  # the engine's clock when its place in the sweep was first asked for
LEASE = "lease"
# Of a trial, while it runs and when it ends:
RUN_ID = "run_id"
FACTS = "facts"
PROGRESS = "progress"  # history, best score so far, its epoch and metrics
ENDED = "ended"  # state, reason, seconds, clock; counts only once Optuna's state is final

_STATES = {
    OptunaState.RUNNING: TrialState.RUNNING,
    OptunaState.COMPLETE: TrialState.COMPLETED,
    OptunaState.PRUNED: TrialState.PRUNED,
}


@contextmanager
def storage_errors(database: Path) -> Iterator[None]:
    """Turn what SQLite, SQLAlchemy and Optuna raise about the database into a sentence.

    Raises:
        StorageError: When the database can't be read or written.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise StorageError(_problem(database, error.__cause__ or error)) from error
    except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        raise StorageError(_problem(database, error)) from error


def _problem(database: Path, error: BaseException) -> Problem:
    # SQLAlchemy's own text goes on with the statement and a link.
    cause = getattr(error, "orig", None) or error
    advice = "Check the disk's free space and the permissions, or move the file away."
    first = next(iter(str(cause).splitlines()), type(cause).__name__)
    return Problem(str(database), f"the study's database can't be used: {first}", advice)


def open_storage(database: Path) -> optuna.storages.RDBStorage:
    """Connect to the database, creating its tables if it has none.

    Raises:
        StorageError: When that can't be done.
    """
    url = sqlalchemy.URL.create("sqlite", database=str(database.absolute()))
    with storage_errors(database):
        try:
            return optuna.storages.RDBStorage(
                url.render_as_string(hide_password=False),
                # Workers of one sweep wait for one another's short writes.
                engine_kwargs={"connect_args": {"timeout": 60}},
            )
        except RuntimeError as error:  # a schema of another Optuna
            what = f"was written by another version of Optuna than {optuna.__version__}"
            advice = f"Upgrade it with `optuna storage upgrade --storage {url}`."
            raise StorageError(Problem(str(database), what, advice)) from error


class Ledger:
    """A study's trials, for whoever only wants to look.

    Args:
        database: The SQLite file.
        storage: Connected to it.
        name: The study's name in it.
    """

    def __init__(self, database: Path, storage: optuna.storages.RDBStorage, name: str) -> None:
        self._database = database
        self._storage = storage
        self._name = name
        with storage_errors(database):
            self._study = optuna.load_study(
                study_name=name,
                storage=storage,
                # Points come from a view in memory; this sampler is never asked.
                sampler=optuna.samplers.RandomSampler(seed=0),
                pruner=optuna.pruners.NopPruner(),
            )

    def records(self) -> tuple[TrialRecord, ...]:
        """Every trial by number, interrupted ones included."""
        return tuple(_record(trial) for trial in self._trials())

    def record(self, number: int) -> TrialRecord:
        """One trial.

        Raises:
            KeyError: When the study has no trial of that number.
        """
        return _record(self._trial(number))

    def abandoned(self, now: float) -> dict[int, str]:
        """Trials that count as running and that nobody works on: why that is known, by number.

        A process that is there may be silent: its trial may wait for memory, or for its time.

        Args:
            now: Seconds since the epoch.
        """
        found = {}
        for trial in self._trials():
            lease = Lease.from_json(trial.user_attrs.get(LEASE))
            over = "" if lease.owner.is_alive else lease.why_over(now)
            if over and not trial.state.is_finished():
                found[trial.number] = over
        return found

    def best(self) -> TrialRecord | None:
        """The completed trial of the highest score; of equal ones the one whose turn came first.

        Pruned trials don't compete: their score is that of a half-trained model.
        """
        completed = [t for t in self._trials() if t.state is OptunaState.COMPLETE]
        if not completed:
            return None
        return _record(max(completed, key=lambda t: (t.value, -t.user_attrs[SLOT])))

    def history(self, number: int) -> tuple[tuple[int, float], ...]:
        """The trial's score after each epoch: ``((epoch, score), …)``."""
        progress = self._trial(number).user_attrs.get(PROGRESS, {})
        return tuple((int(epoch), float(score)) for epoch, score in progress.get("history", ()))

    def facts(self, number: int) -> TrialFacts | None:
        """What the engine told when the trial's model was built; None before that."""
        stored = self._trial(number).user_attrs.get(FACTS)
        return TrialFacts(**points.revive(stored)) if stored else None

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _trials(self) -> list[FrozenTrial]:
        """The trials that lorasweep made, by number, with Optuna's state as the truth."""
        with storage_errors(self._database):
            found = self._study.get_trials(deepcopy=False)
        return [trial for trial in found if SLOT in trial.user_attrs]

    def _trial(self, number: int) -> FrozenTrial:
        for trial in self._trials():
            if trial.number == number:
                return trial
        raise KeyError(f"study {self._name} has no trial {number}")


def peek(database: Path, name: str) -> Ledger | None:
    """Open a study for reading; None when there is none. Creates nothing.

    Raises:
        StorageError: When the file is there and can't be read.
    """
    if not database.is_file() or database.stat().st_size == 0:
        return None
    storage = open_storage(database)
    with storage_errors(database):
        if name not in optuna.get_all_study_names(storage):
            storage.remove_session()
            storage.engine.dispose()
            return None
    return Ledger(database, storage, name)


def state_of(trial: FrozenTrial) -> TrialState:
    """The trial's state; Optuna knows no interruption and calls it a failure."""
    if trial.state is OptunaState.FAIL:
        return TrialState(trial.user_attrs.get(ENDED, {}).get("state", TrialState.FAILED))
    return _STATES[trial.state]


def counting(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count towards the total, in the order of the places that they fill."""
    return sorted(
        (trial for trial in trials if state_of(trial) is not TrialState.INTERRUPTED),
        key=lambda trial: trial.user_attrs[SLOT],
    )


def waiting_for_retry(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The latest interrupted trial of every place that no other trial fills, in their order."""
    filled = {trial.user_attrs[SLOT] for trial in counting(trials)}
    latest = {
        trial.user_attrs[SLOT]: trial
        for trial in sorted(trials, key=lambda trial: trial.number)
        if trial.user_attrs[SLOT] not in filled
    }
    return [latest[slot] for slot in sorted(latest)]


def clock(trials: Iterable[FrozenTrial]) -> int:
    """The engine's clock when it gave out the last outcome that was told; 0 before the first."""
    ended = (trial.user_attrs.get(ENDED, {}) for trial in trials if trial.state.is_finished())
    return max((int(end.get("clock", 0)) for end in ended), default=0)


def decided(trials: Iterable[FrozenTrial], slot: int, epoch: int) -> str | None:
    """What was decided when an epoch of a place in the sweep was first told.

    Returns:
        Why its trial was to be pruned; empty when it was to go on; None when it wasn't told yet.
    """
    for trial in trials:
        progress = trial.user_attrs.get(PROGRESS, {})
        told = [at for at, _ in progress.get("history", ())]
        if trial.user_attrs[SLOT] == slot and epoch in told:
            return progress.get("pruned", "") if epoch == told[-1] else ""
    return None


def raw_point(trial: FrozenTrial) -> dict[str, Any]:
    """The point as it was sampled."""
    return points.revive(trial.user_attrs[RAW])


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes: Mapping[str, Any] = trial.user_attrs
    progress = attributes.get(PROGRESS, {})
    ended = attributes.get(ENDED, {}) if trial.state.is_finished() else {}
    score = progress.get("score")
    return TrialRecord(
        number=trial.number,
        state=state_of(trial),
        parameters=points.revive(attributes[PARAMETERS]),
        score=None if score is None or math.isnan(score) else score,
        best_epoch=progress.get("best_epoch"),
        metrics=progress.get("metrics", {}),
        seconds=float(ended.get("seconds") or progress.get("seconds", 0.0)),
        seed=attributes[SEED],
        run_id=attributes.get(RUN_ID, ""),
        reason=ended.get("reason", ""),
        retry_of=attributes.get(RETRY_OF),
    )
