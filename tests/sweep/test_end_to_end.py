"""A whole sweep on a tiny base: what is written, what a restart does, what is opened when."""

import json
import math

import numpy as np
import pytest

from lorasweep import load_report, load_spec, report_sweep, run_sweep
from lorasweep.core.errors import ConflictError, InputError, NothingToReportError
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import SweepPaths, sweep_paths
from lorasweep.search.study import Study
from lorasweep.sweep.events import TrialEnded, TrialEvaluated, TrialStarted, Warned
from lorasweep.tracking.mlflow_tracker import MlflowTracker


def without_times_and_ids(document):
    """The results as two runs of one spec must agree on them."""
    varying = {"training_time_seconds", "mlflow_run_id", "tracking", "environment", "run_id"}
    if isinstance(document, dict):
        return {
            key: without_times_and_ids(value)
            for key, value in document.items()
            if key not in varying and "time" not in key
        }
    if isinstance(document, list):
        return [without_times_and_ids(item) for item in document]
    return document


class Heard(list):
    """Collects events; can raise at a chosen one, as Ctrl-C would."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at

    def __call__(self, event):
        self.append(event)
        if self.stop_at is not None and self.stop_at(event):
            self.stop_at = None
            raise KeyboardInterrupt

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


def open_tracker(spec):
    paths = sweep_paths(spec.output, spec.name)
    uri = paths.tracking_uri(spec.tracking.uri)
    return MlflowTracker.open(uri, spec.name, paths.mlflow_artifacts)


def runs_by_name(spec):
    tracker = open_tracker(spec)
    runs = tracker.client.search_runs([tracker.experiment_id])
    return {run.info.run_name: run for run in runs}


def test_a_sweep_leaves_all_that_it_promises(small_sweep):
    spec = load_spec(small_sweep)
    heard = Heard()
    result, report = run_sweep(spec, listener=heard)

    assert result.finished
    assert [r.state for r in result.records] == [TrialState.COMPLETED] * 3
    assert result.best.score == max(r.score for r in result.records)
    assert len(heard.of(TrialStarted)) == len(heard.of(TrialEnded)) == 3

    # Everything lies below mlruns/ of the current folder.
    written = {path.name for path in small_sweep.parent.iterdir()}
    assert written == {"small.yaml", "mlruns"}
    paths = sweep_paths("mlruns", "small")
    assert load_spec(paths.spec) == spec
    for record in result.records:
        assert (paths.adapter(record.number) / "adapter_config.json").exists()

    # The score is that of the best epoch, in the study and in MLflow alike.
    runs = runs_by_name(spec)
    assert sorted(runs) == ["0000", "0001", "0002", "small"]
    for record in result.records:
        run = runs[f"{record.number:04d}"]
        epochs = [e for e in heard.of(TrialEvaluated) if e.number == record.number]
        best = max(epochs, key=lambda e: e.score)
        assert (record.score, record.best_epoch) == (best.score, best.epoch)
        assert run.data.metrics["val_f1"] == pytest.approx(record.score)
        assert run.data.metrics["epoch/val_f1"] == pytest.approx(epochs[-1].score)
        assert run.info.status == "FINISHED"
        params = run.data.params
        assert float(params["scaling"]) == float(params["alpha"]) / float(params["rank"])
        assert int(params["trainable_parameters"]) < int(params["all_parameters"])
        assert int(params["trial_seed"]) == record.seed
        assert run.data.tags["mlflow.parentRunId"] == runs["small"].info.run_id
        assert int(params["sweep_seed"]) == 7
        for tag in ("spec", "study", "version.torch", "version.peft"):
            name = f"lorasweep.{tag}"
            assert run.data.tags[name] == runs["small"].data.tags[name] != ""
        assert run.data.tags["lorasweep.trial"] == str(record.number)
        assert "mlflow.source.git.commit" in run.data.tags
    parent = runs["small"]
    assert parent.info.status == "FINISHED"
    assert {i.dataset.name for i in parent.inputs.dataset_inputs}
    client = open_tracker(spec).client
    kept = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"spec.yaml", "report"} <= kept

    document = load_report(report.page.parent)
    assert [e["mlflow_run_id"] for e in document["hyperparameter_experiments"]] == [
        runs[f"{n:04d}"].info.run_id for n in range(3)
    ]
    assert set(document["comparisons"]) == {"untrained", "majority"}


def test_the_champion_predicts_through_mlflow(small_sweep):
    import mlflow

    spec = load_spec(small_sweep, ["search.trials=1"])
    _, report = run_sweep(spec)
    tracker = open_tracker(spec)
    version = tracker.client.get_model_version_by_alias("small", "champion")
    assert version.run_id == report.finished.best.run_id
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    try:
        model = mlflow.pyfunc.load_model("models:/small@champion")
        answers = model.predict([text for text, _, _ in report.finished.samples])
    finally:
        mlflow.set_tracking_uri(before)
    expected = [np.argmax(after) for _, _, after in report.finished.samples]
    assert list(answers["label"]) == [("negative", "positive")[at] for at in expected]


def test_two_runs_of_one_spec_agree_but_for_times_and_ids(small_sweep, monkeypatch):
    documents = []
    for folder in ("one", "two"):
        place = small_sweep.parent / folder
        place.mkdir()
        monkeypatch.chdir(place)
        _, report = run_sweep(small_sweep)
        documents.append(load_report(report.page.parent))
    one, two = map(without_times_and_ids, documents)
    assert one == two
    assert "final_performance" in one


@pytest.mark.parametrize(
    "moment",
    [
        lambda e: isinstance(e, TrialStarted) and e.number == 1,
        lambda e: isinstance(e, TrialEvaluated) and e.number == 1,
        lambda e: isinstance(e, TrialEnded) and e.record.number == 1,
    ],
    ids=["as a trial starts", "after an epoch", "between two trials"],
)
def test_a_sweep_cut_off_anywhere_ends_like_one_that_was_not(small_sweep, monkeypatch, moment):
    straight, _ = run_sweep(small_sweep, report=False)
    place = small_sweep.parent / "cut"
    place.mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(small_sweep, listener=Heard(stop_at=moment), report=False)
    spec = load_spec(small_sweep)
    assert runs_by_name(spec)["small"].info.status == "KILLED"
    study = Study.peek(sweep_paths(spec.output, spec.name).optuna_database, spec.name)
    assert not [r for r in study.records() if r.state is TrialState.RUNNING]

    resumed, _ = run_sweep(small_sweep, report=False)
    counted = [r for r in resumed.records if r.state is not TrialState.INTERRUPTED]
    assert [r.parameters for r in counted] == [r.parameters for r in straight.records]
    assert [r.score for r in counted] == [r.score for r in straight.records]
    assert resumed.finished
    statuses = {name: run.info.status for name, run in runs_by_name(spec).items()}
    assert statuses.pop("small") == "FINISHED"
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    assert list(statuses.values()).count("FINISHED") == 3


def test_running_again_changes_nothing_and_opens_nothing(small_sweep):
    _, first = run_sweep(small_sweep)
    result, second = run_sweep(small_sweep)
    assert len(result.records) == 3
    assert len(second.finished.openings) == 1
    assert without_times_and_ids(load_report(second.page.parent)) == without_times_and_ids(
        load_report(first.page.parent)
    )
    spec = load_spec(small_sweep)
    versions = open_tracker(spec).client.search_model_versions("name = 'small'")
    assert len(list(versions)) == 1


def test_more_trials_go_on_from_those_there_are(small_sweep):
    one, _ = run_sweep(small_sweep, ["search.trials=1"], report=False)
    three, _ = run_sweep(small_sweep, report=False)
    assert three.records[0] == one.records[0]
    assert len(three.records) == 3


def test_the_test_split_is_opened_again_only_for_another_winner_and_it_is_said(small_sweep):
    spec = load_spec(small_sweep, ["search.trials=1"])
    _, report = run_sweep(spec)
    assert [entry["reason"] for entry in report.finished.openings] == ["first opening"]
    # Trials are added until another one wins.
    for total in range(2, 9):
        heard = Heard()
        result, report = run_sweep(small_sweep, [f"search.trials={total}"], listener=heard)
        if result.best.number != 0:
            break
        assert len(report.finished.openings) == 1
    else:
        pytest.fail("no later trial won, so this test shows nothing")
    assert len(report.finished.openings) == 2
    assert report.finished.openings[1]["models"][0] == "finetuned"
    assert any("opened again" in warning.message for warning in heard.of(Warned))


def test_the_test_split_stays_closed_until_the_report(small_sweep):
    _, report = run_sweep(small_sweep, report=False)
    assert report is None
    assert not (sweep_paths("mlruns", "small").test).exists()
    finished = report_sweep(small_sweep).finished
    assert set(finished.test) == {"finetuned", "untrained", "majority"}


def test_a_report_elsewhere_takes_no_file_of_the_users_along(small_sweep, tmp_path):
    run_sweep(small_sweep, ["search.trials=1"], report=False)
    out = tmp_path / "here"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    report = report_sweep(small_sweep, ["search.trials=1"], out=out)
    client = open_tracker(load_spec(small_sweep)).client
    logged = client.list_artifacts(report.finished.tracking["run_id"], "report")
    there = {path.name for path in out.iterdir()}
    assert {item.path for item in logged} == {f"report/{name}" for name in there - {"diary.txt"}}
    assert "index.html" in there


def test_the_stores_password_is_written_nowhere(small_sweep, tmp_path, monkeypatch):
    # A server is out of reach for a test: the address leads to a database here.
    monkeypatch.setattr(
        SweepPaths, "tracking_uri", lambda self, _uri: f"sqlite:///{self.mlflow_database}"
    )
    uri = "postgresql://me:open-sesame@localhost/runs"
    _, report = run_sweep(small_sweep, ["search.trials=1", f"tracking.uri={uri}"])
    assert "me:***@localhost" in report.results.read_text(encoding="utf-8")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "mlruns/sweeps/small/spec.yaml") in written
    assert not [path for path in written if b"open-sesame" in path.read_bytes()]


def test_overrides_of_a_loaded_spec_are_refused_and_not_dropped(small_sweep):
    with pytest.raises(InputError, match="load_spec"):
        run_sweep(load_spec(small_sweep), ["search.trials=1"])


def test_stored_predictions_belong_to_their_weights(small_sweep):
    _, first = run_sweep(small_sweep)
    weights = sweep_paths("mlruns", "small").adapter(first.finished.best.number)
    file = next(weights.glob("*.safetensors"))
    from safetensors.numpy import load_file, save_file

    changed = {name: value + 0.5 for name, value in load_file(file).items()}
    save_file(changed, file)
    heard = Heard()
    again = report_sweep(small_sweep, listener=heard).finished
    assert len(again.openings) == 2
    assert again.openings[0] == first.finished.openings[0]
    # Nothing untrue about it: the winner is the one it was.
    assert again.openings[1]["reason"].startswith("the same winner again")
    assert not any("another winner" in warning.message for warning in heard.of(Warned))
    before, after = (f.test["finetuned"].probabilities for f in (first.finished, again))
    assert not np.allclose(before, after)


def test_a_changed_spec_under_the_same_name_is_refused(small_sweep):
    run_sweep(small_sweep, ["search.trials=1"], report=False)
    with pytest.raises(ConflictError, match=r"training\.batch_size"):
        run_sweep(small_sweep, ["training.batch_size=4"])
    with pytest.raises(ConflictError, match="data"):
        run_sweep(small_sweep, ["data.limit.train=40"])


def test_a_sweep_held_by_another_process_is_refused(small_sweep):
    from filelock import FileLock

    paths = sweep_paths("mlruns", "small")
    paths.sweep.mkdir(parents=True)
    with FileLock(paths.lock), pytest.raises(ConflictError, match="is being worked on"):
        run_sweep(small_sweep)


def test_a_diverging_trial_fails_alone_and_says_why(small_sweep):
    # A decay of 1000 at rate 1 multiplies every weight by -999 a step, until it overflows.
    points = "[{learning_rate: 0.01}, {learning_rate: 1.0, weight_decay: 1000}, {rank: 2}]"
    text = small_sweep.read_text(encoding="utf-8")
    text = text[: text.index("search:")] + "training: {epochs: 3, precision: fp32}\n"
    text = text.replace("training: {batch_size: 8, precision: fp32, log_every: 5}\n", "")
    text += f"search: {{trials: 3, sampler: {{kind: points, points: {points}}}}}\n"
    small_sweep.write_text(text, encoding="utf-8")
    result, _ = run_sweep(small_sweep, report=False)
    assert [r.state for r in result.records] == [
        TrialState.COMPLETED,
        TrialState.FAILED,
        TrialState.COMPLETED,
    ]
    assert "step" in result.records[1].reason
    runs = runs_by_name(load_spec(small_sweep))
    assert [runs[f"000{n}"].info.status for n in range(3)] == ["FINISHED", "FAILED", "FINISHED"]


def test_a_sweep_of_which_every_trial_failed_says_the_last_reason(small_sweep):
    points = "[{learning_rate: 1.0, weight_decay: 1000}]"
    text = small_sweep.read_text(encoding="utf-8")
    text = text[: text.index("search:")]
    text += f"search: {{trials: 1, sampler: {{kind: points, points: {points}}}}}\n"
    small_sweep.write_text(text, encoding="utf-8")
    with pytest.raises(NothingToReportError, match=r"None of the trials.*step"):
        run_sweep(small_sweep)
    assert runs_by_name(load_spec(small_sweep))["small"].info.status == "FAILED"


def test_bad_data_and_a_bad_model_are_told_together_before_anything_is_made(small_sweep):
    overrides = ["data.text=nope", "model.name=./nowhere"]
    with pytest.raises(InputError) as caught:
        run_sweep(small_sweep, overrides)
    told = str(caught.value)
    assert "nope" in told
    assert "nowhere" in told
    assert not (small_sweep.parent / "mlruns/optuna.db").exists()
    assert not (small_sweep.parent / "mlruns/mlflow.db").exists()


def test_a_report_without_a_run_says_so(small_sweep):
    with pytest.raises(NothingToReportError, match="has not been run"):
        report_sweep(small_sweep)
    assert not (small_sweep.parent / "mlruns").exists()


def test_a_time_limit_stops_between_trials_and_the_next_command_goes_on(small_sweep):
    result, report = run_sweep(small_sweep, ["search.timeout_minutes=1e-9"])
    assert (result.finished, report) == (False, None)
    result, report = run_sweep(small_sweep)
    assert result.finished
    assert report is not None


def test_results_are_strict_json(small_sweep):
    _, report = run_sweep(small_sweep, ["search.trials=1"])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(report.results.read_text(encoding="utf-8"), parse_constant=refuse)
    p_values = [c["mcnemar"]["p_value"] for c in document["comparisons"].values()]
    assert all(0 < p <= 1 and math.isfinite(p) for p in p_values)
