"""Hyperparameter sweeps and honest comparisons for text classifiers fine-tuned with LoRA.

The names below load what they need on first use, so that ``import lorasweep`` is quick::

    from lorasweep import SentimentAnalyzer, load_report, load_spec, run_sweep
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasweep.api import SweepReport, export_sweep, report_sweep, run_sweep
    from lorasweep.core.errors import InputError, LoraSweepError, NothingToReportError
    from lorasweep.deploy.predict import SentimentAnalyzer
    from lorasweep.report.json_report import load_report
    from lorasweep.spec.loader import load_spec
    from lorasweep.spec.schema import Spec
    from lorasweep.sweep.worker import SweepResult

_HOMES = {
    "InputError": "lorasweep.core.errors",
    "LoraSweepError": "lorasweep.core.errors",
    "NothingToReportError": "lorasweep.core.errors",
    "SentimentAnalyzer": "lorasweep.deploy.predict",
    "Spec": "lorasweep.spec.schema",
    "SweepReport": "lorasweep.api",
    "SweepResult": "lorasweep.sweep.worker",
    "export_sweep": "lorasweep.api",
    "load_report": "lorasweep.report.json_report",
    "load_spec": "lorasweep.spec.loader",
    "report_sweep": "lorasweep.api",
    "run_sweep": "lorasweep.api",
}

__all__ = [
    "InputError",
    "LoraSweepError",
    "NothingToReportError",
    "SentimentAnalyzer",
    "Spec",
    "SweepReport",
    "SweepResult",
    "export_sweep",
    "load_report",
    "load_spec",
    "report_sweep",
    "run_sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lorasweep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
