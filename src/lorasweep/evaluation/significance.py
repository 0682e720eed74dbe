"""Is the difference between two classifiers on the same rows more than chance?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

# What a p-value too small for a float is reported as: an upper bound, never 0.
SMALLEST_P = sys.float_info.min
_Name = TypeVar("_Name")


@dataclass(frozen=True, slots=True)
class McNemarResult:
    """McNemar's test of two classifiers on the same rows (McNemar 1947, Psychometrika 12).

    Attributes:
        both_correct: Rows that both get right.
        baseline_only: Rows that only the baseline gets right.
        finetuned_only: Rows that only the fine-tuned model gets right.
        both_wrong: Rows that both get wrong.
        p_value: Two-sided and exact, in ``(0, 1]``: chance of a split at least this uneven
            of the discordant rows if both models were equally good.
        method: How the p-value was computed.
    """

    both_correct: int
    baseline_only: int
    finetuned_only: int
    both_wrong: int
    p_value: float
    method: str = "exact binomial"


def mcnemar(
    labels: NDArray[np.int64],
    baseline_predicted: NDArray[np.int64],
    finetuned_predicted: NDArray[np.int64],
) -> McNemarResult:
    """Compare two classifiers row by row, with the exact binomial test.

    Without a discordant row there is nothing to tell them apart: p is 1 by definition.
    Where p is too small for a float, :data:`SMALLEST_P` stands as its upper bound.

    Args:
        labels: The truth, ``(rows,)``.
        baseline_predicted: Label indices, ``(rows,)``.
        finetuned_predicted: Label indices, ``(rows,)``.

    Raises:
        ValueError: The arrays differ in length.

    >>> truth = np.zeros(10, dtype=np.int64)
    >>> baseline = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    >>> result = mcnemar(truth, baseline, np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1]))
    >>> result.both_correct, result.baseline_only, result.finetuned_only, result.both_wrong
    (3, 1, 6, 0)
    >>> result.p_value
    0.125
    >>> mcnemar(truth, baseline, baseline).p_value
    1.0
    """
    if not len(labels) == len(baseline_predicted) == len(finetuned_predicted):
        raise ValueError("the truth and both predictions must have as many rows")
    old = np.asarray(baseline_predicted) == labels
    new = np.asarray(finetuned_predicted) == labels
    table = [[int((old & new).sum()), int((old & ~new).sum())]]
    table.append([int((~old & new).sum()), int((~old & ~new).sum())])
    (both_correct, baseline_only), (finetuned_only, both_wrong) = table
    p_value = 1.0
    if baseline_only + finetuned_only:
        p_value = float(statsmodels_mcnemar(table, exact=True).pvalue)
    return McNemarResult(
        both_correct, baseline_only, finetuned_only, both_wrong, _positive(min(1.0, p_value))
    )


def holm(p_values: Mapping[_Name, float]) -> dict[_Name, float]:
    """Return p-values adjusted for how many there are (Holm 1979, Scand. J. Stat. 6).

    >>> holm({"majority": 0.01, "tfidf": 0.04})
    {'majority': 0.02, 'tfidf': 0.04}
    """
    # By hand, since statsmodels' multipletests collects garbage on every call: half a second
    # in a process that holds a model.
    adjusted, largest = {}, SMALLEST_P
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def format_p(p_value: float) -> str:
    """Return a p-value for people, with its true magnitude and never as 0.

    >>> [format_p(p) for p in (1.0, 0.04321, 0.0012, 2.34e-12, 0.0)]
    ['1', '0.043', '0.0012', '2.3e-12', '< 1e-300']
    """
    return "< 1e-300" if p_value < 1e-300 else f"{p_value:.2g}"


def state_p(p_value: float) -> str:
    """Return ``p = …`` or ``p < …``, ready to stand in a sentence.

    >>> state_p(0.0312), state_p(0.0)
    ('p = 0.031', 'p < 1e-300')
    """
    text = format_p(p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _positive(p_value: float) -> float:
    return max(p_value, SMALLEST_P)
