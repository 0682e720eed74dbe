"""A store that can't be used is told in a sentence, soon, and before anything is trained."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from lorasweep.core.errors import TrackingError
from lorasweep.tracking import store
from lorasweep.tracking.mlflow_tracker import MlflowTracker


def refusal(uri: str) -> str:
    with pytest.raises(TrackingError) as caught:
        MlflowTracker.open(uri, "reviews", None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# MLflow's own retries would take four minutes here.
@pytest.mark.timeout(60)
def test_a_server_that_refuses() -> None:
    before = dict(os.environ)
    message = refusal("http://127.0.0.1:9")
    assert message.startswith("tracking.uri: no MLflow server answers at http://127.0.0.1:9")
    assert "connection refused" in message
    assert dict(os.environ) == before


@pytest.mark.timeout(60)
def test_a_server_that_accepts_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE", 1)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        message = refusal(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "no MLflow server answers" in message


@pytest.fixture
def stranger() -> Iterator[str]:
    """A web server that knows nothing of MLflow."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.timeout(60)
def test_a_server_that_is_not_mlflow(stranger: str) -> None:
    assert "no MLflow server answers" in refusal(stranger)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "no longer writes runs into folders"),
        ("file:///srv/mlruns", "no longer writes runs into folders"),
        ("ftp://host/runs", "no tracking URI that MLflow knows"),
        ("sqlite://", "keeps nothing on disk"),
        ("sqlite:///:memory:", "keeps nothing on disk"),
        ("postgresql://127.0.0.1:9/mlflow", "no database answers at 127.0.0.1:9"),
    ],
)
@pytest.mark.timeout(60)
def test_other_places_that_cannot_be_used(uri: str, said: str) -> None:
    assert said in refusal(uri)


def test_a_password_is_not_repeated() -> None:
    message = refusal("ftp://user:secret@host/runs")
    assert "user:***@host" in message
    assert "secret" not in message


def test_a_password_that_mlflow_repeats_is_not() -> None:
    uri = "http://me:secret@hub:5000"
    said = f"API request to {uri}/api/2.0/mlflow/runs/log-batch failed with exception timed out"
    with pytest.raises(TrackingError) as caught, store.telling(uri, "log metrics"):
        raise MlflowException(said)
    assert "API request to http://me:***@hub:5000/api/2.0/mlflow" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "can't be opened for writing" in refusal(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("some notes of mine, long enough")
    assert "is not a SQLite database" in refusal(f"sqlite:///{tmp_path}/mlflow.db")
    assert (tmp_path / "mlflow.db").read_text() == "some notes of mine, long enough"


def test_somebody_elses_database(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as database:
        database.execute("CREATE TABLE studies (id INTEGER)")
    assert "not MLflow's" in refusal(f"sqlite:///{tmp_path}/optuna.db")
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("studies",)]


@pytest.mark.timeout(60)
def test_a_locked_database(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE", 0)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "Another process holds it" in refusal(f"sqlite:///{database}")


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("451aebb31d03", "was written by an older MLflow. Copy the database"),
        ("ffffffffffff", "was written by a newer MLflow than"),
    ],
)
def test_a_schema_of_another_version(database: Path, revision: str, said: str) -> None:
    with closing(sqlite3.connect(database)) as other:
        other.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        other.commit()
    assert said in refusal(f"sqlite:///{database}")


def test_a_stale_folder_of_runs_is_left_alone(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / "mlruns" / "0" / "meta.yaml"
    stale.parent.mkdir(parents=True)
    stale.write_text("experiment_id: '0'\n")
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlruns" / "mlflow.db")
    tracker = MlflowTracker.open(f"sqlite:///{tmp_path}/mlruns/mlflow.db", "reviews", None)
    assert tracker.client.get_run(tracker.open_sweep("s", {})).info.status == "RUNNING"
    assert stale.read_text() == "experiment_id: '0'\n"


def test_two_processes_create_one_database_quietly(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from lorasweep.tracking.mlflow_tracker import MlflowTracker\n"
        "t = MlflowTracker.open(sys.argv[1], 'reviews', Path(sys.argv[2]))\n"
        "print(t.experiment_id, t.open_sweep('s', {'lorasweep.spec': 'f'}))\n"
        "print(os.environ['MLFLOW_DISABLE_TELEMETRY'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_DISABLE_TELEMETRY"}
    words = [sys.executable, "-W", "error", "-c", code]
    words += [f"sqlite:///{tmp_path}/new/mlflow.db", f"{tmp_path}/new/artifacts"]
    started = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in started]
    assert [err for _, err in answers] == ["", ""]
    assert answers[0] == answers[1], "one experiment, one parent run"
    assert answers[0][0].endswith("\ntrue\n")
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_doctor_asks_without_creating(tmp_path: Path, database: Path) -> None:
    assert store.answers(f"sqlite:///{tmp_path}/later/mlflow.db").endswith("will be created")
    assert not (tmp_path / "later").exists()
    assert store.answers(f"sqlite:///{database}").endswith("can be written")
    with pytest.raises(TrackingError):
        store.answers("http://127.0.0.1:9")


def test_the_ui_command(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=f"port {port}: can't be listened on .*--port"):
            store.ui_command(uri, tmp_path / "artifacts", port)
    command = store.ui_command(uri, tmp_path / "artifacts", port)
    assert command[:3] == [sys.executable, "-m", "mlflow"]
    assert command[command.index("--backend-store-uri") + 1] == uri
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == str(port)
    with pytest.raises(TrackingError, match="Open that address in a browser"):
        store.ui_command("https://mlflow.example.org", None, port)
