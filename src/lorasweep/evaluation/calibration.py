"""Does a confidence of 0.9 mean nine right answers in ten?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorasweep.core.outcomes import Predictions


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The rows whose confidence lies in ``(low, high]``.

    Attributes:
        low, high: The bounds.
        rows: How many rows.
        confidence: Their mean confidence.
        accuracy: Share of them that is right.
    """

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against accuracy.

    Attributes:
        expected_error: Expected calibration error: the mean of ``|accuracy - confidence|``
            over the bins, weighted by their rows (Naeini et al. 2015, AAAI).
        overconfidence: Mean confidence minus accuracy; positive when it claims too much.
        bins: The bins that hold rows, in order of confidence.
    """

    expected_error: float
    overconfidence: float
    bins: tuple[ReliabilityBin, ...]


def calibration(predictions: Predictions, bins: int = 10) -> Calibration:
    """Bin rows by the probability of the predicted label, in bins of equal width.

    Args:
        predictions: At least one row.
        bins: How many bins between 0 and 1.
    """
    confidence = predictions.probabilities.max(axis=1)
    right = predictions.predicted == predictions.labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    filled = tuple(
        ReliabilityBin(
            low=index / bins,
            high=(index + 1) / bins,
            rows=int((place == index).sum()),
            confidence=float(confidence[place == index].mean()),
            accuracy=float(right[place == index].mean()),
        )
        for index in np.unique(place).tolist()
    )
    off = sum(one.rows * abs(one.accuracy - one.confidence) for one in filled)
    return Calibration(
        expected_error=off / len(right),
        overconfidence=float(confidence.mean() - right.mean()),
        bins=filled,
    )
