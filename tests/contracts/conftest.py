"""The engines that the contract is held to, on an easy task. To add one, add it to ENGINES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from easy_task import SETTINGS, TRAIN_ROWS, VALIDATION_ROWS, make_split

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.core.protocols import Engine
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.base import Base, open_base
from lorasweep.spec.schema import ModelSpec


@dataclass(frozen=True)
class EngineCase:
    """An engine under test and how far its numbers may move with the neighbours of a trial."""

    make: Callable[[Base, EncodedSplit, EncodedSplit, EngineSettings], Engine]
    tolerance: float


ENGINES = {
    "trainer": EngineCase(TrainerEngine, tolerance=0.0),
    # Sums are taken in another order among other neighbours: equal up to rounding.
    "packed, one lane": EngineCase(partial(PackedEngine, lanes=1), tolerance=1e-5),
    "packed, three lanes": EngineCase(partial(PackedEngine, lanes=3), tolerance=1e-5),
}


@pytest.fixture(scope="module")
def base(tiny_base_folder) -> Base:
    return open_base(ModelSpec(name=str(tiny_base_folder("bert")), max_length=64), ("bad", "good"))


@pytest.fixture(scope="module")
def train(base) -> EncodedSplit:
    return make_split(base, "train", TRAIN_ROWS, seed=1)


@pytest.fixture(scope="module")
def validation(base) -> EncodedSplit:
    return make_split(base, "validation", VALIDATION_ROWS, seed=2)


@pytest.fixture(params=ENGINES)
def case(request) -> EngineCase:
    return ENGINES[request.param]


@pytest.fixture
def engine(case, base, train, validation) -> Engine:
    return case.make(base, train, validation, SETTINGS)


@pytest.fixture
def plan(tmp_path) -> TrialPlan:
    """Dropout is on, in the adapter and (from the tiny model's configuration) in the base."""
    return TrialPlan(
        number=0,
        seed=7,
        adapter=AdapterPlan(rank=4, alpha=8.0, dropout=0.1),
        learning_rate=5e-3,
        epochs=2,
        batch_size=8,
        weight_decay=0.01,
        warmup=0.1,
        scheduler="linear",
        max_grad_norm=1.0,
        folder=tmp_path / "0000",
    )
