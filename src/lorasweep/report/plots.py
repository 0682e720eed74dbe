"""The figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lorasweep.core.outcomes import TrialRecord, TrialState
from lorasweep.report.drawing import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    TITLE,
    as_they_are,
    legend_below,
    new_figure,
    shorten,
    thin_ticks,
    tidy,
)
from lorasweep.report.findings import Findings

Drawn = Figure | None  # None: there is nothing to draw

_MOST_TRIALS = 40  # rows of the comparison; the page's table has them all
_MOST_PANELS = 4
_MOST_SAMPLES = 8


def hyperparameter_comparison(findings: Findings) -> Drawn:
    """Draw the trials by validation score, and the score against each sampled value."""
    sweep = findings.sweep
    scored = sorted(
        (trial for trial in sweep.trials if trial.score is not None),
        key=lambda trial: (-(trial.score or 0.0), trial.number),
    )
    if not scored:
        return None
    shown = scored[:_MOST_TRIALS]
    panels = _panels(scored)
    height = max(3.4, 1.5 + 0.3 * len(shown), 2.3 * ((len(panels) + 1) // 2) + 0.6)
    figure = new_figure(12.0 if panels else 8.0, height)
    grid = figure.add_gridspec(
        max(1, (len(panels) + 1) // 2),
        4,
        width_ratios=(1.7, 0.02, 1, 1 if len(panels) > 1 else 0.01),
    )
    axes = figure.add_subplot(grid[:, 0] if panels else grid[:, :])
    _ranking(axes, findings, shown)
    left_out, unscored = len(scored) - len(shown), len(sweep.trials) - len(scored)
    notes = [f"{left_out} more trials in the table"] if left_out else []
    notes += [f"{unscored} without a score"] if unscored else []
    axes.set_xlabel(f"validation {sweep.objective}" + (f" ({', '.join(notes)})" if notes else ""))
    axes.set_title(f"Trials by validation {sweep.objective}", **TITLE)
    for place, key in enumerate(panels):
        panel = figure.add_subplot(grid[place // 2, 2 + place % 2])
        _scatter(panel, scored, key, sweep.best.number)
        if place % 2 == 0:
            panel.set_ylabel(f"validation {sweep.objective}")
    return figure


def learning_curves(findings: Findings) -> Drawn:
    """Draw the validation score of each trial by epoch, the winner's on top."""
    sweep = findings.sweep
    curves = {number: points for number, points in sweep.history.items() if points}
    if not curves:
        return None
    figure = new_figure(8.0, 3.8)
    axes = figure.add_subplot()
    states = {trial.number: trial.state for trial in sweep.trials}
    for number, points in sorted(curves.items(), key=lambda item: item[0] == sweep.best.number):
        best, pruned = number == sweep.best.number, states.get(number) is TrialState.PRUNED
        axes.plot(
            *np.asarray(points, dtype=float).T,
            color=BLUE if best else ORANGE if pruned else GREY,
            linestyle="--" if pruned else "-",
            linewidth=2.4 if best else 1.1,
            marker="o",
            markersize=6 if best else 3,
            alpha=1.0 if best else 0.7,
            label=f"trial {number}, the winner" if best else "pruned" if pruned else "other trials",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"validation {sweep.objective}")
    axes.set_xticks(sorted({epoch for points in curves.values() for epoch, _ in points}))
    thin_ticks(axes)
    tidy(axes)
    legend_below(axes)
    axes.set_title("Learning curves", **TITLE)
    return figure


def confusion_matrix(findings: Findings) -> Drawn:
    """Draw what was taken for what: by the strongest baseline, and by the winner."""
    test, sweep = findings.test, findings.sweep
    if test is None:
        return None
    names = sweep.corpus.label_names
    shown: list[tuple[str, Any]] = [("fine-tuned", test.detail.confusion)]
    if test.strongest is not None:
        baseline = sweep.test[test.strongest.name]
        counts = np.zeros((len(names), len(names)), dtype=int)
        np.add.at(counts, (baseline.labels, baseline.predicted), 1)
        shown.insert(0, (f"baseline: {test.strongest.name}", counts))
    side = max(3.6, 0.36 * len(names) + 2.2)
    figure = new_figure(side * len(shown) + 0.8, side + 0.3)
    for place, (title, counts) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        _matrix(axes, np.asarray(counts), names)
        axes.set_title(title, **TITLE)
        axes.set_xlabel("answer")
        if place == 0:
            axes.set_ylabel("truth")
    return figure


def before_after(findings: Findings) -> Drawn:
    """Draw the answers to the sample texts, and their confidence, before and after training."""
    samples = findings.samples[:_MOST_SAMPLES]
    if not samples:
        return None
    names = findings.sweep.corpus.label_names
    figure = new_figure(9.0, 0.95 * len(samples) + 1.1)
    axes = figure.add_subplot()
    for row, sample in enumerate(samples):
        middle = -float(row)
        axes.text(0, middle + 0.30, shorten(sample.text, 105), fontsize=8.5, va="bottom",
                  color=BLACK)  # fmt: skip
        pairs = ((sample.before, 0.14, GREY, "before"), (sample.after, -0.14, BLUE, "after"))
        for values, shift, color, when in pairs:
            top = int(np.argmax(values))
            axes.barh(middle + shift, values[top], height=0.24, color=color,
                      label=when if row == 0 else None)  # fmt: skip
            mark = _mark(names[top], sample.label)
            axes.text(values[top] + 0.01, middle + shift, f"{names[top]} ({values[top]:.2f}){mark}",
                      fontsize=8.5, va="center", color=BLACK)  # fmt: skip
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylim(-len(samples) + 0.5, 0.72)
    axes.set_yticks([])
    axes.set_xlabel("confidence of the answer")
    tidy(axes)
    axes.grid(visible=False)
    legend_below(axes)
    axes.set_title("Before and after fine-tuning", **TITLE)
    as_they_are(axes.texts)
    return figure


