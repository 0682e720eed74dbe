from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lorasweep.evaluation.intervals import f1_difference, wilson


def test_wilson_stays_inside_and_narrows_with_rows() -> None:
    for rows in (1, 20, 1000):
        for correct in (0, rows // 2, rows):
            found = wilson(correct, rows)
            assert 0 <= found.low <= correct / rows <= found.high <= 1
    assert wilson(900, 1000).high - wilson(900, 1000).low < wilson(9, 10).high - wilson(9, 10).low


@pytest.mark.parametrize("count", [2, 4])
def test_the_bootstrap_is_that_of_resampled_rows(count: int) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, count, 300)
    noise = generator.integers(0, count, (2, 300))
    old = np.where(generator.random(300) < 0.5, labels, noise[0])
    new = np.where(generator.random(300) < 0.8, labels, noise[1])
    found = f1_difference(labels, old, new, count, seed=1)
    again = f1_difference(labels, old, new, count, seed=1)
    assert found == again
    average = "binary" if count == 2 else "macro"

    def difference(rows: np.ndarray) -> float:
        old_f1 = f1_score(labels[rows], old[rows], average=average)
        return float(f1_score(labels[rows], new[rows], average=average) - old_f1)

    drawn = [difference(generator.integers(0, 300, 300)) for _ in range(400)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.025)
    assert found.high == pytest.approx(high, abs=0.025)
    assert found.low < difference(np.arange(300)) < found.high


def test_the_same_answers_differ_by_nothing() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    said = np.array([0, 1, 0, 0, 1])
    found = f1_difference(labels, said, said, 2, seed=3)
    assert (found.low, found.high) == (0.0, 0.0)


def test_a_label_that_is_never_drawn_counts_as_zero_without_a_warning() -> None:
    found = f1_difference(np.zeros(4, int), np.zeros(4, int), np.ones(4, int), 2, seed=0)
    assert (found.low, found.high) == (0.0, 0.0)
