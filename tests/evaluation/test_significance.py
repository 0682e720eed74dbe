from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from lorasweep.evaluation import (
    calibration,
    intervals,
    metrics,
    patterns,
    predictions,
    significance,
)
from lorasweep.evaluation.significance import format_p, holm, mcnemar, state_p


def answers(both: int, old: int, new: int, neither: int) -> tuple[np.ndarray, ...]:
    """The truth (all zeros) and answers with these four counts."""
    baseline = np.repeat([0, 0, 1, 1], [both, old, new, neither])
    finetuned = np.repeat([0, 1, 0, 1], [both, old, new, neither])
    return np.zeros_like(baseline), baseline, finetuned


@settings(max_examples=60, deadline=None)
@given(*[st.integers(0, 30)] * 4)
def test_counts_and_exact_p(both: int, old: int, new: int, neither: int) -> None:
    result = mcnemar(*answers(both, old, new, neither))
    counts = (result.both_correct, result.baseline_only, result.finetuned_only, result.both_wrong)
    assert counts == (both, old, new, neither)
    n = old + new
    tail = sum(math.comb(n, k) for k in range(min(old, new) + 1))
    assert result.p_value == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))))
    assert result.method == "exact binomial"


def test_no_discordant_row_is_p_one() -> None:
    assert mcnemar(*answers(5, 0, 0, 3)).p_value == 1.0
    assert mcnemar(*answers(5, 4, 4, 3)).p_value == 1.0  # not above 1 either


def test_p_is_never_zero() -> None:
    result = mcnemar(*answers(0, 0, 5000, 0))
    assert 0 < result.p_value < 1e-300
    assert format_p(result.p_value) == "< 1e-300"
    assert state_p(result.p_value) == "p < 1e-300"
    assert holm({"a": 0.0, "b": 0.0})["a"] > 0


@given(st.floats(0, 1))
def test_no_p_is_printed_as_zero_or_far_from_itself(p_value: float) -> None:
    text = format_p(p_value)
    number = float(text.removeprefix("< "))
    assert number > 0
    assert number == pytest.approx(p_value, rel=0.06) or p_value < 1e-300


def test_holm_by_hand() -> None:
    assert holm({"a": 0.03, "b": 0.01, "c": 0.02}) == pytest.approx(
        {"a": 0.04, "b": 0.03, "c": 0.04}
    )
    assert holm({}) == {}


@pytest.mark.parametrize("size", [1, 7])
def test_holm_is_statsmodels(size: int) -> None:
    p_values = np.random.default_rng(size).uniform(0, 0.2, size).tolist()
    found = holm({str(place): p_value for place, p_value in enumerate(p_values)})
    assert list(found.values()) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="as many rows"):
        mcnemar(np.zeros(3, int), np.zeros(2, int), np.zeros(3, int))


@pytest.mark.parametrize(
    "module", [significance, intervals, metrics, calibration, patterns, predictions]
)
def test_examples_in_docstrings(module) -> None:  # type: ignore[no-untyped-def]
    assert doctest.testmod(module).failed == 0
