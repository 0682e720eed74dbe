"""Three trials of a pack that is cut off and goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recorder import Recorder

from lorasweep.core.outcomes import EpochEvaluation, TrialState, Verdict
from lorasweep.core.plans import AdapterPlan, TrialPlan
from lorasweep.engines.packed import PackedEngine

NEVER = 1e9
NEIGHBOURS = 1e-5  # sums are taken in another order among other rows
# 30 rows: 4 steps an epoch at batch size 8, 6 at 5.
STEPS = {1: 12, 2: 12, 3: 16}


def but_the_second(evaluation: EpochEvaluation) -> Verdict:
    """Keeps every epoch but the second, so what is kept may be older than the last."""
    return Verdict(evaluation.epoch != 2, True)


def three(folder: Path, make_plan: Callable[..., TrialPlan]) -> list[TrialPlan]:
    """Three that differ in what may differ, dropout on; see STEPS."""
    changes: list[dict] = [
        {"epochs": 3, "adapter": AdapterPlan(4, 8.0, 0.2)},
        {"batch_size": 5, "scheduler": "cosine", "adapter": AdapterPlan(2, 2.0, 0.3)},
        {"epochs": 4, "adapter": AdapterPlan(8, 8.0, 0.1, ("all-linear",), top_layers=1)},
    ]
    return [
        dataclasses.replace(make_plan(n, seed=n, **change), folder=folder / f"{n:04d}")
        for n, change in enumerate(changes, start=1)
    ]


def run(engine: PackedEngine, plans: object, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or Recorder(but_the_second)
    outcomes = {outcome.trial: outcome for outcome in engine.run(plans, recorder)}
    assert {o.state for o in outcomes.values()} == {TrialState.COMPLETED}
    assert {n: o.steps for n, o in outcomes.items()} == {n: STEPS[n] for n in outcomes}
    return recorder


def cut(engine: PackedEngine, plans: object, stop: Callable[..., bool]) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(plans, Recorder(but_the_second, stop)))


def at(kind: type, trial: int, step: int) -> Callable[..., bool]:
    return lambda told: isinstance(told, kind) and (told.trial, told.step) == (trial, step)


def assert_same(one: Recorder, other: Recorder, trial: int, tolerance: float) -> None:
    orders = [[(type(told), told.step) for told in r.told[trial]] for r in (one, other)]
    assert orders[0] == orders[1]
    for a, b in zip(one.steps[trial], other.steps[trial], strict=True):
        assert (a.step, a.steps, a.learning_rate) == (b.step, b.steps, b.learning_rate)
        np.testing.assert_allclose(a.loss, b.loss, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=100 * tolerance)
    for c, d in zip(one.epochs[trial], other.epochs[trial], strict=True):
        assert (c.epoch, c.epochs, c.step, c.steps) == (d.epoch, d.epochs, d.step, d.steps)
        np.testing.assert_allclose(c.logits, d.logits, rtol=0, atol=tolerance)
