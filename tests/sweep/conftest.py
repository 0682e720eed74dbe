"""What sweeps say and leave, for every test that runs a whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mlflow.entities import Run

from lorasweep.core.paths import sweep_paths
from lorasweep.spec.schema import Spec
from lorasweep.tracking.mlflow_tracker import MlflowTracker


class Heard(list[Any]):
    """Collects events; can raise at a chosen one, as Ctrl-C would."""

    def __init__(self, stop_at: Callable[[Any], bool] | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at

    def __call__(self, event: Any) -> None:
        self.append(event)
        if self.stop_at is not None and self.stop_at(event):
            self.stop_at = None
            raise KeyboardInterrupt

    def of(self, kind: type) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture
def hear() -> type[Heard]:
    """A listener: ``hear()``, or ``hear(stop_at=...)`` for one that presses Ctrl-C."""
    return Heard


@pytest.fixture
def open_tracker() -> Callable[[Spec], MlflowTracker]:
    def make(spec: Spec) -> MlflowTracker:
        paths = sweep_paths(spec.output, spec.name)
        uri = paths.tracking_uri(spec.tracking.uri)
        return MlflowTracker.open(
            uri, spec.tracking.experiment or spec.name, paths.mlflow_artifacts
        )

    return make


@pytest.fixture
def runs_by_name(
    open_tracker: Callable[[Spec], MlflowTracker],
) -> Callable[[Spec], dict[str, Run]]:
    def find(spec: Spec) -> dict[str, Run]:
        tracker = open_tracker(spec)
        runs = tracker.client.search_runs([tracker.experiment_id])
        return {run.info.run_name: run for run in runs}

    return find


_VARYING = {"training_time_seconds", "mlflow_run_id", "tracking", "environment", "run_id"}


def _without_times_and_ids(document: Any) -> Any:
    if isinstance(document, dict):
        return {
            key: _without_times_and_ids(value)
            for key, value in document.items()
            if key not in _VARYING and "time" not in key
        }
    if isinstance(document, list):
        return [_without_times_and_ids(item) for item in document]
    return document


@pytest.fixture
def without_times_and_ids() -> Callable[[Any], Any]:
    """Cut results down to what two runs of one spec must agree on."""
    return _without_times_and_ids
