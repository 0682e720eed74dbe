from __future__ import annotations

import doctest

import pytest
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from lorasweep.tracking import wording


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(wording).failed == 0


def test_long_values_that_begin_alike_stay_apart() -> None:
    one, two = (wording.param_text("x" * 7000 + ending) for ending in "ab")
    assert len(one) == len(two) == wording.PARAM_CHARACTERS
    assert one != two
    assert "shortened from 7001 characters, sha256" in one


@pytest.mark.parametrize(
    "name", ["f1/très bien!", "a//b", "../up", "/root", "", ".", "x" * 400, "line\nbreak", "a/../b"]
)
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    written = wording.key(name)
    _validate_metric_name(written)
    _validate_param_name(written)
    assert len(written) <= wording.KEY_CHARACTERS


def test_names_that_lose_their_difference_stay_apart() -> None:
    assert wording.key("f1/ä") != wording.key("f1/ö")
    assert wording.key("val_f1") == "val_f1"
