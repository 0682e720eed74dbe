"""Sweeps and trials as MLflow runs, by explicit run ids; implements ``core.protocols.Tracker``."""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType

from lorasweep.core.corpora import Corpus
from lorasweep.core.errors import Problem, TrackingError
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import run_name
from lorasweep.core.plans import ParameterValue
from lorasweep.tracking import store, wording
from lorasweep.tracking.experiment import alone, open_experiment
from lorasweep.tracking.inputs import dataset_inputs
from lorasweep.tracking.view import save_view

STUDY_TAG = "lorasweep.study"
TRIAL_TAG = "lorasweep.trial"
KIND_TAG = "lorasweep.kind"
STATE_TAG = "lorasweep.state"
OBJECTIVE_TAG = "lorasweep.objective"
CHANGED_TAG = "lorasweep.changed."
IDENTITY_TAGS = ("lorasweep.spec", "lorasweep.study_id")
"""Tags that, where both sides have them, must agree for a parent run to be the sweep's own: a
study that was deleted and begun anew under the same name counts its trials from 0 again."""

_PARENT_TAG = "mlflow.parentRunId"
_PARAMS_A_BATCH = 100
_METRICS_A_BATCH = 1000
_FINAL = {
    TrialState.COMPLETED: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAILED: "FAILED",
    TrialState.INTERRUPTED: "KILLED",
}
_OPEN_STATUSES = ("RUNNING", "SCHEDULED")

T = TypeVar("T")


