"""What every baseline owes its callers, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest

from lorasweep.core.corpora import TextSplit
from lorasweep.core.protocols import Baseline
from lorasweep.spec.schema import BaselineName

NAMES = get_args(BaselineName)
ROWS = [("a great film", 1), ("an awful night", 0), ("a good movie", 1), ("a dull movie", 0)] * 3
TEXTS = ["a great night", "it was awful and dull and long and bad", "", "fine", "!", "film"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_schema_gives_probabilities(
    name: str, build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    baseline = build(name)
    found = baseline.predict(split(ROWS), TEXTS, 2)
    assert baseline.name == name
    assert found.shape == (len(TEXTS), 2)
    assert found.dtype == np.float64
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_numbers(
    name: str, build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    first = build(name).predict(split(ROWS), TEXTS, 2)
    np.testing.assert_array_equal(first, build(name).predict(split(ROWS), TEXTS, 2))


@pytest.mark.parametrize("name", NAMES)
def test_no_texts_give_no_rows(
    name: str, build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    assert build(name).predict(split(ROWS), [], 2).shape == (0, 2)


@pytest.mark.parametrize("name", ["majority", "tfidf", "linear_probe"])
def test_a_label_without_training_rows_keeps_its_column(
    name: str, build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    rows = [(text, 2 * label) for text, label in ROWS]
    found = build(name).predict(split(rows), TEXTS, 4)
    assert found.shape == (len(TEXTS), 4)
    assert (found[:, [1, 3]] == 0).all()
    assert (found[:, [0, 2]] > 0).all()


@pytest.mark.parametrize("name", ["majority", "tfidf", "linear_probe"])
def test_one_label_only_is_predicted_for_certain(
    name: str, build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    rows = [(text, 1) for text, _ in ROWS]
    assert build(name).predict(split(rows), TEXTS, 2).tolist() == [[0.0, 1.0]] * len(TEXTS)


def test_an_unknown_name_is_refused(build: Callable[..., Baseline]) -> None:
    with pytest.raises(LookupError, match="oracle"):
        build("oracle")
