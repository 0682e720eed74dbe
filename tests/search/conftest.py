"""A space, studies in a temporary folder, and trials that take no training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy

from lorasweep.core.outcomes import EpochEvaluation, Outcome, TrialState, Verdict
from lorasweep.search.lease import Owner
from lorasweep.search.ledger import open_storage
from lorasweep.search.study import Asked, Study
from lorasweep.spec.schema import SearchSpec

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 2e-3, "log": True},
    "epochs": {"low": 1, "high": 4},
    "rank": {"choices": [4, 8, 16]},
    "alpha": {"times_rank": [1, 2]},
    "targets": {"choices": ["auto", ["query", "value"]]},
}
SMALL = {
    "epochs": {"low": 1, "high": 3},
    "rank": {"choices": [4, 8]},
    "dropout": {"low": 0.0, "high": 0.2, "step": 0.1},
}
POINTS = [
    {"rank": rank, "learning_rate": rate} for rank in (4, 8, 16) for rate in (1e-4, 1e-3, 3e-3)
]


@pytest.fixture
def search() -> Callable[..., SearchSpec]:
    """A search: ``search("tpe", trials=8)``; the space fits the sampler."""

    def make(kind: str = "tpe", *, trials: int = 8, space: Any = None, **more: Any) -> SearchSpec:
        sampler: dict[str, Any] = {"kind": kind, "startup_trials": 3}
        if kind == "points":
            sampler["points"] = more.pop("points", POINTS)
            space = {}
        elif space is None:
            space = SMALL if kind == "grid" else SPACE
        return SearchSpec.model_validate(
            {"trials": trials, "sampler": sampler, "space": space, **more}
        )

    return make


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gone() -> Owner:
    """A process of this machine that is no more."""
    here = Owner.current()
    return Owner(here.host, here.pid, here.started - 1000.0)


@pytest.fixture(scope="session", autouse=True)
def unsynced_sqlite() -> Iterator[None]:
    """Don't wait for the disk at every commit: no test here cuts the power."""

    def hurry(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", hurry)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", hurry)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory, unsynced_sqlite: None) -> Path:
    """A database with tables and no study: making one takes longer than most tests."""
    database = tmp_path_factory.mktemp("empty") / "optuna.db"
    storage = open_storage(database)
    storage.remove_session()
    storage.engine.dispose()
    return database


@pytest.fixture
def database(tmp_path: Path, empty_database: Path) -> Path:
    """A copy of the empty database for one test."""
    return shutil.copy(empty_database, tmp_path / "optuna.db")


@pytest.fixture
def open_study(database: Path, clock: Clock) -> Callable[..., Study]:
    """Open a study of the test's database, again and again."""

    def make(spec: SearchSpec, name: str = "sweep", seed: int = 42, **more: Any) -> Study:
        fingerprint = more.pop("fingerprint", {"spec": "s", "data": "d", "base": "b"})
        more.setdefault("clock", clock)
        return Study.open(database, name, spec, seed, fingerprint, **more)

    return make


@pytest.fixture
def epoch() -> Callable[..., Verdict]:
    """Report one epoch of a trial: ``epoch(study, number, 1, of=3, score=0.8)``."""

    def make(study: Study, number: int, at: int, *, of: int, score: float) -> Verdict:
        evaluation = EpochEvaluation(
            trial=number,
            epoch=at,
            epochs=of,
            step=10 * at,
            steps=10 * of,
            logits=np.zeros((2, 2), dtype=np.float32),
            seconds=1.5 * at,
        )
        return study.report(number, evaluation, score, {"f1": score, "epoch_was": float(at)})

    return make


@pytest.fixture
def train(epoch: Callable[..., Verdict]) -> Callable[[Study, Asked], TrialState]:
    """Carry a trial to its end as an engine would; its scores follow from its parameters.

    With ``killed``, its process is gone after the first epoch was told.
    """

    def make(study: Study, asked: Asked, *, killed: bool = False) -> TrialState:
        quality = (
            0.5
            + 0.02 * asked.parameters["rank"]
            - 100 * (asked.parameters.get("learning_rate", 1e-3) - 1e-3) ** 2
        )
        epochs = asked.parameters.get("epochs", 2)
        state = TrialState.COMPLETED
        for at in range(1, epochs + 1):
            verdict = epoch(study, asked.number, at, of=epochs, score=quality * at / (at + 0.5))
            if killed:
                return TrialState.RUNNING
            if not verdict.go_on:
                state = TrialState.PRUNED
                break
        study.tell(Outcome(asked.number, state, 10 * at, 2.0))
        return state

    return make
