"""The UI's table of trials: the tag that it is read from, and the address that opens it."""

from __future__ import annotations

import json

from mlflow import MlflowClient

from lorasweep.tracking.mlflow_tracker import MlflowTracker
from lorasweep.tracking.view import view_address


def test_the_trials_of_this_sweep_best_first(tracker: MlflowTracker, client: MlflowClient) -> None:
    parent = tracker.open_sweep("my sweep", {})
    other = tracker.open_sweep("other", {})
    trial = tracker.start_trial(parent, 0, {}, {})
    tracker.start_trial(other, 0, {}, {})
    tags = client.get_experiment(tracker.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.my sweep"])
    found = client.search_runs([tracker.experiment_id], view["searchFilter"])
    assert [run.info.run_id for run in found] == [trial]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`val_f1`", False)
    columns = view["selectedColumns"]
    assert len(columns) == len(set(columns))
    assert {"params.`learning_rate`", "params.`rank`", "metrics.`val_f1`"} <= set(columns)


def test_the_address(tracker: MlflowTracker) -> None:
    server = "http://127.0.0.1:5000/"
    assert view_address(tracker.uri, "reviews", "my sweep", server) == (
        f"http://127.0.0.1:5000/#/experiments/{tracker.experiment_id}/runs"
        "?viewStateShareKey=my%20sweep"
    )
    assert view_address(tracker.uri, "unknown", "s", server) == "http://127.0.0.1:5000"
