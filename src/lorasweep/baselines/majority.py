"""The reference without a look at the text: how often each label occurs in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorasweep.core.corpora import TextSplit

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MajorityBaseline:
    """Gives every text the training split's label frequencies, so predicts the most frequent."""

    name = "majority"

    def predict(self, train: TextSplit, texts: Sequence[str], labels: int) -> NDArray[np.float64]:
        """Return the same row for every text, ``(texts, labels)``."""
        return np.tile(label_shares(train, labels), (len(texts), 1))


def label_shares(train: TextSplit, labels: int) -> NDArray[np.float64]:
    """Share of each label among the training rows, ``(labels,)``; even without any rows."""
    counts = np.bincount(np.asarray(train.labels, dtype=np.int64), minlength=labels)
    if not len(train):
        return np.full(labels, 1 / labels)
    return counts.astype(np.float64) / len(train)


def spread(
    probabilities: NDArray[np.float64], classes: NDArray[np.int64], labels: int
) -> NDArray[np.float64]:
    """Put a scikit-learn classifier's columns where their labels belong.

    Args:
        probabilities: ``(texts, classes)``.
        classes: The label of each column; labels without a training row are missing.
        labels: Number of labels in all; the missing ones get probability 0.
    """
    wide = np.zeros((len(probabilities), labels), dtype=np.float64)
    wide[:, classes] = probabilities
    return wide
