"""What is particular to MLflow: ids, tags, limits, and a global state left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from lorasweep.core.corpora import Corpus
from lorasweep.core.errors import TrackingError
from lorasweep.core.outcomes import TrialState
from lorasweep.tracking.mlflow_tracker import MlflowTracker


def test_artifacts_lie_where_the_sweep_says(tracker: MlflowTracker, database: Path) -> None:
    run_id = tracker.open_sweep("reviews", {})
    tracker.log_text(run_id, "text", "a.txt")
    assert [path.name for path in (database.parent / "artifacts").rglob("*.txt")] == ["a.txt"]


def test_a_second_tracker_finds_the_same_experiment_and_sweep(tracker: MlflowTracker) -> None:
    again = MlflowTracker.open(tracker.uri, "reviews", None)
    assert again.experiment_id == tracker.experiment_id
    assert again.open_sweep("s", {}) == tracker.open_sweep("s", {})


def test_a_deleted_experiment_is_told_and_left_deleted(
    tracker: MlflowTracker, client: MlflowClient
) -> None:
    client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match=r"was deleted in MLflow.*experiments restore -x"):
        MlflowTracker.open(tracker.uri, "reviews", None)
    assert client.get_experiment(tracker.experiment_id).lifecycle_stage == "deleted"


def test_a_deleted_parent_is_not_taken_up(tracker: MlflowTracker, client: MlflowClient) -> None:
    parent = tracker.open_sweep("s", {})
    client.delete_run(parent)
    assert tracker.find_sweep("s") is None
    assert tracker.open_sweep("s", {}) != parent


def test_a_sweep_of_another_spec_has_another_parent(tracker: MlflowTracker) -> None:
    first = tracker.open_sweep("s", {"lorasweep.spec": "one"})
    second = tracker.open_sweep("s", {"lorasweep.spec": "two"})
    assert first != second
    assert tracker.find_sweep("s", {"lorasweep.spec": "one"}) == first
    assert tracker.find_sweep("s") == second, "the one begun last"
    assert tracker.find_sweep("s", {"lorasweep.spec": "three"}) is None


def test_finding_a_sweep_does_not_reopen_it(tracker: MlflowTracker, client: MlflowClient) -> None:
    parent = tracker.open_sweep("s", {})
    tracker.finish(parent, TrialState.COMPLETED)
    assert tracker.find_sweep("s") == parent
    assert client.get_run(parent).info.status == "FINISHED"


def test_runs_that_a_killed_process_left_open(tracker: MlflowTracker, client: MlflowClient) -> None:
    parent, other = tracker.open_sweep("s", {}), tracker.open_sweep("other", {})
    ids = [tracker.start_trial(parent, number, {}, {}) for number in range(4)]
    tracker.start_trial(other, 0, {}, {})
    tracker.finish(ids[1], TrialState.COMPLETED)
    assert tracker.runs_left_open(parent) == [(0, ids[0]), (2, ids[2]), (3, ids[3])]
    tracker.finish(ids[0], TrialState.INTERRUPTED)
    run = client.get_run(ids[0])
    assert (run.info.status, run.data.tags["lorasweep.state"]) == ("KILLED", "interrupted")
    assert tracker.runs_left_open(parent) == [(2, ids[2]), (3, ids[3])]
    assert len(tracker.runs_left_open(other)) == 1


def test_a_trial_is_found_by_its_number(tracker: MlflowTracker) -> None:
    parent = tracker.open_sweep("s", {})
    ids = [tracker.start_trial(parent, number, {}, {}) for number in (1, 11)]
    assert [tracker.find_trial(parent, number) for number in (1, 11, 2)] == [*ids, None]


def test_a_param_that_changes_keeps_its_value_and_says_so(
    tracker: MlflowTracker, client: MlflowClient
) -> None:
    parent = tracker.open_sweep("s", {})
    tracker.log_params(parent, {"trials": 6, "sampler": "tpe"})
    tracker.log_params(parent, {"trials": 12, "sampler": "tpe", "pruner": "none"})
    data = client.get_run(parent).data
    assert data.params == {"trials": "6", "sampler": "tpe", "pruner": "none"}
    changed = {name for name in data.tags if name.startswith("lorasweep.changed.")}
    assert changed == {"lorasweep.changed.trials"}
    assert data.tags["lorasweep.changed.trials"] == "12"


def test_limits_of_tags_and_batches(tracker: MlflowTracker, client: MlflowClient) -> None:
    tags = {f"version.{i}": str(i) for i in range(120)} | {"reason": "x" * 9000}
    parent = tracker.open_sweep("s", tags)
    tracker.open_sweep("s", tags)
    data = client.get_run(parent).data
    assert data.tags["version.119"] == "119"
    assert "sha256" in data.tags["reason"]
    tracker.log_metrics(parent, {f"m{i}": i for i in range(2100)}, step=1)
    assert len(client.get_run(parent).data.metrics) == 2100


def test_names_that_mlflow_refuses(tracker: MlflowTracker, client: MlflowClient) -> None:
    parent = tracker.open_sweep("s", {"tag: ä": "1"})
    tracker.log_metrics(parent, {"f1/très bien!": 0.5, "f1/tres bien?": 0.25}, step=1)
    tracker.log_params(parent, {"a//b": 1})
    data = client.get_run(parent).data
    assert sorted(data.metrics.values()) == [0.25, 0.5]
    assert list(data.params.values()) == ["1"]


def test_source_and_schema_of_the_data(
    tracker: MlflowTracker, client: MlflowClient, corpus: Corpus
) -> None:
    parent = tracker.open_sweep("s", {})
    tracker.log_corpus(parent, corpus)
    inputs = client.get_run(parent).inputs.dataset_inputs
    assert sorted(entry.tags[0].value for entry in inputs) == ["train", "validation"]
    train = next(e.dataset for e in inputs if e.dataset.name == "reviews/train")
    assert json.loads(train.source) == {"uri": "reviews.csv"}
    assert json.loads(train.profile)["rows_per_label"] == {"negative": 4, "positive": 3}
    columns = json.loads(train.schema)["mlflow_colspec"]
    assert [column["name"] for column in columns] == ["text", "label"]


def test_mlflows_global_state_is_left_alone(
    tracker: MlflowTracker, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)
    mine = MlflowTracker.open(tracker.uri, "mine", tmp_path / "artifacts")
    run_id = mine.start_trial(mine.open_sweep("s", {}), 0, {"rank": 8}, {})
    mine.log_metrics(run_id, {"loss": 1.0}, step=1)
    mine.log_corpus(run_id, corpus)
    mine.log_text(run_id, "text", "a.txt")
    mine.finish(run_id, TrialState.COMPLETED)
    assert mlflow.active_run() is None
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri(), dict(os.environ)) == before
    assert list(folder.iterdir()) == [], "nothing is written into the current folder"
