"""``fine_tuning_results.json``: the findings as strict JSON (see ``results.schema.json``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from lorasweep.core.errors import DataError, Problem
from lorasweep.core.outcomes import TrialRecord
from lorasweep.report.findings import Comparison, Findings, TestResult
from lorasweep.report.wording import verdict_sentence

JsonValue = Any  # what json.dumps takes; mypy has no good recursive word for it
SCHEMA_VERSION = "1.0"
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
_TESTED = {  # key in the JSON -> key of the metric
    "test_accuracy": "accuracy",
    "test_f1": "f1",
    "test_f1_macro": "f1_macro",
    "test_f1_weighted": "f1_weighted",
    "test_precision_macro": "precision_macro",
    "test_recall_macro": "recall_macro",
    "test_auc_roc": "auc",
    "test_loss": "loss",
}


def results(findings: Findings, predictions_file: str | None) -> dict[str, JsonValue]:
    """Return the document, ready for strict JSON: numbers that are not finite become null.

    Args:
        findings: What was found.
        predictions_file: Path of the predictions' table relative to the document; None
            without a test split.
    """
    sweep, test = findings.sweep, findings.test
    document = {
        "schema_version": SCHEMA_VERSION,
        "project_info": _project(findings),
        "conclusion": findings.conclusion,
        "cautions": findings.cautions,
        "hyperparameter_experiments": [_experiment(findings, trial) for trial in sweep.trials],
        "best_configuration": _best(findings),
        "final_performance": None if test is None else _performance(test),
        "comparisons": {} if test is None else _comparisons(test),
        "error_analysis": None if test is None else _errors(test),
        "before_after": _before_after(findings),
        "predictions_file": predictions_file,
        "data": {
            "name": sweep.corpus.name,
            "source": sweep.corpus.source,
            "cleaning": [asdict(report) for report in sweep.corpus.cleaning],
            "leakage": [asdict(one) | {"share": one.share} for one in sweep.corpus.leakage],
        },
        "test_set_openings": sweep.openings,
        "environment": dict(sweep.environment) | {"engine": _engine(findings)},
        "tracking": sweep.tracking,
        "provenance": _provenance(findings),
        "spec": sweep.spec,
    }
    plain: dict[str, JsonValue] = _plain(document)
    return plain


def to_text(document: Mapping[str, JsonValue]) -> str:
    """Return strict JSON: keys in the order of the document, no NaN, texts readable as they are."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_report(path: str | Path) -> dict[str, JsonValue]:
    """Read a ``fine_tuning_results.json``, or the one in a report's folder.

    Raises:
        DataError: It isn't there, isn't JSON, or is of another version.
    """
    file = Path(path)
    file = file / "fine_tuning_results.json" if file.is_dir() else file
    try:
        document: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(Problem(str(file), f"is no report that can be read ({error})")) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        what = f"expected schema_version {SCHEMA_VERSION}, got {version}"
        raise DataError(Problem(str(file), what, "Write the report again: lorasweep report SPEC."))
    return dict(document)


def _project(findings: Findings) -> dict[str, Any]:
    sweep = findings.sweep
    test = sweep.corpus.test
    return {
        "name": sweep.name,
        "task": sweep.task,
        "model": sweep.base.get("name", ""),
        "architecture": sweep.base.get("architecture", ""),
        "labels": sweep.corpus.label_names,
        "objective": sweep.objective,
        "dataset": sweep.corpus.name,
        "dataset_size": {
            "train": len(sweep.corpus.train),
            "validation": len(sweep.corpus.validation),
            "test": None if test is None else len(test),
        },
        "trainable_parameters": sweep.facts.trainable_parameters,
        "all_parameters": sweep.facts.all_parameters,
    }


def _experiment(findings: Findings, trial: TrialRecord) -> dict[str, Any]:
    # The three keys of every experiment are there, also where the trial never got so far.
    metrics: dict[str, Any] = dict.fromkeys(("accuracy", "f1", "loss"))
    return {
        "number": trial.number,
        "state": trial.state.value,
        "config": findings.configs[trial.number],
        "sampled": sorted(trial.parameters),
        "final_metrics": metrics | dict(trial.metrics),
        "score": trial.score,
        "best_epoch": trial.best_epoch,
        "scores_by_epoch": findings.sweep.history.get(trial.number, ()),
        "training_time_seconds": trial.seconds,
        "seed": trial.seed,
        "mlflow_run_id": trial.run_id,
        "reason": trial.reason,
        "retry_of": trial.retry_of,
    }


