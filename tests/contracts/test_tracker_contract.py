"""What every tracker must do (core.protocols.Tracker), on a database and on a real server.

To feed another implementation, add it to ``OPENERS``; what was written is read back with
MLflow's client, so a tracker that writes elsewhere brings a reader of its own.
"""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run

from lorasweep.core.corpora import Corpus, TextSplit
from lorasweep.core.errors import TrackingError
from lorasweep.core.outcomes import TrialState
from lorasweep.core.protocols import Tracker
from lorasweep.tracking.mlflow_tracker import MlflowTracker

FINAL = [
    (TrialState.COMPLETED, "FINISHED"),
    (TrialState.PRUNED, "KILLED"),
    (TrialState.FAILED, "FAILED"),
    (TrialState.INTERRUPTED, "KILLED"),
]


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/mlflow.db"


@pytest.fixture(scope="module")
def on_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    words += ["--artifacts-destination", str(folder / "artifacts")]
    log: list[str] = []
    up = threading.Event()

    def listen(lines: Iterable[str]) -> None:
        """Note what it says, so that no full pipe stalls it; up once it has said both."""
        unsaid = {"Application startup complete", "Uvicorn running on"}
        for line in lines:
            log.append(line)
            unsaid = {part for part in unsaid if part not in line}
            if not unsaid:
                up.set()

    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    ) as process:
        assert process.stdout is not None
        listener = threading.Thread(target=listen, args=(process.stdout,))
        listener.start()
        try:
            if not up.wait(timeout=120):
                pytest.fail(f"the MLflow server didn't come up:\n{''.join(log)}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            listener.join(timeout=60)


OPENERS = ["on_sqlite", "on_server"]


@pytest.fixture(params=OPENERS)
def tracker(request: pytest.FixtureRequest, tmp_path: Path) -> Tracker:
    uri = request.getfixturevalue(request.param)
    # An experiment per test: they share one store.
    return MlflowTracker.open(uri, tmp_path.name, tmp_path / "artifacts")


@pytest.fixture
def read(tracker: Tracker) -> Callable[[str], Run]:
    assert isinstance(tracker, MlflowTracker)
    client = tracker.client
    return lambda run_id: client.get_run(run_id)


Read = Callable[[str], Run]


def test_a_sweep_has_one_parent_run_also_after_a_restart(tracker: Tracker, read: Read) -> None:
    parent = tracker.open_sweep("reviews", {"lorasweep.spec": "f", "extra": "1"})
    assert tracker.open_sweep("reviews", {"lorasweep.spec": "f", "extra": "2"}) == parent
    assert tracker.open_sweep("other", {"lorasweep.spec": "f"}) != parent
    run = read(parent)
    assert run.info.run_name == "reviews"
    assert run.data.tags["lorasweep.study"] == "reviews"
    assert run.data.tags["extra"] == "2"
    assert run.data.tags["mlflow.note.content"]


def test_a_trial_is_nested_and_named_by_its_number(tracker: Tracker, read: Read) -> None:
    parent = tracker.open_sweep("reviews", {})
    params = {"learning_rate": 2e-5, "rank": 8, "targets": "auto", "top": None, "flag": True}
    run = read(tracker.start_trial(parent, 5, params, {"lorasweep.study": "reviews"}))
    assert run.info.run_name == "0005"
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["lorasweep.trial"] == "5"
    assert run.data.tags["lorasweep.study"] == "reviews"
    written = {"learning_rate": "2e-05", "rank": "8", "targets": "auto", "top": "null"}
    assert run.data.params == {**written, "flag": "true"}


def test_a_trial_does_not_pass_for_its_sweep(tracker: Tracker) -> None:
    parent = tracker.open_sweep("reviews", {})
    tracker.start_trial(parent, 0, {}, {"lorasweep.study": "reviews"})
    assert tracker.open_sweep("reviews", {}) == parent


def test_params_of_any_number_and_length_are_taken(tracker: Tracker, read: Read) -> None:
    run_id = tracker.open_sweep("reviews", {})
    tracker.log_params(run_id, {f"p{i}": i for i in range(230)})
    tracker.log_params(run_id, {"long": "x" * 9000, "p0": 0})
    params = read(run_id).data.params
    assert len(params) == 231
    assert params["long"].startswith("xxx")
    assert len(params["long"]) == 6000


def test_metrics_keep_their_steps_and_what_is_not_finite(tracker: Tracker, read: Read) -> None:
    assert isinstance(tracker, MlflowTracker)
    run_id = tracker.open_sweep("reviews", {})
    tracker.log_metrics(run_id, {"loss": 0.7}, step=10)
    tracker.log_metrics(run_id, {"loss": 0.5, "val_f1": 0.8}, step=20, epoch=1)
    tracker.log_metrics(run_id, {"broken": math.nan, "endless": -math.inf}, step=30)
    history = tracker.client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.7), (20, 0.5)]
    metrics = read(run_id).data.metrics
    assert metrics["val_f1"] == 0.8
    assert metrics["epoch"] == 1
    assert math.isnan(metrics["broken"])
    assert metrics["endless"] < -1e300