def _mark(answer: str, truth: str) -> str:
    return "" if not truth else ", right" if answer == truth else ", wrong"


def _ranking(axes: Any, findings: Findings, shown: Sequence[TrialRecord]) -> None:
    """One row a trial: a dot at its score, its configuration to the left."""
    best = findings.sweep.best.number
    places = -np.arange(len(shown))
    for place, trial in zip(places, shown, strict=True):
        pruned = trial.state is not TrialState.COMPLETED
        color = BLUE if trial.number == best else ORANGE if pruned else GREY
        axes.plot(trial.score, place, marker="X" if pruned else "o", color=color, markersize=9)
        axes.annotate(f"{trial.score:.3f}", (trial.score, place), xytext=(8, 0), va="center",
                      textcoords="offset points", fontsize=8, color=BLACK)  # fmt: skip
    keys = sorted({key for trial in shown for key in trial.parameters})
    labels = [_row_label(trial, keys) for trial in shown]
    axes.set_yticks(places, labels=labels, fontsize=8)
    as_they_are(axes.get_yticklabels())
    for state, color, marker in (
        ("winner", BLUE, "o"), ("completed", GREY, "o"), ("pruned or stopped", ORANGE, "X"),
    ):  # fmt: skip
        axes.plot([], [], linestyle="", marker=marker, color=color, label=state)
    legend_below(axes)
    axes.set_ylim(-len(shown) + 0.4, 0.6)
    axes.margins(x=0.12)
    tidy(axes)


def _row_label(trial: TrialRecord, keys: Sequence[str]) -> str:
    values = "  ".join(
        f"{_short(key)} {_value(trial.parameters[key])}" for key in keys if key in trial.parameters
    )
    return shorten(f"{values}   #{trial.number}", 72)


def _short(key: str) -> str:
    return {"learning_rate": "lr", "batch_size": "batch", "weight_decay": "decay"}.get(key, key)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return str(value)


def _power(value: float) -> str:
    """Return a short power of ten: 0.0003 is 3e-4."""
    number, exponent = f"{value:.0e}".split("e")
    return f"{number}e{int(exponent)}"


def _panels(scored: Sequence[TrialRecord]) -> list[str]:
    """Sampled values that differ between trials, the most varied first, at most four."""
    varied = {}
    for key in sorted({key for trial in scored for key in trial.parameters}):
        values = {repr(trial.parameters.get(key)) for trial in scored if key in trial.parameters}
        if len(values) > 1:
            varied[key] = len(values)
    return sorted(varied, key=lambda key: (-varied[key], key))[:_MOST_PANELS]


def _scatter(axes: Any, scored: Sequence[TrialRecord], key: str, best: int) -> None:
    """The score against one sampled value; words and mixed values stand side by side."""
    known = [trial for trial in scored if key in trial.parameters]
    values: list[Any] = [trial.parameters[key] for trial in known]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    distinct = sorted(set(values)) if numeric else sorted({_value(value) for value in values})
    labels = [shorten(_value(value), 14) for value in distinct]
    if numeric and sum(map(len, labels)) > 20:
        places = np.array(values, dtype=float)
        if places.min() > 0 and places.max() / places.min() >= 8:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(3))  # more would run into each other
    else:
        places = np.array([distinct.index(v if numeric else _value(v)) for v in values], float)
        steep = sum(map(len, labels)) > 24
        axes.set_xticks(range(len(distinct)), labels=labels, rotation=30 if steep else 0)
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        as_they_are(axes.get_xticklabels())
    for place, trial in zip(places, known, strict=True):
        pruned = trial.state is not TrialState.COMPLETED
        winner = trial.number == best
        axes.plot(place, trial.score, marker="X" if pruned else "o", markersize=9 if winner else 6,
                  color=BLUE if winner else ORANGE if pruned else GREY,
                  zorder=3 if winner else 2, alpha=1 if winner else 0.8)  # fmt: skip
    axes.set_title(key.replace("_", " "), loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    tidy(axes)


def _matrix(axes: Any, counts: np.ndarray[Any, Any], names: Sequence[str]) -> None:
    """Counts in the cells; the shade is the share of the truth's row."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 11 if len(names) <= 4 else 8 if len(names) <= 10 else 6
    for row, column in np.ndindex(*counts.shape):
        if not counts[row, column] and len(names) > 6:
            continue
        text = f"{counts[row, column]:,}"
        if len(names) <= 4:
            text += f"\n{share[row, column]:.1%}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size,
                  color="white" if share[row, column] > 0.55 else BLACK)  # fmt: skip
    labels = [shorten(name, 18) for name in names]
    steep = len(names) > 4 or max(map(len, labels)) > 9
    axes.set_xticks(range(len(names)), labels=labels, fontsize=9, rotation=40 if steep else 0,
                    ha="right" if steep else "center")  # fmt: skip
    axes.set_yticks(range(len(names)), labels=labels, fontsize=9)
    as_they_are([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