def _best(findings: Findings) -> dict[str, Any]:
    best = findings.sweep.best
    return {
        "number": best.number,
        "config": findings.configs.get(best.number, dict(best.parameters)),
        "objective": findings.sweep.objective,
        "score": best.score,
        "best_epoch": best.best_epoch,
        "final_metrics": dict(best.metrics),
        "mlflow_run_id": best.run_id,
        "adapted_modules": findings.sweep.facts.targets,
    }


def _performance(test: TestResult) -> dict[str, Any]:
    reference = test.reference
    found: dict[str, Any] = {key: test.metrics.get(name) for key, name in _TESTED.items()}
    found |= {
        "test_accuracy_interval": asdict(test.accuracy_interval),
        "per_class": {
            one.name: {
                "precision": one.precision,
                "recall": one.recall,
                "f1": one.f1,
                "support": one.support,
            }
            for one in test.detail.per_class
        },
        "confusion_matrix": test.detail.confusion,
        "baseline_name": None,
        "baseline_accuracy": None,
        "baseline_f1": None,
        "improvement": None,
        "strongest_baseline": None if test.strongest is None else test.strongest.name,
    }
    if reference is not None:
        found |= {
            "baseline_name": reference.name,
            "baseline_accuracy": reference.metrics["accuracy"],
            "baseline_f1": reference.metrics["f1"],
            "improvement": {
                key: test.metrics[key] - reference.metrics[key] for key in ("accuracy", "f1")
            },
        }
    return found


def _comparisons(test: TestResult) -> dict[str, Any]:
    return {name: _comparison(one) for name, one in test.comparisons.items()}


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        **one.metrics,
        "mcnemar": asdict(one.mcnemar) | {"p_value_adjusted": one.p_adjusted},
        "f1_difference": asdict(one.f1_gain),
        "verdict": one.verdict,
        "sentence": verdict_sentence(one),
    }


def _errors(test: TestResult) -> dict[str, Any]:
    found = asdict(test.errors)
    return {
        "rows": found["rows"],
        "errors": found["errors"],
        "error_rate": found["errors"] / found["rows"],
        "patterns": found["patterns"],
        "confusions": found["confusions"],
        "confidence": {
            "right": found["right"],
            "wrong": found["wrong"],
            "calibration": found["calibration"],
            "abstention": found["abstention"],
        },
        "suggestions": found["suggestions"],
        "all_errors": found["mistakes"],
    }


def _before_after(findings: Findings) -> list[dict[str, Any]]:
    names = findings.sweep.corpus.label_names

    def answer(values: tuple[float, ...]) -> dict[str, Any]:
        top = max(range(len(names)), key=values.__getitem__)
        return {
            "predicted": names[top],
            "confidence": values[top],
            "probabilities": dict(zip(names, values, strict=True)),
        }

    return [
        {
            "text": sample.text,
            "label": sample.label or None,
            "before": answer(sample.before),
            "after": answer(sample.after),
        }
        for sample in findings.samples
    ]


def _provenance(findings: Findings) -> dict[str, Any]:
    sweep = findings.sweep
    return {
        "spec_fingerprint": sweep.spec_fingerprint,
        "data_digests": dict(sweep.corpus.digests),
        "data_fingerprint": sweep.corpus.fingerprint,
        "base_model": sweep.base.get("name", ""),
        "base_model_digest": sweep.base.get("digest", ""),
        "git_commit": sweep.environment.get("git_commit"),
        "seeds": dict(sweep.seeds),
    }


def _engine(findings: Findings) -> list[dict[str, Any]]:
    return [
        asdict(use)
        | {
            "trials_at_once": use.trials_at_once,
            "busy_share": use.busy_share,
            "step_time_share": use.step_time_share,
            "real_token_share": use.real_share,
        }
        for use in findings.sweep.engine_uses
    ]


def _plain(value: Any) -> Any:
    """Return what strict JSON takes: lists and string keys, null for numbers that aren't finite."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) else str(value)
