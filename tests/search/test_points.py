"""Points are counted, listed and drawn."""

from __future__ import annotations

import pytest

from lorasweep.search import points
from lorasweep.spec.space import Choices, FloatRange, IntRange, TimesRank


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        (Choices(choices=("auto", ("query",))), ["auto", ("query",)]),
        (IntRange(low=1, high=8, step=3), [1, 4, 7]),
        (IntRange(low=1, high=3, log=True), [1, 2, 3]),
        (FloatRange(low=0.0, high=0.35, step=0.1), [0.0, 0.1, 0.2, 0.3]),
        (TimesRank(times_rank=(1.0, 4.0)), [1.0, 4.0]),
    ],
)
def test_the_values_of_a_dimension(dimension, values):
    count = points.count(dimension)
    assert [points.value_at(dimension, at) for at in range(count)] == values


def test_a_range_without_steps_has_no_end():
    assert points.count(FloatRange(low=0.0, high=1.0)) is None
    assert points.size({"a": IntRange(low=1, high=3), "b": FloatRange(low=0.0, high=1.0)}) is None


def test_every_point_of_a_small_space_is_drawn_once():
    space = {"rank": Choices(choices=(4, 8)), "epochs": IntRange(low=1, high=3)}
    tried: set[str] = set()
    while (point := points.untried(space, tried, seed=len(tried))) is not None:
        tried.add(points.canonical(point))
    assert len(tried) == 6


@pytest.mark.parametrize("log", [False, True])
def test_draws_from_a_space_too_large_to_list_are_new_and_inside(log):
    space = {
        "rank": IntRange(low=1, high=4096, log=log),
        "batch_size": IntRange(low=1, high=4096),
        "learning_rate": FloatRange(low=0.001, high=1.0, log=log),
    }
    tried: set[str] = set()
    for seed in range(20):
        point = points.untried(space, tried, seed)
        assert 1 <= point["rank"] <= 4096
        assert 0.001 <= point["learning_rate"] <= 1.0
        tried.add(points.canonical(point))
    assert len(tried) == 20
    assert points.untried(space, set(), 3) == points.untried(space, set(), 3)


def test_equal_points_have_equal_text_and_come_back_from_it():
    assert points.canonical({"a": 1, "b": ("x",)}) == points.canonical({"b": ["x"], "a": 1})
    assert points.revive({"b": ["x"], "a": 1}) == {"a": 1, "b": ("x",)}
