"""Metrics of a classifier, through an ``evaluate.Metric`` of the project's own.

``evaluate.load("f1")`` fetches code from the Hub, so it fails offline and may change
under a sweep's feet; this one is scikit-learn behind the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from lorasweep.core.errors import DivergedError
from lorasweep.core.outcomes import Predictions

_SMALLEST = float(np.finfo(np.float64).eps)  # as scikit-learn's log_loss clips


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One label against all others.

    Attributes:
        name: The label.
        precision, recall, f1: In ``[0, 1]``; 0 where the denominator is 0.
        support: Rows that truly have the label.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class ClassificationDetail:
    """What a single number hides.

    Attributes:
        per_class: In order of label index.
        confusion: ``confusion[i][j]`` rows of label i were taken for label j.
    """

    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]


class ClassificationMetric(evaluate.Metric):
    """Accuracy, precision, recall, F1, AUC-ROC and log loss from probabilities.

    ``compute(predictions=..., references=...)`` takes probabilities ``(rows, labels)`` and
    label indices ``(rows,)``, and returns the keys of :func:`score`. Everything stays in
    memory: no lock, cache file or folder is made.

    >>> metric = ClassificationMetric()
    >>> found = metric.compute(predictions=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]],
    ...                        references=[0, 1, 1])
    >>> round(found["accuracy"], 3), round(found["f1"], 3), found["auc"]
    (0.667, 0.667, 1.0)
    """

    def __init__(self) -> None:
        # A seed of its own, or the constructor takes one from NumPy's global state.
        super().__init__(keep_in_memory=True, seed=0)

    def _build_data_dir(self) -> str:
        # The library makes this folder in the user's home although nothing is written to it.
        return ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, precision, recall, F1, AUC-ROC and log loss of a classifier.",
            citation="",
            inputs_description=(
                "predictions: probabilities of each label; references: label indices."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return _scores(
            np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.int64)
        )


@lru_cache(maxsize=1)
def _metric() -> ClassificationMetric:
    return ClassificationMetric()


def score(
    logits: NDArray[np.float32], labels: NDArray[np.int64], label_names: Sequence[str]
) -> dict[str, float]:
    """Return every scalar metric of raw logits.

    Args:
        logits: ``(rows, labels)``.
        labels: ``(rows,)``, indices into ``label_names``.
        label_names: In order of index.

    Returns:
        ``accuracy``; ``precision``, ``recall`` and ``f1`` (of the last label for two labels,
        macro for more); ``precision_macro``, ``recall_macro``, ``f1_macro``; ``f1_weighted``;
        ``auc`` (one against the rest, averaged over the labels that occur; left out when
        fewer than two occur); ``loss`` (mean cross-entropy in nats, from the logits).

    Raises:
        DivergedError: A logit is not a finite number.
        ValueError: Shapes disagree or a label is out of range.
    """
    raw = np.asarray(logits, dtype=np.float64)
    truth = np.asarray(labels, dtype=np.int64)
    _check(raw, truth, len(label_names))
    if not np.isfinite(raw).all():
        raise DivergedError("the logits are not finite numbers")
    found = _computed(softmax(raw, axis=1), truth)
    # Exact also where the probability of the truth underflows.
    found["loss"] = float(-log_softmax(raw, axis=1)[np.arange(len(truth)), truth].mean())
    return found


def score_predictions(predictions: Predictions, label_names: Sequence[str]) -> dict[str, float]:
    """Return the keys of :func:`score` for probabilities.

    ``loss`` takes a probability below 2.2e-16 as 2.2e-16, as scikit-learn does, so that a
    baseline that is certain and wrong has a large loss and not an infinite one.
    """
    _check(predictions.probabilities, predictions.labels, len(label_names))
    return _computed(predictions.probabilities, predictions.labels)


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax of logits, ``(rows, labels)``, in float64 without overflow.

    >>> probabilities(np.array([[1000.0, 1000.0], [0.0, -2000.0]], dtype=np.float32)).tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    result: NDArray[np.float64] = softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return result


def detail(predictions: Predictions, label_names: Sequence[str]) -> ClassificationDetail:
    """Return precision, recall and F1 of each label, and the confusion matrix."""
    _check(predictions.probabilities, predictions.labels, len(label_names))
    indices = list(range(len(label_names)))
    columns = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=indices, average=None, zero_division=0
    )
    rows = zip(label_names, *(column.tolist() for column in columns), strict=True)
    counts = confusion_matrix(predictions.labels, predictions.predicted, labels=indices)
    return ClassificationDetail(
        per_class=tuple(ClassScores(n, p, r, f, int(support)) for n, p, r, f, support in rows),
        confusion=tuple(tuple(row) for row in counts.tolist()),
    )


def _computed(likely: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    found: dict[str, float] = _metric().compute(predictions=likely, references=labels)
    return found


def _check(values: NDArray[Any], labels: NDArray[np.int64], names: int) -> None:
    if values.ndim != 2 or values.shape != (len(labels), names):
        raise ValueError(f"expected {(len(labels), names)} values, got {values.shape}")
    if not len(labels):
        raise ValueError("there is no row to score")
    if labels.min() < 0 or labels.max() >= names:
        raise ValueError(f"labels must lie in 0..{names - 1}")


def _scores(likely: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    predicted = likely.argmax(axis=1)
    indices = list(range(likely.shape[1]))

    def averaged(average: str, over: list[int]) -> tuple[float, float, float]:
        # The macro average is over the labels of the data set, whether or not they occur.
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predicted, labels=over, average=average, zero_division=0
        )
        return float(precision), float(recall), float(f1)

    macro = averaged("macro", indices)
    main = averaged("macro", [1]) if len(indices) == 2 else macro  # one label: that label alone
    found = {
        "accuracy": float((predicted == labels).mean()),
        "precision": main[0],
        "recall": main[1],
        "f1": main[2],
        "precision_macro": macro[0],
        "recall_macro": macro[1],
        "f1_macro": macro[2],
        "f1_weighted": averaged("weighted", indices)[2],
        "loss": float(-np.log(likely[np.arange(len(labels)), labels].clip(_SMALLEST, 1)).mean()),
    }
    auc = _auc(likely, labels)
    return found if auc is None else found | {"auc": auc}


def _auc(likely: NDArray[np.float64], labels: NDArray[np.int64]) -> float | None:
    """Area under the ROC curve; None when fewer than two labels occur."""
    present = np.unique(labels)
    if len(present) < 2:
        return None
    if likely.shape[1] == 2:
        return float(roc_auc_score(labels, likely[:, 1]))
    return float(np.mean([roc_auc_score(labels == one, likely[:, one]) for one in present]))