@pytest.mark.parametrize(("state", "status"), FINAL)
def test_the_final_status_is_true_and_written_once(
    tracker: Tracker,
    read: Read,
    state: TrialState,
    status: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    parent = tracker.open_sweep("reviews", {})
    run_id = tracker.start_trial(parent, 0, {}, {})
    tracker.finish(run_id, state)
    first = read(run_id)
    assert first.info.status == status
    assert first.data.tags["lorasweep.state"] == state.value
    for other, _ in FINAL:
        tracker.finish(run_id, other)
    again = read(run_id)
    assert (again.info.status, again.info.end_time) == (status, first.info.end_time)
    assert again.data.tags["lorasweep.state"] == state.value
    assert capfd.readouterr() == ("", "")


def test_a_sweep_that_goes_on_is_running_again(tracker: Tracker, read: Read) -> None:
    parent = tracker.open_sweep("reviews", {})
    tracker.finish(parent, TrialState.INTERRUPTED)
    assert read(parent).info.status == "KILLED"
    assert tracker.open_sweep("reviews", {}) == parent
    assert read(parent).info.status == "RUNNING"
    tracker.finish(parent, TrialState.COMPLETED)
    assert read(parent).info.status == "FINISHED"


def test_running_is_no_way_to_end(tracker: Tracker) -> None:
    with pytest.raises(ValueError, match="no way to end"):
        tracker.finish(tracker.open_sweep("reviews", {}), TrialState.RUNNING)


def test_texts_and_folders_are_kept(tracker: Tracker, tmp_path: Path) -> None:
    assert isinstance(tracker, MlflowTracker)
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text("<p>")
    (tmp_path / "report" / "figures" / "a.png").write_bytes(b"png")
    run_id = tracker.open_sweep("reviews", {})
    tracker.log_text(run_id, "name: größe\n", "spec.yaml")
    tracker.log_artifacts(run_id, tmp_path / "report", "report")
    got = Path(
        download_artifacts(run_id=run_id, dst_path=str(tmp_path / "got"), tracking_uri=tracker.uri)
    )
    files = {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()}
    assert files == {"spec.yaml", "report/index.html", "report/figures/a.png"}
    assert (got / "spec.yaml").read_text(encoding="utf-8") == "name: größe\n"
    with pytest.raises(TrackingError, match="is not a folder"):
        tracker.log_artifacts(run_id, tmp_path / "nothing", "report")


def test_the_splits_are_inputs_with_their_digests(tracker: Tracker, read: Read) -> None:
    def split(name: str) -> TextSplit:
        return TextSplit(name, ("good", "bad"), (1, 0), ("a:1", "a:2"))

    digests = {"train": "a" * 64, "validation": "b" * 64, "test": "a" * 64}
    corpus = Corpus(
        name="reviews",
        label_names=("negative", "positive"),
        train=split("train"),
        validation=split("validation"),
        test=split("test"),
        cleaning=(),
        leakage=(),
        digests=digests,
        fingerprint="f",
        source="a.csv",
    )
    run_id = tracker.open_sweep("reviews", {})
    for _ in range(2):  # a sweep that goes on logs its data again
        tracker.log_corpus(run_id, corpus)
    inputs = read(run_id).inputs.dataset_inputs
    found = {entry.tags[0].value: (entry.dataset.name, entry.dataset.digest) for entry in inputs}
    assert found == {name: (f"reviews/{name}", d[:36]) for name, d in digests.items()}
    assert len(inputs) == 3
    assert all('"num_rows": 2' in entry.dataset.profile for entry in inputs)


def test_an_unknown_run_is_a_sentence(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match="could not log metrics"):
        tracker.log_metrics("0" * 32, {"loss": 1.0}, step=1)