class MlflowTracker:
    """Writes one parent run per sweep, and one nested run per trial, into one experiment.

    Every call names its run; the fluent API's active run and the global tracking URI are
    neither read nor set, so a caller's own MLflow code and other sweeps are left alone.
    Everything that goes wrong inside is a TrackingError.

    Attributes:
        client: MLflow's client of the store.
        uri: The tracking URI.
        experiment: The experiment's name.
        experiment_id: Its id.
    """

    def __init__(self, client: MlflowClient, uri: str, experiment: Experiment) -> None:
        self.client = client
        self.uri = uri
        self.experiment: str = experiment.name
        self.experiment_id: str = experiment.experiment_id

    @classmethod
    def open(cls, uri: str, experiment: str, artifacts: Path | None) -> MlflowTracker:
        """Open the store, creating database and experiment where they aren't there yet.

        Args:
            uri: An MLflow tracking URI; that of a SQLite file has an absolute path.
            experiment: Name of the experiment.
            artifacts: Where a new experiment in a database keeps its artifacts; None leaves
                that to MLflow. A server decides for itself.

        Raises:
            TrackingError: The store can't be used, or the experiment was deleted.
        """
        with alone(uri):
            client = store.open_client(uri)
            with store.telling(uri, f"open the experiment {experiment!r}"):
                return cls(client, uri, open_experiment(client, uri, experiment, artifacts))

    # ---------------------------------------------------------------------------- sweeps

    def find_sweep(self, name: str, tags: Mapping[str, str] | None = None) -> str | None:
        """Return the id of the sweep's parent run, as it stands; None if there is none.

        Args:
            name: The sweep's name.
            tags: Where these bear one of IDENTITY_TAGS, the run's must be the same.
        """
        runs = self._search(f"tags.`{STUDY_TAG}` = {_quoted(name)} AND tags.`{KIND_TAG}` = 'sweep'")
        mine = [run for run in runs if _same_identity(run.data.tags, tags or {})]
        mine.sort(key=lambda run: (run.info.start_time, run.info.run_id))
        if not mine:
            return None
        # Two of one identity were opened at the same time, and the older is everybody's. But
        # where any identity will do, the sweep of that name is the one begun last.
        named = any(tag in IDENTITY_TAGS for tag in tags or {})
        return str((mine[0] if named else mine[-1]).info.run_id)

    def open_sweep(self, name: str, tags: Mapping[str, str]) -> str:
        """Return the id of the sweep's parent run: the one it already has, else a new one.

        A parent that was finished is RUNNING again from here on: the sweep goes on, and
        :meth:`finish` will say how it ended. ``tags`` replace what was there.
        """
        with alone(self.uri), self._telling(f"open the run of sweep {name!r}"):
            found = self.find_sweep(name, tags)
            everything = {
                "mlflow.note.content": f"The sweep `{name}`; its trials are nested in it.",
                **self._source_tags(),
                **tags,
                STUDY_TAG: name,
                KIND_TAG: "sweep",
            }
            if found is None:
                created = self._create(name, everything)
                # On a server, another process may have done the same meanwhile; the older wins.
                found = self.find_sweep(name, tags) or created
                if found != created:
                    self.client.delete_run(created)
            else:
                self.set_tags(found, {**everything, STATE_TAG: TrialState.RUNNING.value})
                self.client.update_run(found, status="RUNNING")
            metric = f"val_{tags.get(OBJECTIVE_TAG, 'f1')}"
            save_view(self.client, self.experiment_id, name=name, parent=found, sort_by=metric)
            return found

    def runs_left_open(self, parent: str) -> list[tuple[int, str]]:
        """Return ``(number, run id)`` of the sweep's trials that have no final status yet."""
        runs = self._search(f"tags.`{_PARENT_TAG}` = {_quoted(parent)}")
        return sorted(
            (int(run.data.tags.get(TRIAL_TAG, -1)), str(run.info.run_id))
            for run in runs
            if run.info.status in _OPEN_STATUSES
        )

    # ---------------------------------------------------------------------------- trials

    def start_trial(
        self,
        parent: str,
        number: int,
        params: Mapping[str, ParameterValue],
        tags: Mapping[str, str],
    ) -> str:
        """Open a nested run named by the trial's number and return its id."""
        with self._telling(f"open the run of trial {number}"):
            run_id = self._create(
                run_name(number),
                {
                    **self._source_tags(),
                    **tags,
                    KIND_TAG: "trial",
                    TRIAL_TAG: str(number),
                    _PARENT_TAG: parent,
                },
            )
            self.log_params(run_id, params)
            return run_id

    def find_trial(self, parent: str, number: int) -> str | None:
        """Return the id of a trial's run, the latest if there are several; None without one."""
        runs = self._search(
            f"tags.`{_PARENT_TAG}` = {_quoted(parent)} AND tags.`{TRIAL_TAG}` = '{number}'"
        )
        latest = max(runs, key=lambda run: run.info.start_time, default=None)
        return None if latest is None else str(latest.info.run_id)

    def log_params(self, run_id: str, params: Mapping[str, ParameterValue]) -> None:
        """Write parameters; long values are shortened with a digest, never refused.

        A run's params can't be changed. A name that already has another value keeps it, and
        the new one is written as the tag ``lorasweep.changed.NAME``.
        """
        with self._telling("log parameters"):
            known = self.client.get_run(run_id).data.params
            wanted = {wording.key(name): wording.param_text(v) for name, v in params.items()}
            new = [Param(name, text) for name, text in wanted.items() if name not in known]
            for batch in _batches(new, _PARAMS_A_BATCH):
                self.client.log_batch(run_id, params=batch)
            changed = {n: text for n, text in wanted.items() if known.get(n, text) != text}
            if changed:
                self.set_tags(run_id, {CHANGED_TAG + name: t for name, t in changed.items()})

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], *, step: int, epoch: int | None = None
    ) -> None:
        """Write metrics at an optimizer step; values that are not finite are kept as they are.

        ``epoch`` is written as a metric of its own, so that the UI can draw it over steps.
        (A database keeps NaN as NaN and writes ±inf as the largest double.)
        """
        now = int(time.time() * 1000)
        values = dict(metrics) if epoch is None else {**metrics, "epoch": epoch}
        found = [Metric(wording.key(name), float(v), now, step) for name, v in values.items()]
        with self._telling("log metrics"):
            for batch in _batches(found, _METRICS_A_BATCH):
                self.client.log_batch(run_id, metrics=batch)

    def has_corpus(self, run_id: str) -> bool:
        """Whether :meth:`log_corpus` was done for a run."""
        with self._telling("read a run"):
            return bool(self.client.get_run(run_id).inputs.dataset_inputs)

    def metric_names(self, run_id: str) -> frozenset[str]:
        """Return the names of the metrics that a run has."""
        with self._telling("read a run"):
            return frozenset(self.client.get_run(run_id).data.metrics)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Write tags, replacing those of the same name; long values are shortened."""
        with self._telling("write tags"):
            for batch in _batches(_run_tags(tags), _PARAMS_A_BATCH):
                self.client.log_batch(run_id, tags=batch)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Keep a text as an artifact, such as the traceback of a failed trial."""
        with self._telling(f"keep {path}"):
            self.client.log_text(run_id, text, path)

    def log_artifacts(self, run_id: str, folder: Path, path: str) -> None:
        """Keep a folder's files as artifacts below ``path``."""
        if not folder.is_dir():
            raise TrackingError(Problem(str(folder), "is not a folder, so it can't be logged"))
        with self._telling(f"keep {folder}"):
            self.client.log_artifacts(run_id, str(folder), path or None)

    def log_corpus(self, run_id: str, corpus: Corpus) -> None:
        """Record the splits as dataset inputs, each with its digest."""
        with self._telling("log the data set"):
            self.client.log_inputs(run_id, dataset_inputs(corpus))

    def finish(self, run_id: str, state: TrialState) -> None:
        """Write the run's true final status, once; a status that is final is never overwritten.

        PRUNED and INTERRUPTED are both KILLED in MLflow; the tag ``lorasweep.state`` tells
        them apart.
        """
        if not state.is_final:
            raise ValueError(f"{state} is no way to end a run")
        with self._telling("finish a run"):
            if self.client.get_run(run_id).info.status not in _OPEN_STATUSES:
                return
            # The tag first: if we die in between, the run is still open and is closed again.
            self.set_tags(run_id, {STATE_TAG: state.value})
            # On a server it would print the run's address, into the middle of a live view.
            with store.settings({"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}):
                self.client.set_terminated(run_id, _FINAL[state])

    # -------------------------------------------------------------------------- plumbing

    def _telling(self, doing: str) -> AbstractContextManager[None]:
        return store.telling(self.uri, doing)

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        everything = {STATE_TAG: TrialState.RUNNING.value, **tags}
        run = self.client.create_run(
            self.experiment_id,
            run_name=name,
            tags={tag.key: tag.value for tag in _run_tags(everything)},
        )
        return str(run.info.run_id)

    def _source_tags(self) -> dict[str, str]:
        """What the UI's columns "Source" and "User" show."""
        tags = {"mlflow.source.name": "lorasweep", "mlflow.source.type": "LOCAL"}
        with suppress(OSError, KeyError, ImportError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        return tags

    def _search(self, filter_string: str) -> list[Run]:
        runs: list[Run] = []
        token: str | None = None
        with self._telling("search runs"):
            while True:
                page = self.client.search_runs(
                    [self.experiment_id],
                    filter_string,
                    run_view_type=ViewType.ACTIVE_ONLY,
                    page_token=token,
                )
                runs.extend(page)
                token = page.token
                if not token:
                    return runs


def _same_identity(run: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(run[tag] == wanted[tag] for tag in IDENTITY_TAGS if tag in run and tag in wanted)


def _run_tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [
        RunTag(wording.key(name), wording.shortened(str(value), wording.TAG_CHARACTERS))
        for name, value in tags.items()
    ]


def _batches(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def _quoted(value: str) -> str:
    """A value in MLflow's filter language, which has no escape: it takes either quote."""
    return f'"{value}"' if "'" in value else f"'{value}'"
