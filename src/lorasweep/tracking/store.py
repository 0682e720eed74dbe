"""The MLflow store behind a URI: is it there, does it take writes, and how to look at it.

MLflow retries a database that can't be opened for a minute and a half, a server that doesn't
answer for several minutes, and speaks in tracebacks. So what can be known beforehand is looked
at first, with a few seconds' patience, and told in a sentence.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import ArgumentError, SADeprecationWarning, SQLAlchemyError

from lorasweep.core.errors import Problem, TrackingError
from lorasweep.tracking.wording import redacted

WHERE = "tracking.uri"
PATIENCE = 10
"""Seconds that a server, or the lock of a database, is waited for."""

_DATABASES = ("postgresql", "mysql", "mssql")
_SQLITE_MAGIC = b"SQLite format 3\x00"


def open_client(uri: str) -> MlflowClient:
    """Return a client of a store that exists, has the right schema and answers.

    A SQLite database is created, with its folder, if it isn't there; so call this once
    before workers start, since two that migrate one new database at once disturb each other.

    Raises:
        TrackingError: The store can't be reached, read or written, or is none of MLflow's.
    """
    _quiet()
    check(uri)
    with telling(uri, "open"), impatient(), warnings.catch_warnings():
        # MLflow 3.17 maps a relationship in a way that SQLAlchemy 2.1 calls deprecated; it says
        # so while MLflow's own module is imported, and no one here can do anything about it.
        warnings.filterwarnings("ignore", "The ``noload`` loader", SADeprecationWarning)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


def check(uri: str, *, writing: bool = True) -> None:
    """Raise unless the store can be used, within seconds and without creating anything but folders.

    Args:
        uri: An MLflow tracking URI.
        writing: False leaves folders alone too.

    Raises:
        TrackingError: With what was tried and what to do.
    """
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        _check_sqlite(uri, writing=writing)
    elif scheme in ("http", "https"):
        _check_server(uri)
    elif scheme in _DATABASES:
        _check_database(uri)
    elif scheme in ("", "file"):
        raise _problem(
            f"{redacted(uri)!r} names a folder, and MLflow no longer writes runs into folders",
            "Write `sqlite` for mlruns/mlflow.db, or a database or server; `mlflow "
            "migrate-filestore` moves runs that you have in a folder.",
        )
    elif not scheme.startswith("databricks"):
        raise _problem(
            f"{redacted(uri)!r} is no tracking URI that MLflow knows",
            "Write `sqlite`, sqlite:////absolute/path.db, http(s)://host:port, or postgresql://….",
        )


def answers(uri: str) -> str:
    """Return one line on how the store at ``uri`` stands, for ``lorasweep doctor``.

    Raises:
        TrackingError: It can't be used.
    """
    _quiet()
    check(uri, writing=False)
    path = sqlite_path(uri)
    if path is None:
        return f"{redacted(uri)} answers"
    return f"{path} {'can be written' if path.exists() else 'will be created'}"


def ui_command(uri: str, artifacts: Path | None, port: int) -> list[str]:
    """Return the command that shows the store in MLflow's UI on ``127.0.0.1:port``.

    Args:
        uri: A database URI. For an ``http(s)`` URI the server itself is the UI.
        artifacts: Where the experiments' artifacts lie, if the caller knows.
        port: A free TCP port, 1 to 65535.

    Raises:
        TrackingError: The port is taken, or the URI is a server's.
    """
    if urlsplit(uri).scheme in ("http", "https"):
        raise _problem(f"{redacted(uri)} is an MLflow server", "Open that address in a browser.")
    with closing(socket.socket()) as probe:
        # A server that has just been stopped leaves its port waiting; that is not "taken".
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise TrackingError(
                Problem(
                    f"port {port}",
                    f"can't be listened on ({_first_line(error)})",
                    "Name another one with --port.",
                )
            ) from None
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    if artifacts is not None:
        command += ["--default-artifact-root", artifacts.as_uri()]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def sqlite_path(uri: str) -> Path | None:
    """Return the file behind a SQLite URI; None for any other URI."""
    if urlsplit(uri).scheme.split("+")[0] != "sqlite":
        return None
    return Path(sqlalchemy.make_url(uri).database or ":memory:")


@contextmanager
def telling(uri: str, doing: str) -> Iterator[None]:
    """Turn what MLflow and the store raise inside into a :class:`TrackingError` with a sentence."""
    try:
        yield
    except TrackingError:
        raise
    except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
        raise _from_mlflow(uri, doing, error) from error
    except ImportError as error:
        raise _problem(
            f"{redacted(uri)} needs the Python package {error.name!r}, which isn't installed",
            "Install it beside lorasweep.",
        ) from error


def _from_mlflow(uri: str, doing: str, error: Exception) -> TrackingError:
    text = str(error)
    stale = re.search(r"found version (\w+), but expected (\w+)", text)
    if stale is None:
        return _problem(
            f"MLflow at {redacted(uri)} could not {doing}: {_first_line(error)}",
            "See that the store answers and its disk has room, and run the same command again.",
        )
    versions = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if any(versions.glob(f"{stale[1]}_*.py")):
        advice = f"Copy the database to a safe place, then run: mlflow db upgrade {redacted(uri)}"
        return _problem(f"{redacted(uri)} was written by an older MLflow", advice)
    return _problem(
        f"{redacted(uri)} was written by a newer MLflow than the {mlflow.__version__} installed",
        "Install the newer one, or name another store.",
    )


def _check_sqlite(uri: str, *, writing: bool) -> None:
    path = sqlite_path(uri)
    if path is None or str(path) == ":memory:":
        raise _problem(f"{uri!r} keeps nothing on disk", "Write sqlite:////absolute/path.db.")
    try:
        if writing:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _check_folder(path.parent)
            return
        with path.open("rb") as file:
            beginning = file.read(len(_SQLITE_MAGIC))
        if beginning and beginning != _SQLITE_MAGIC:
            raise _problem(f"{path} is not a SQLite database", "Name another file.")
        with closing(sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")  # what a write needs, and nothing is written
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
            database.execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        locked = "locked" in str(error)
        raise _problem(
            f"{path} can't be opened for writing ({_first_line(error)})",
            "Another process holds it: wait for it, or stop it."
            if locked
            else "Look at its permissions and at the room on its disk, or name another place.",
        ) from error
    if tables and "experiments" not in tables:
        # MLflow would create its tables among the others', and share their alembic_version.
        raise _problem(f"{path} is a database, but not MLflow's", "Name a file of its own.")


def _check_folder(folder: Path) -> None:
    """Raise OSError unless the nearest folder that exists can be written to."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")


