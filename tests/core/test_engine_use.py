"""Shares are of what was counted, and unknown where nothing was."""

import doctest

import pytest

from lorasweep.core import engine_use
from lorasweep.core.engine_use import EngineUse


def test_shares_of_a_pack():
    use = EngineUse(
        engine="packed, 4 lanes",
        trials=7,
        lanes=4,
        halvings=1,
        bytes_per_lane=10**6,
        pack_steps=50,
        lane_steps=150,
        empty_places=50,
        tokens=900,
        computed_tokens=1000,
        seconds=40.0,
        step_seconds=30.0,
    )
    assert use.trials_at_once == 3
    assert use.busy_share == 0.75
    assert use.step_time_share == 0.75
    assert use.real_share == 0.9


@pytest.mark.parametrize(
    "use",
    [
        EngineUse("trainer", 3, 1),
        EngineUse("packed", 3, 2, 0, None, 0, 0, 0, 0, 0, 0.0, 0.0),  # every trial failed to build
    ],
)
def test_what_was_not_counted_is_unknown(use):
    assert use.trials_at_once is use.busy_share is use.real_share is use.step_time_share is None


def test_examples_in_docstrings():
    assert doctest.testmod(engine_use).failed == 0
