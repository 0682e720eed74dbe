"""The MLflow store may be another one than before, or be gone while trials run."""

import os

import pytest

from lorasweep import load_report, load_spec, report_sweep, run_sweep
from lorasweep.core.errors import Problem, TrackingError
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths
from lorasweep.search.study import Study
from lorasweep.sweep.events import TrialEnded, TrialStarted, Warned
from lorasweep.tracking.mlflow_tracker import MlflowTracker


@pytest.mark.parametrize(
    "change", ["tracking.uri=sqlite:///{}/other/mlflow.db", "tracking.experiment=other"]
)
def test_a_report_is_written_though_the_tracking_was_changed(small_sweep, change, open_tracker):
    result, _ = run_sweep(small_sweep, ["search.trials=1"], report=False)
    spec = load_spec(small_sweep, ["search.trials=1", change.format(small_sweep.parent)])
    first, again = report_sweep(spec), report_sweep(spec)
    best = first.finished.best
    assert (best.number, best.score) == (result.best.number, result.best.score)
    assert again.finished.best == best
    assert len(again.finished.openings) == 1

    tracker = open_tracker(spec)
    found = tracker.client.search_runs([tracker.experiment_id])
    assert sorted(run.info.run_name for run in found) == ["0000", "small"]
    run = tracker.client.get_run(best.run_id)
    assert run.info.status == "FINISHED"
    parent = tracker.client.get_run(again.finished.tracking["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["data_fingerprint"] == again.finished.corpus.fingerprint
    assert parent.data.tags["lorasweep.engine"].startswith("trainer (")
    assert [one.dataset.name for one in parent.inputs.dataset_inputs]
    assert "spec.yaml" in [one.path for one in tracker.client.list_artifacts(parent.info.run_id)]
    assert run.data.params["rank"] == str(best.parameters["rank"])
    assert run.data.metrics["val_f1"] == pytest.approx(best.score)
    assert run.data.tags["mlflow.parentRunId"] == again.finished.tracking["run_id"]
    (version,) = tracker.client.search_model_versions("name = 'small'")
    assert version.run_id == best.run_id
    document = load_report(again.page.parent)
    assert document["best_configuration"]["mlflow_run_id"] == best.run_id
    assert document["hyperparameter_experiments"][0]["mlflow_run_id"] == best.run_id


def test_a_stop_right_after_the_study_was_told_marks_no_finished_trial_as_killed(
    small_sweep, monkeypatch, runs_by_name, hear
):
    spec, tell, heard = load_spec(small_sweep), Study.tell, hear()

    def stopped(self, outcome):
        tell(self, outcome)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Study, "tell", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(spec, listener=heard, report=False)
    runs = runs_by_name(spec)
    assert runs["0000"].info.status == "FINISHED"
    assert runs["small"].info.status == "KILLED"
    assert [event.record.state for event in heard.of(TrialEnded)] == [TrialState.COMPLETED]


def test_a_trial_that_was_stopped_says_so_in_words(small_sweep, hear):
    with pytest.raises(KeyboardInterrupt):
        run_sweep(
            small_sweep,
            listener=hear(stop_at=lambda event: isinstance(event, TrialStarted)),
            report=False,
        )
    spec = load_spec(small_sweep)
    study = Study.peek(sweep_paths(spec.output, spec.name).optuna_database, spec.name)
    assert study.records()[0].reason == "stopped by Ctrl-C or SIGTERM"


@pytest.mark.parametrize("at", ["log_params", "log_corpus", "log_metrics"])
def test_a_report_cut_off_while_it_made_runs_is_made_good(
    at, small_sweep, monkeypatch, runs_by_name
):
    run_sweep(small_sweep, ["search.trials=1"], report=False)
    spec = load_spec(small_sweep, ["search.trials=1", "tracking.experiment=other"])

    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, at, stop)
        with pytest.raises(KeyboardInterrupt):
            report_sweep(spec)
    best = report_sweep(spec).finished.best
    runs = runs_by_name(spec)
    assert sorted(runs) == ["0000", "small"]
    assert runs["small"].inputs.dataset_inputs
    assert runs["small"].data.params["model"]
    run = runs["0000"]
    assert run.data.params["rank"] == str(best.parameters["rank"])
    assert run.data.metrics["val_f1"] == pytest.approx(best.score)
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    "reason",
    [KeyboardInterrupt(), TrackingError(Problem("tracking.uri", "could not log metrics"))],
    ids=["Ctrl-C while it hangs", "its own error"],
)
def test_a_store_that_is_gone_hides_no_trial_and_no_reason(
    small_sweep, reason, hear, monkeypatch, runs_by_name
):
    spec = load_spec(small_sweep, ["engine=packed", "lanes=3"])
    patience = []

    def stop(self, *args, **kwargs):
        raise reason

    def refuse(self, run_id, state):
        patience.append(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
        raise TrackingError(Problem("tracking.uri", "could not finish a run"))

    heard = hear()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "log_metrics", stop)
        patch.setattr(MlflowTracker, "finish", refuse)
        with pytest.raises(type(reason)) as caught:
            run_sweep(spec, listener=heard, report=False)
    assert caught.value is reason
    assert patience == ["0"], "asked once, and without MLflow's retries"
    study = Study.peek(sweep_paths(spec.output, spec.name).optuna_database, spec.name)
    assert [r.state for r in study.records()] == [TrialState.INTERRUPTED] * 3
    assert [e.record for e in heard.of(TrialEnded)] == list(study.records())
    assert sum("MLflow store" in warning.message for warning in heard.of(Warned)) == 1
    assert {run.info.status for run in runs_by_name(spec).values()} == {"RUNNING"}

    run_sweep(spec, report=False)
    statuses = {name: run.info.status for name, run in runs_by_name(spec).items()}
    assert statuses.pop("small") == "FINISHED"
    assert [statuses[name] for name in sorted(statuses)] == ["KILLED"] * 3 + ["FINISHED"] * 3