def _check_server(uri: str) -> None:
    with telling(uri, "answer"), impatient():
        try:
            _ping(uri)
        except MlflowException as error:
            raise _problem(
                f"no MLflow server answers at {redacted(uri)} ({_root_cause(error)})",
                "Start it, or correct the address; `sqlite` needs no server.",
            ) from error


def _ping(uri: str) -> None:
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)


def _check_database(uri: str) -> None:
    try:
        url = sqlalchemy.make_url(uri)
    except ArgumentError as error:
        raise _problem(f"{redacted(uri)!r} is not a database URL", "") from error
    if url.host:
        port = url.port or {"postgresql": 5432, "mysql": 3306}.get(url.get_backend_name(), 1433)
        try:
            socket.create_connection((url.host, port), timeout=PATIENCE).close()
        except OSError as error:
            raise _problem(
                f"no database answers at {url.host}:{port} ({_first_line(error)})",
                "Start it, or correct the address; `sqlite` needs no server.",
            ) from error
    with telling(uri, "connect"):
        # The drivers of these two know the setting, and else wait for ever.
        patient = {} if url.get_backend_name() == "mssql" else {"connect_timeout": PATIENCE}
        engine = sqlalchemy.create_engine(url, connect_args=patient)
        try:
            engine.connect().close()
        finally:
            engine.dispose()


@contextmanager
def settings(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while: much of MLflow can be told in no other way."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def impatient() -> AbstractContextManager[None]:
    """Have MLflow ask a server once and briefly."""
    return settings(
        {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE),
        }
    )


def _quiet() -> None:
    """Leave MLflow's loggers their errors only, unless the user asked for more."""
    if "MLFLOW_LOGGING_LEVEL" in os.environ:
        return
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    # It logs a traceback of every database error that it then raises; the sentence is enough.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _problem(what: str, advice: str) -> TrackingError:
    return TrackingError(Problem(WHERE, what, advice))


def _root_cause(error: BaseException) -> str:
    """The innermost reason of a failed request; what surrounds it is five lines of wrapping."""
    for reason in ("Connection refused", "Name or service not known", "timed out"):
        if reason in str(error):
            return reason.lower()
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    """The first line of what an exception says, short enough for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # MLflow names the address that it asked, with the password in it.
    line = re.sub(r"\S+://\S+", lambda found: redacted(found[0]), lines[0])
    return line[:300].rstrip(". ")
