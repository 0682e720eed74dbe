"""The figures: drawn on ``Figure`` objects of their own, without pyplot's global state.

Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from lorasweep.core.records import TrialRecord, TrialState
from lorasweep.report.findings import Findings

Drawn = Figure | None  # None: there is nothing to draw

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#9a9a9a", "#222222"
_MOST_TRIALS = 40  # rows of the comparison; the page's table has them all
_MOST_PANELS = 4
_MOST_SAMPLES = 8
_DPI = 150
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic",
          "Noto Sans Devanagari", "WenQuanYi Zen Hei", "Arial Unicode MS")  # fmt: skip


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script that no installed font has is drawn as boxes; the page shows the text itself.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        # The software's version in the file's metadata would change its bytes.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


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
    figure = _figure(12.0 if panels else 8.0, height)
    grid = figure.add_gridspec(
        max(1, (len(panels) + 1) // 2),
        4,
        width_ratios=(1.7, 0.02, 1, 1 if len(panels) > 1 else 0.01),
    )
    axes = figure.add_subplot(grid[:, 0] if panels else grid[:, :])
    _ranking(axes, findings, shown)
    unscored = len(sweep.trials) - len(scored)
    left_out = len(scored) - len(shown)
    notes = [f"{left_out} more trials in the table"] if left_out else []
    notes += [f"{unscored} without a score"] if unscored else []
    title = "Trials by validation " + sweep.objective + (f" ({', '.join(notes)})" if notes else "")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
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
    figure = _figure(8.0, 3.8)
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
    _thin_ticks(axes)
    _tidy(axes)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=9)
    axes.set_title("Learning curves", loc="left", fontsize=11, fontweight="bold")
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
    side = max(3.6, 0.55 * len(names) + 1.8)
    figure = _figure(side * len(shown) + 0.8, side + 0.3)
    for place, (title, counts) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        _matrix(axes, np.asarray(counts), names)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
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
    figure = _figure(9.0, 0.95 * len(samples) + 1.1)
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
            axes.text(values[top] + 0.01, middle + shift, f"{names[top]} {values[top]:.2f}{mark}",
                      fontsize=8.5, va="center", color=BLACK)  # fmt: skip
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylim(-len(samples) + 0.5, 0.72)
    axes.set_yticks([])
    axes.set_xlabel("confidence of the answer")
    _tidy(axes)
    axes.grid(visible=False)
    axes.legend(
        frameon=False,
        fontsize=9,
        loc="upper right",
        ncols=2,
        bbox_to_anchor=(1, 1.0 + 0.5 / len(samples)),
    )
    axes.set_title("Before and after fine-tuning", loc="left", fontsize=11, fontweight="bold")
    _plain(axes.texts)
    return figure


def shorten(text: str, width: int) -> str:
    """Return one line of at most ``width`` characters."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _mark(answer: str, truth: str) -> str:
    return "" if not truth else ", right" if answer == truth else ", wrong"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


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
    _plain(axes.get_yticklabels())
    for state, color, marker in (
        ("winner", BLUE, "o"), ("completed", GREY, "o"), ("pruned or stopped", ORANGE, "X"),
    ):  # fmt: skip
        axes.plot([], [], linestyle="", marker=marker, color=color, label=state)
    axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=3,
                bbox_to_anchor=(0.5, -0.28 / max(1.2, 0.3 * len(shown))))  # fmt: skip
    axes.set_ylim(-len(shown) + 0.4, 0.6)
    axes.margins(x=0.12)
    _tidy(axes)


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
    if numeric and len(set(values)) > 5:
        places = np.array(values, dtype=float)
        if places.min() > 0 and places.max() / places.min() >= 20:
            axes.set_xscale("log")
    else:
        distinct = sorted(set(values)) if numeric else sorted({_value(value) for value in values})
        places = np.array(
            [distinct.index(v if numeric else _value(v)) for v in values], dtype=float
        )
        labels = [shorten(_value(value), 14) for value in distinct]
        axes.set_xticks(range(len(distinct)), labels=labels)
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        _plain(axes.get_xticklabels())
    for place, trial in zip(places, known, strict=True):
        pruned = trial.state is not TrialState.COMPLETED
        winner = trial.number == best
        axes.plot(place, trial.score, marker="X" if pruned else "o", markersize=9 if winner else 6,
                  color=BLUE if winner else ORANGE if pruned else GREY,
                  zorder=3 if winner else 2, alpha=1 if winner else 0.8)  # fmt: skip
    axes.set_title(key.replace("_", " "), loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    _tidy(axes)


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
    _plain([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _thin_ticks(axes: Any, most: int = 15) -> None:
    ticks = axes.get_xticks()
    if len(ticks) > most:
        axes.set_xticks(ticks[:: -(-len(ticks) // most)])


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def _plain(texts: Sequence[Text]) -> None:
    """Show users' words as they are: no mathtext between dollars, and fonts for their script."""
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(list(_installed_fonts()))


@lru_cache(maxsize=1)
def _installed_fonts() -> tuple[str, ...]:
    """Fonts with many scripts that this machine has; naming another one logs a complaint."""
    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FONTS if name in installed)
