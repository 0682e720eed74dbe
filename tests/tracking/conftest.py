"""An MLflow store per test, copied from one that was migrated once, and a small corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lorasweep.core.corpora import Corpus, TextSplit
from lorasweep.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database; making one takes a second or two, copying it none."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowTracker.open(f"sqlite:///{path}", "template", None)
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mlruns" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_database, path)
    return path


@pytest.fixture
def tracker(database: Path) -> MlflowTracker:
    return MlflowTracker.open(f"sqlite:///{database}", "reviews", database.parent / "artifacts")


@pytest.fixture
def client(tracker: MlflowTracker) -> MlflowClient:
    return tracker.client


@pytest.fixture
def corpus() -> Corpus:
    def split(name: str, rows: int) -> TextSplit:
        return TextSplit(
            name,
            tuple(f"{name} text {row}" for row in range(rows)),
            tuple(row % 2 for row in range(rows)),
            tuple(f"{name}.csv:{row + 1}" for row in range(rows)),
        )

    return Corpus(
        name="reviews",
        label_names=("negative", "positive"),
        train=split("train", 7),
        validation=split("validation", 3),
        test=None,
        cleaning=(),
        leakage=(),
        digests={"train": "a" * 64, "validation": "b" * 64},
        fingerprint="c" * 64,
        source="reviews.csv",
    )
