"""A whole sweep on a tiny base: what is written, and when the test split is opened."""

import json
import math

import numpy as np
import pytest

from lorasweep import export_sweep, load_report, load_spec, report_sweep, run_sweep
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import SweepPaths, sweep_paths
from lorasweep.sweep.events import TrialEnded, TrialEvaluated, TrialStarted, Warned


def test_a_sweep_leaves_all_that_it_promises(small_sweep, hear, open_tracker, runs_by_name):
    spec = load_spec(small_sweep)
    heard = hear()
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


def test_the_champion_predicts_through_mlflow(small_sweep, open_tracker):
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


def test_two_runs_of_one_spec_agree_but_for_times_and_ids(
    small_sweep, monkeypatch, without_times_and_ids
):
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


def test_the_test_split_is_opened_again_only_for_another_winner_and_it_is_said(small_sweep, hear):
    spec = load_spec(small_sweep, ["search.trials=1"])
    _, report = run_sweep(spec)
    assert [entry["reason"] for entry in report.finished.openings] == ["first opening"]
    # Trials are added until another one wins.
    for total in range(2, 9):
        heard = hear()
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


def test_a_report_elsewhere_takes_no_file_of_the_users_along(small_sweep, tmp_path, open_tracker):
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


def test_from_python_folders_may_be_given_as_text(small_sweep, tmp_path):
    spec, one = str(small_sweep), ["search.trials=1"]
    run_sweep(spec, one, report=False)
    report = report_sweep(spec, one, out=str(tmp_path / "here"))
    assert report.page == tmp_path / "here/index.html"
    assert load_report(str(tmp_path / "here")) == load_report(report.results)
    assert export_sweep(spec, str(tmp_path / "model"), one) == tmp_path / "model"
    assert (tmp_path / "model/config.json").is_file()


def test_the_stores_password_is_written_nowhere(small_sweep, tmp_path, monkeypatch):
    # A server is out of reach for a test: the address leads to a database here.
    monkeypatch.setattr(
        SweepPaths, "tracking_uri", lambda self, _uri: f"sqlite:///{self.mlflow_database}"
    )
    uri = "postgresql://me:open/sesame@localhost/runs?sslpassword=sesame"
    _, report = run_sweep(small_sweep, ["search.trials=1", f"tracking.uri={uri}"])
    assert "me:***@localhost" in report.results.read_text(encoding="utf-8")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "mlruns/sweeps/small/spec.yaml") in written
    assert not [path for path in written if b"sesame" in path.read_bytes()]


def test_stored_predictions_belong_to_their_weights(small_sweep, hear):
    _, first = run_sweep(small_sweep)
    weights = sweep_paths("mlruns", "small").adapter(first.finished.best.number)
    file = next(weights.glob("*.safetensors"))
    from safetensors.numpy import load_file, save_file

    changed = {name: value + 0.5 for name, value in load_file(file).items()}
    save_file(changed, file)
    heard = hear()
    again = report_sweep(small_sweep, listener=heard).finished
    assert len(again.openings) == 2
    assert again.openings[0] == first.finished.openings[0]
    # Nothing untrue about it: the winner is the one it was.
    assert again.openings[1]["reason"].startswith("the same winner again")
    assert not any("another winner" in warning.message for warning in heard.of(Warned))
    before, after = (f.test["finetuned"].probabilities for f in (first.finished, again))
    assert not np.allclose(before, after)


def test_results_are_strict_json(small_sweep):
    _, report = run_sweep(small_sweep, ["search.trials=1"])

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    document = json.loads(report.results.read_text(encoding="utf-8"), parse_constant=refuse)
    p_values = [c["mcnemar"]["p_value"] for c in document["comparisons"].values()]
    assert all(0 < p <= 1 and math.isfinite(p) for p in p_values)
