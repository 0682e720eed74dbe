from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.core.errors import DivergedError
from lorasweep.core.outcomes import Predictions
from lorasweep.evaluation.metrics import (
    ClassificationMetric,
    detail,
    probabilities,
    score,
    score_predictions,
)

TWO, THREE = ("negative", "positive"), ("negative", "neutral", "positive")


def test_two_labels_by_hand() -> None:
    logits = np.array([[2, 0], [0, 1], [3, 0], [0, 2], [1, 0]], dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 1])
    found = score(logits, labels, TWO)
    # One of two answers "positive" is right; one of three positives is found.
    assert found["accuracy"] == pytest.approx(2 / 5)
    assert found["precision"] == pytest.approx(1 / 2)
    assert found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(2 / 5)
    assert found["f1_macro"] == pytest.approx((2 / 5 + 2 / 5) / 2)
    # Positives score -3, 2, -1 and negatives -2, 1: two of six pairs are wrong way, 2 > both.
    assert found["auc"] == pytest.approx(3 / 6)
    true = [-math.log(1 / (1 + math.exp(d))) for d in (-2.0, 1.0, 3.0, -2.0, 1.0)]
    assert found["loss"] == pytest.approx(sum(true) / 5)
    assert all(type(value) is float for value in found.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**31 - 1))
def test_every_metric_is_scikit_learns(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(count), generator.integers(0, count, 40)])
    logits = generator.normal(size=(len(labels), count)).astype(np.float32)
    names = tuple(map(str, range(count)))
    found = score(logits, labels, names)
    likely, said = probabilities(logits), logits.argmax(axis=1)
    main = {"average": "binary"} if count == 2 else {"average": "macro"}
    auc = (
        sklearn.metrics.roc_auc_score(labels, likely[:, 1])
        if count == 2
        else sklearn.metrics.roc_auc_score(labels, likely, multi_class="ovr", average="macro")
    )
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, said),
        "precision": sklearn.metrics.precision_score(labels, said, zero_division=0, **main),
        "recall": sklearn.metrics.recall_score(labels, said, zero_division=0, **main),
        "f1": sklearn.metrics.f1_score(labels, said, zero_division=0, **main),
        "precision_macro": sklearn.metrics.precision_score(
            labels, said, zero_division=0, average="macro"
        ),
        "recall_macro": sklearn.metrics.recall_score(
            labels, said, zero_division=0, average="macro"
        ),
        "f1_macro": sklearn.metrics.f1_score(labels, said, zero_division=0, average="macro"),
        "f1_weighted": sklearn.metrics.f1_score(labels, said, zero_division=0, average="weighted"),
        "auc": auc,
        "loss": sklearn.metrics.log_loss(labels, likely),
    }
    assert found == pytest.approx(expected)


def test_a_label_that_does_not_occur_is_no_warning_and_auc_is_left_out_when_undefined() -> None:
    logits = np.array([[1, 0], [2, 0]], dtype=np.float32)
    found = score(logits, np.array([0, 0]), TWO)
    assert found["f1"] == 0.0
    assert "auc" not in found
    logits = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 2]], dtype=np.float32)
    found = score(logits, np.array([0, 2, 2]), THREE)
    assert found["auc"] == 1.0
    assert found["f1_macro"] == pytest.approx(2 / 3)  # the absent label counts, as 0


def test_huge_logits_neither_overflow_nor_lose_the_loss() -> None:
    logits = np.array([[3e4, 0], [0, 3e4]], dtype=np.float32)
    found = score(logits, np.array([1, 1]), TWO)
    assert found["loss"] == pytest.approx(1.5e4)
    assert probabilities(logits).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_a_diverged_trial(value: float) -> None:
    logits = np.array([[0, value], [0, 1]], dtype=np.float32)
    with pytest.raises(DivergedError, match="not finite"):
        score(logits, np.array([0, 1]), TWO)


@pytest.mark.parametrize(
    ("shape", "labels"), [((2, 3), [0, 1]), ((2, 2), [0]), ((0, 2), []), ((2, 2), [0, 2])]
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, int], labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected|no row|must lie"):
        score(np.zeros(shape, dtype=np.float32), np.array(labels, dtype=np.int64), TWO)


def test_the_metric_leaves_nothing_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    metric = ClassificationMetric()
    for _ in range(2):  # a metric object can be used again
        found = metric.compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 1])
    assert found["accuracy"] == 1.0
    assert list(tmp_path.iterdir()) == []
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]


def test_a_certain_and_wrong_baseline_has_a_finite_loss() -> None:
    certain = Predictions("m", "test", ("a", "b"), np.array([0, 1]), np.array([[1.0, 0], [1, 0]]))
    found = score_predictions(certain, TWO)
    assert found["loss"] == pytest.approx(-math.log(np.finfo(float).eps) / 2)
    assert found["auc"] == 0.5


def test_detail_counts_every_row(make_predictions) -> None:  # type: ignore[no-untyped-def]
    predictions = make_predictions([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2], count=3)
    found = detail(predictions, THREE)
    assert found.confusion == ((1, 1, 0), (0, 1, 0), (1, 0, 2))
    assert [one.name for one in found.per_class] == list(THREE)
    assert [one.support for one in found.per_class] == [2, 1, 3]
    assert found.per_class[2].precision == 1.0
    assert found.per_class[2].recall == pytest.approx(2 / 3)
    assert found.per_class[0].f1 == pytest.approx(1 / 2)
