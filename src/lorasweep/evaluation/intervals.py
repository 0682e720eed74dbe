"""How far a score on this many rows can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.proportion import proportion_confint

_CHUNK = 250  # resamples at a time: bounds the memory at any number of labels


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Attributes:
        low, high: The bounds.
        level: Its confidence level, such as 0.95.
        method: How it was computed.
    """

    low: float
    high: float
    level: float
    method: str


def wilson(correct: int, rows: int, level: float = 0.95) -> Interval:
    """Return the score interval of an accuracy (Wilson 1927, JASA 22).

    >>> interval = wilson(90, 100)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.826, 0.945)
    """
    low, high = proportion_confint(correct, rows, alpha=1 - level, method="wilson")
    # Rounding may carry a bound past the estimate when all or none are right.
    share = correct / rows
    return Interval(min(share, float(low)), max(share, float(high)), level, "Wilson score")


def f1_difference(
    labels: NDArray[np.int64],
    baseline_predicted: NDArray[np.int64],
    finetuned_predicted: NDArray[np.int64],
    label_count: int,
    *,
    seed: int,
    resamples: int = 4000,
    level: float = 0.95,
) -> Interval:
    """Return the paired bootstrap interval of F1(finetuned) - F1(baseline).

    Rows are drawn with replacement, both models' answers together; F1 is that of the last
    label for two labels and the macro average for more. F1 depends only on how often each
    (truth, baseline, finetuned) triple occurs, so a resample is one multinomial draw over
    the triples: the same distribution as drawing rows, far cheaper. The bounds are
    percentiles (Efron 1979, Ann. Stat. 7).

    Args:
        labels: The truth, ``(rows,)``.
        baseline_predicted: Label indices, ``(rows,)``.
        finetuned_predicted: Label indices, ``(rows,)``.
        label_count: Labels of the data set, ≥ 2.
        seed: Of the draws; the same seed gives the same interval.
        resamples: How many draws.
        level: Confidence level.
    """
    triples, counts = np.unique(
        np.stack([labels, baseline_predicted, finetuned_predicted], axis=1),
        axis=0,
        return_counts=True,
    )
    generator = np.random.default_rng(seed)
    differences = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        drawn = generator.multinomial(len(labels), counts / len(labels), size=size)
        new = _f1(drawn, triples[:, 0], triples[:, 2], label_count)
        differences.append(new - _f1(drawn, triples[:, 0], triples[:, 1], label_count))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(differences), [tail, 1 - tail])
    return Interval(float(low), float(high), level, f"paired bootstrap, {resamples} resamples")


def _f1(
    weights: NDArray[np.int64], truth: NDArray[np.int64], said: NDArray[np.int64], labels: int
) -> NDArray[np.float64]:
    """F1 of weighted cells; weights ``(resamples, cells)``, result ``(resamples,)``."""
    scores = []
    for label in [1] if labels == 2 else range(labels):
        hit = weights[:, (truth == label) & (said == label)].sum(axis=1)
        whole = weights[:, truth == label].sum(axis=1) + weights[:, said == label].sum(axis=1)
        scores.append(np.divide(2 * hit, whole, out=np.zeros(len(weights)), where=whole > 0))
    result: NDArray[np.float64] = np.mean(scores, axis=0)
    return result
