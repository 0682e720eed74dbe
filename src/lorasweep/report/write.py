"""From a finished sweep to the folder of its documents."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorasweep.core.errors import InputError, Problem, StorageError
from lorasweep.core.outcomes import FinishedSweep
from lorasweep.evaluation.predictions import write_predictions
from lorasweep.report import plots
from lorasweep.report.collect import collect
from lorasweep.report.drawing import png
from lorasweep.report.findings import Findings
from lorasweep.report.html_report import page
from lorasweep.report.json_report import results, to_text
from lorasweep.report.model_card import card

RESULTS = "fine_tuning_results.json"
PREDICTIONS = "predictions.csv"
PAGE = "index.html"
CARD = "model_card.md"
FIGURES: dict[str, Callable[[Findings], plots.Drawn]] = {
    "hyperparameter_comparison.png": plots.hyperparameter_comparison,
    "learning_curves.png": plots.learning_curves,
    "confusion_matrix.png": plots.confusion_matrix,
    "before_after.png": plots.before_after,
}
_DOCUMENTS = (RESULTS, PREDICTIONS, *FIGURES, CARD, PAGE)


def check_out(out: Path) -> None:
    """Refuse a folder in which a report would replace files that no report wrote.

    Raises:
        InputError: It holds a file of a document's name, and no results of a report.
    """
    try:
        ours = "schema_version" in json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    strange = [] if ours else [path.name for path in documents(out)]
    if strange:
        what = f"holds {', '.join(strange)}, which no report wrote and this one would replace"
        raise InputError(Problem(str(out), what, "Give another folder with --out."))


def documents(out: Path) -> list[Path]:
    """The files of a report that are there, and nothing else that lies beside them."""
    return [out / name for name in _DOCUMENTS if (out / name).is_file()]


def write_report(finished: FinishedSweep, out: Path) -> Path:
    """Write every document of a sweep and return the page to read.

    All of them are made in a folder beside ``out`` first and then moved into it one by one,
    the page last, so that an error leaves an older report as it was. Files of other names
    in ``out`` are left alone. The documents depend on ``finished`` only.

    Args:
        finished: The sweep.
        out: The folder; made when it isn't there.

    Returns:
        Path of ``index.html``.

    Raises:
        InputError: Files that no report wrote would be replaced.
        StorageError: The folder can't be written to.
    """
    check_out(out)
    findings = collect(finished)
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out, prefix=".report-"))
        try:
            made = _write_all(findings, staging)
            for name in _DOCUMENTS:
                if name in made:
                    (staging / name).replace(out / name)
                else:  # of an earlier report, and not true any more
                    (out / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        advice = "Give another folder with --out, or make room."
        what = f"the report can't be written ({error.strerror or error})"
        raise StorageError(Problem(str(out), what, advice)) from error
    return out / PAGE


def _write_all(findings: Findings, folder: Path) -> set[str]:
    """Write the documents that the findings call for, and return their names."""
    sweep = findings.sweep
    figures = {}
    for name, draw in FIGURES.items():
        drawn = draw(findings)
        if drawn is not None:
            figures[name] = png(drawn)
            (folder / name).write_bytes(figures[name])
    made = {RESULTS, PAGE, CARD, *figures}
    if findings.test is not None and sweep.corpus.test is not None:
        models = sweep.test.values()
        write_predictions(
            folder / PREDICTIONS, models, sweep.corpus.test.texts, sweep.corpus.label_names
        )
        made.add(PREDICTIONS)
    document = results(findings, PREDICTIONS if PREDICTIONS in made else None)
    _write(folder / RESULTS, to_text(document))
    _write(folder / CARD, card(findings))
    _write(folder / PAGE, page(findings, figures))
    return made


def _write(path: Path, text: str) -> None:
    # A lone surrogate in a text (JSON can carry one) is written escaped, not refused.
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
