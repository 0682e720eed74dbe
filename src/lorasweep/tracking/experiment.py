"""The experiment that a sweep's runs lie in, and the lock under which it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from lorasweep.core.errors import Problem, TrackingError
from lorasweep.tracking import store
from lorasweep.tracking.wording import redacted

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI asks, or guesses


def open_experiment(
    client: MlflowClient, uri: str, name: str, artifacts: Path | None
) -> Experiment:
    """Return the experiment of that name, creating it where there is none.

    Args:
        client: Of the store.
        uri: The store's URI.
        name: The experiment's name.
        artifacts: Where a new one in a database keeps its artifacts; a server decides itself.

    Raises:
        TrackingError: It was deleted. It isn't brought back on the quiet: whoever deleted it
            meant its runs too, and those would come back with it.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        kept_by_us = artifacts is not None and not uri.startswith(("http:", "https:"))
        location = artifacts.absolute().as_uri() if artifacts and kept_by_us else None
        try:
            return client.get_experiment(client.create_experiment(name, location, _KIND))
        except MlflowException as error:
            # Another process was quicker, on a store that has no file to lock.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            Problem(
                "tracking.experiment",
                f"the experiment {name!r} was deleted in MLflow",
                "Name another one, or bring it back with: MLFLOW_TRACKING_URI="
                f"{redacted(uri)} mlflow experiments restore -x {found.experiment_id}",
            )
        )
    return found


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Hold the lock beside a SQLite file: creating, and searching before creating, are atomic then.

    On any other store it does nothing.

    Raises:
        TrackingError: The file can't be used, or another process has held the lock for a minute.
    """
    path = store.sqlite_path(uri)
    if path is None or not path.is_absolute():
        yield
        return
    store.check(uri)  # also creates the folder that the lock lies in
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=60)
    except (Timeout, OSError) as error:
        raise TrackingError(
            Problem(
                store.WHERE,
                f"the lock beside {path} can't be taken; another process may be setting it up",
                f"Stop that process, or look at {lock.lock_file}.",
            )
        ) from error
    try:
        yield
    finally:
        lock.release()
