"""Three trials in a pack that may be cut off, and what they tell when nobody does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from recorder import Recorder
from stopped_packs import NEVER, but_the_second, run, three

from lorasweep.core.plans import EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine


@pytest.fixture
def engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    """Dropout of the base as its configuration has it: 0.1."""

    def make(lanes: int = 3, *, base: object = None, **settings: object) -> PackedEngine:
        chosen = {"precision": "fp32", "device": "cpu", "log_every": 1, "eval_batch_size": 8}
        chosen |= {"checkpoint_seconds": NEVER} | settings
        return PackedEngine(base or open_tiny(), *splits, EngineSettings(**chosen), lanes)

    return make


@pytest.fixture
def plans(tmp_path, make_plan) -> list[TrialPlan]:
    return three(tmp_path, make_plan)


@dataclass
class Straight(Recorder):
    """What the plans told whose adapters lie in their folders."""

    plans: list[TrialPlan] = field(default_factory=list)


_STRAIGHT: dict[str, Straight] = {}


@pytest.fixture
def straight(engine, make_plan, tmp_path_factory) -> Straight:
    """The three in one pack from their first step to their last, done once for all tests."""
    if not _STRAIGHT:
        plans = three(tmp_path_factory.mktemp("straight"), make_plan)
        made = Straight(but_the_second, plans=plans)
        run(engine(), plans, made)
        _STRAIGHT["made"] = made
    return _STRAIGHT["made"]
