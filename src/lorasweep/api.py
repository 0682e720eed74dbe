"""What the command line does, as functions: run a sweep, report on it, export its winner."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorasweep.core.errors import NothingToReportError, Problem, SpecError
from lorasweep.core.outcomes import FinishedSweep
from lorasweep.deploy.export import export
from lorasweep.executors.in_process import OpenSweep, finish, must_exist, open_sweep, train
from lorasweep.model.checkpoint import storing
from lorasweep.report.json_report import load_report
from lorasweep.report.write import RESULTS, check_out, documents, write_report
from lorasweep.spec.loader import load_spec
from lorasweep.spec.schema import Spec
from lorasweep.sweep.conclude import winner_of
from lorasweep.sweep.events import Listener, nobody
from lorasweep.sweep.worker import SweepResult

__all__ = ["SweepReport", "export_sweep", "load_report", "report_sweep", "run_sweep"]


@dataclass(frozen=True, slots=True)
class SweepReport:
    """A sweep and its documents.

    Attributes:
        finished: All that the report is made of.
        page: The page to read, ``index.html``; figures and results lie beside it.
    """

    finished: FinishedSweep
    page: Path

    @property
    def results(self) -> Path:
        """The path of ``fine_tuning_results.json``."""
        return self.page.parent / RESULTS


def run_sweep(
    spec: Spec | str | Path,
    overrides: Iterable[str] = (),
    *,
    listener: Listener = nobody,
    report: bool = True,
) -> tuple[SweepResult, SweepReport | None]:
    """Carry a sweep on to its total and report; called again, it goes on where it stopped.

    Args:
        spec: A spec, or the path of its YAML file.
        overrides: ``KEY=VALUE`` words, as for ``--set``; only with a path.
        listener: Called with every event while the sweep runs.
        report: Whether to open the test split and report once the total is reached.

    Returns:
        How the trials ended, and the report; None for the latter when it was not asked for
        or the total was not reached in time.

    Raises:
        InputError: For anything that can't be used, before any training.
        NothingToReportError: When not a single trial completed.
    """
    spec = _spec(spec, overrides)
    with open_sweep(spec, listener) as sweep:
        result = train(sweep, listener)
        if result.best is None and result.finished:
            reasons = [record.reason for record in result.records if record.reason]
            why = f" The last one said: {reasons[-1]}" if reasons else ""
            raise NothingToReportError(f"None of the trials of {spec.name} completed.{why}")
        if not report or not result.finished:
            return result, None
        return result, _write(sweep, sweep.prepared.paths.report, listener)


def report_sweep(
    spec: Spec | str | Path,
    overrides: Iterable[str] = (),
    *,
    out: str | Path | None = None,
    listener: Listener = nobody,
) -> SweepReport:
    """Write the report of a sweep that was run, finished or not.

    Args:
        spec: A spec, or the path of its YAML file.
        overrides: ``KEY=VALUE`` words, as for ``--set``; only with a path.
        out: Folder to write to; None for the sweep's own ``report`` folder.
        listener: Called with every event.

    Raises:
        InputError: For anything that can't be used.
        NothingToReportError: When the sweep was never run, or no trial completed.
    """
    spec = _spec(spec, overrides)
    must_exist(spec)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out(folder)  # before the test split is opened
    with open_sweep(spec, listener) as sweep:
        return _write(sweep, folder or sweep.prepared.paths.report, listener)


def export_sweep(
    spec: Spec | str | Path,
    to: str | Path,
    overrides: Iterable[str] = (),
    *,
    listener: Listener = nobody,
) -> Path:
    """Write the winner as a folder that plain transformers loads.

    Args:
        spec: A spec, or the path of its YAML file.
        to: The folder to make.
        overrides: ``KEY=VALUE`` words, as for ``--set``; only with a path.
        listener: Called with every event.

    Raises:
        InputError: For anything that can't be used, such as a folder that holds other files.
        NothingToReportError: When the sweep was never run, or no trial completed.
    """
    spec = _spec(spec, overrides)
    must_exist(spec)
    with open_sweep(spec, listener) as sweep:
        prepared, best = sweep.prepared, winner_of(sweep.prepared, sweep.study)
        manifest = {
            "sweep": spec.name,
            "trial": best.number,
            "run_id": best.run_id,
            "parameters": dict(best.parameters),
            "validation_metrics": dict(best.metrics),
            "seed": best.seed,
            "spec_fingerprint": prepared.fingerprint,
            "data_fingerprint": prepared.corpus.fingerprint,
        }
        return export(prepared.base, prepared.paths.adapter(best.number), Path(to), manifest)


def _spec(spec: Spec | str | Path, overrides: Iterable[str]) -> Spec:
    if not isinstance(spec, Spec):
        return load_spec(spec, overrides)
    if words := list(overrides):
        what = "overrides go with the path of a spec, not with one that is loaded already"
        raise SpecError(Problem(f"--set {words[0]}", what, "Give them to load_spec."))
    return spec


def _write(sweep: OpenSweep, out: Path, listener: Listener) -> SweepReport:
    finished = finish(sweep, listener)
    page = write_report(finished, out)
    # A copy, since a user's own files may lie beside the report's, and are nobody else's business.
    with (
        storing(out, "a copy of the report"),
        tempfile.TemporaryDirectory(dir=out, prefix=".report-") as scratch,
    ):
        for document in documents(out):
            shutil.copy(document, scratch)
        sweep.tracker.log_artifacts(finished.tracking["run_id"], Path(scratch), "report")
    return SweepReport(finished, page)
