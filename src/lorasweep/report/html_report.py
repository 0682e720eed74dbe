"""``index.html``: one page that needs nothing else, with its figures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorasweep.core.engine_use import in_mebibytes
from lorasweep.core.outcomes import TrialRecord, TrialState
from lorasweep.evaluation.significance import format_p
from lorasweep.report.findings import Findings, Sample
from lorasweep.report.wording import verdict_sentence

_TEMPLATES = Path(__file__).with_name("templates")


def page(findings: Findings, figures: Mapping[str, bytes]) -> str:
    """Return the page; every text from the data is escaped, and nothing is loaded from elsewhere.

    Args:
        findings: What was found.
        figures: PNG files by name.
    """
    sweep, test = findings.sweep, findings.test
    return (
        environment()
        .get_template("index.html.j2")
        .render(
            findings=findings,
            sweep=sweep,
            test=test,
            names=sweep.corpus.label_names,
            tone=_tone(findings),
            tiles=_tiles(findings),
            trials=_sorted_trials(findings),
            sampled=sorted({key for trial in sweep.trials for key in trial.parameters}),
            samples=[_answers(sample, sweep.corpus.label_names) for sample in findings.samples],
            patterns=_patterns(findings),
            figures={name: _data_uri(content) for name, content in figures.items()},
            verdict_sentence=verdict_sentence,
        )
    )


def environment() -> Environment:
    """Return the templates' environment: autoescaped, and strict about names."""
    # The ending .j2 hides .html from select_autoescape; all templates here are HTML.
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "p_value": format_p,
        "score": lambda value: "–" if value is None else f"{value:.4f}",
        "percent": lambda value: "–" if value is None else f"{value:.1%}",
        "signed": lambda value: f"{value:+.4f}",
        "whole": lambda value: f"{value:,}",
        "value": _value,
        "mebibytes": in_mebibytes,
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))),
    }
    return found


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _tone(findings: Findings) -> str:
    """The colour of the conclusion: that of the comparison with the strongest baseline."""
    test = findings.test
    return "undecided" if test is None or test.strongest is None else test.strongest.verdict


def _tiles(findings: Findings) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, what it is compared with."""
    sweep, test = findings.sweep, findings.test
    best = sweep.best
    score = "–" if best.score is None else f"{best.score:.4f}"
    tiles = [(f"validation {sweep.objective}", score, f"trial {best.number}")]
    if test is not None:
        against = {"accuracy": "", "f1": ""}
        if test.strongest is not None:
            against = {
                key: f"{test.strongest.name} {test.strongest.metrics[key]:.4f}" for key in against
            }
        tiles += [
            ("test F1", f"{test.metrics['f1']:.4f}", against["f1"]),
            ("test accuracy", f"{test.metrics['accuracy']:.4f}", against["accuracy"]),
        ]
        if "auc" in test.metrics:
            tiles.append(("test AUC-ROC", f"{test.metrics['auc']:.4f}", ""))
        tiles.append(("test errors", f"{test.errors.errors:,}", f"of {test.rows:,} texts"))
    trained, everything = sweep.facts.trainable_parameters, sweep.facts.all_parameters
    share = f"{trained / everything:.2%} of {everything:,}" if everything else ""
    tiles.append(("trained parameters", f"{trained:,}", share))
    return tiles


def _sorted_trials(findings: Findings) -> list[TrialRecord]:
    """The best score first; trials without one last, by number."""
    return sorted(
        findings.sweep.trials,
        key=lambda trial: (
            trial.score is None,
            trial.state is not TrialState.COMPLETED,
            -(trial.score or 0.0),
            trial.number,
        ),
    )


def _answers(sample: Sample, names: tuple[str, ...]) -> dict[str, Any]:
    def answer(values: tuple[float, ...]) -> dict[str, Any]:
        top = max(range(len(names)), key=values.__getitem__)
        right = None if not sample.label else names[top] == sample.label
        return {"name": names[top], "confidence": values[top], "right": right}

    return {
        "text": sample.text,
        "label": sample.label,
        "before": answer(sample.before),
        "after": answer(sample.after),
    }


def _patterns(findings: Findings) -> list[Any]:
    """Kinds of text with the clearest difference first."""
    if findings.test is None:
        return []
    return sorted(findings.test.errors.patterns, key=lambda one: (one.p_value, one.name))
