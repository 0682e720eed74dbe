"""Where a sweep writes: one place that knows the layout of ``mlruns/``.

::

    mlruns/
      mlflow.db                       runs, params, metrics (tracking.uri: sqlite)
      artifacts/                      what MLflow keeps of each run
      optuna.db                       the studies
      sweeps/<name>/
        spec.yaml                     the resolved spec
        lock                          held while a sweep runs
        trials/0005/                  adapter/ of the best epoch; checkpoint while it runs
        engine.jsonl                  how each command trained: lanes, memory, real tokens
        test/                         predictions of the finalists; the ledger of openings
        report/                       fine_tuning_results.json, figures, index.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorasweep.core.errors import Problem, SpecError
from lorasweep.core.plans import CHECKPOINT


@dataclass(frozen=True, slots=True)
class SweepPaths:
    """The folders and files of one sweep.

    Attributes:
        root: The ``mlruns`` folder, absolute.
        name: The sweep's name; already known to be a plain folder name.
    """

    root: Path
    name: str

    @property
    def mlflow_database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def optuna_database(self) -> Path:
        return self.root / "optuna.db"

    @property
    def sweep(self) -> Path:
        return self.root / "sweeps" / self.name

    @property
    def spec(self) -> Path:
        return self.sweep / "spec.yaml"

    @property
    def lock(self) -> Path:
        return self.sweep / "lock"

    @property
    def engine(self) -> Path:
        return self.sweep / "engine.jsonl"

    @property
    def test(self) -> Path:
        return self.sweep / "test"

    @property
    def report(self) -> Path:
        return self.sweep / "report"

    def tracking_uri(self, uri: str) -> str:
        """The MLflow URI that a spec's ``tracking.uri`` means; ``sqlite`` becomes absolute."""
        return f"sqlite:///{self.mlflow_database}" if uri == "sqlite" else uri

    def trial(self, number: int) -> Path:
        """The folder of trial ``number``; the number is also its run's name in MLflow."""
        return self.sweep / "trials" / run_name(number)

    def adapter(self, number: int) -> Path:
        """Where the adapter of the trial's best epoch lies, in PEFT's own format."""
        return self.trial(number) / "adapter"

    def checkpoint(self, number: int) -> Path:
        """Where an engine keeps what continues the trial after it was cut off."""
        return self.trial(number) / CHECKPOINT


def run_name(number: int) -> str:
    """A trial's name in MLflow and on disk: four digits or more, so that names sort as numbers do.

    >>> run_name(5)
    '0005'
    """
    return f"{number:04d}"


def sweep_paths(output: str, name: str) -> SweepPaths:
    """Where a sweep writes, seen from the current folder.

    Args:
        output: The spec's output folder, relative to the current one or absolute.
        name: The sweep's name, already known to be a plain folder name.

    Raises:
        SpecError: When the sweep's folder would lie outside the output folder.
    """
    root = Path(output).expanduser().absolute()
    paths = SweepPaths(root, name)
    # The schema has refused path characters; a symbolic link may still lead elsewhere.
    if not paths.sweep.resolve().is_relative_to(root.resolve()):
        what = f"leads out of {root}, to {paths.sweep.resolve()}"
        raise SpecError(Problem(f"name {name}", what, "Remove the link, or choose another name."))
    return paths
