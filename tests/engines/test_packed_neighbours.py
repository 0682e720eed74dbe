"""A trial is a function of its plan: the same among any neighbours, in any place of a pack.

Dropout is on in the base and in the adapters, so the masks of a trial are held to it as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from recorder import Recorder, keep_nothing

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine
from lorasweep.model.base import Base, open_base
from lorasweep.spec.schema import ModelSpec

DEVICE = os.environ.get("LORASWEEP_TEST_DEVICE", "cpu")
SETTINGS = EngineSettings(precision="fp32", device=DEVICE, log_every=1, eval_batch_size=16)
NEIGHBOURS = 1e-5  # the stated tolerance: sums are taken in another order among other rows
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")
MINILM = "embedded/minilm"


def run(
    base: Base,
    splits: tuple[EncodedSplit, EncodedSplit],
    plans: Sequence[TrialPlan],
    lanes: int,
    precision: str = "fp32",
) -> Recorder:
    recorder, settings = Recorder(keep_nothing), replace(SETTINGS, precision=precision)
    outcomes = list(PackedEngine(base, *splits, settings, lanes).run(plans, recorder))
    assert {outcome.reason for outcome in outcomes} == {""}
    assert len(outcomes) == len(plans)
    return recorder


def steps_before(recorder: Recorder, trial: int, event: tuple[str, int, int]) -> int:
    """Steps that a trial has done when an event is told."""
    before = recorder.log[: recorder.log.index(event)]
    return sum((what, whose) == ("stepped", trial) for what, whose, _ in before)


def assert_same(one: Recorder, other: Recorder, trial: int) -> None:
    np.testing.assert_allclose(
        [report.loss for report in one.steps[trial]],
        [report.loss for report in other.steps[trial]],
        rtol=0,
        atol=NEIGHBOURS,
        strict=True,
    )
    np.testing.assert_allclose(
        [(report.learning_rate, report.grad_norm) for report in one.steps[trial]],
        [(report.learning_rate, report.grad_norm) for report in other.steps[trial]],
        rtol=1e-4,
    )
    assert len(one.logits[trial]) == len(other.logits[trial])
    for a, b in zip(one.logits[trial], other.logits[trial], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=NEIGHBOURS)


@pytest.mark.parametrize(
    ("architecture", "base_dropout", "kernels"),
    [
        *((name, rate, "compiled") for name in ARCHITECTURES for rate in (0.1, 0.0)),
        *((name, 0.1, "torch") for name in ARCHITECTURES),
        (MINILM, 0.1, "compiled"),
    ],
)
def test_neighbours_lane_and_refill_change_nothing_dropout_included(
    architecture, base_dropout, kernels, open_tiny, splits, make_plan, monkeypatch
):
    if kernels == "torch":
        monkeypatch.setattr("lorasweep.model.kernels.loaded_kernels", lambda: None)
    if architecture == MINILM:
        spec = ModelSpec(name=MINILM, max_length=64, base_dropout=base_dropout)
        base = open_base(spec, ("no", "yes"))
    else:
        base = open_tiny(architecture, base_dropout=base_dropout)
    # One adapts every layer. The other only the last: what lies below is looked up instead of
    # computed, until a neighbour adapts it. Both end their epochs with a smaller batch.
    whole = make_plan(9, seed=9, epochs=3, adapter=AdapterPlan(4, 8.0, 0.2))
    upper = make_plan(
        8,
        seed=8,
        batch_size=7,
        adapter=AdapterPlan(2, 8.0, 0.3, ("all-linear",), top_layers=1),
    )
    wide = make_plan(1, seed=1, adapter=AdapterPlan(16, 4.0, 0.5, ("all-linear",)))
    narrow = make_plan(2, seed=2, epochs=1, batch_size=3, adapter=AdapterPlan(1, 1.0))
    steep = make_plan(3, seed=3, epochs=4, batch_size=16, learning_rate=0.1, max_grad_norm=0.0)
    brief = make_plan(4, seed=4, epochs=1, batch_size=16, weight_decay=0.3, warmup=0.0)

    alone = {plan.number: run(base, splits, [plan], 1) for plan in (whole, upper)}
    pair = run(base, splits, [whole, brief, upper, narrow], 2)
    four = run(base, splits, [steep, brief, wide, narrow, whole, upper], 4)
    for plan in (whole, upper):
        assert_same(alone[plan.number], pair, plan.number)
        assert_same(alone[plan.number], four, plan.number)
        # It did learn, or the comparison would compare nothing.
        logits = alone[plan.number].logits[plan.number]
        assert np.abs(logits[0] - logits[-1]).max() > 100 * NEIGHBOURS
    # It was in another lane, and a neighbour left and was followed by another while it ran.
    assert (pair.facts[9].lane, four.facts[9].lane) == (0, 1)
    assert steps_before(pair, 9, ("started", 8, 0)) == 2
    assert steps_before(four, 9, ("started", 8, 0)) == 6
    assert len(pair.steps[9]) == 12


@pytest.mark.parametrize("architecture", ["bert", "modernbert", MINILM])
def test_in_bf16_neighbours_move_a_trial_no_further_than_rounding_does(
    architecture, open_tiny, splits, make_plan
):
    """What machines with bf16 do by default: sums of other sizes round elsewhere."""
    if architecture == MINILM:
        base = open_base(ModelSpec(name=MINILM, max_length=64, base_dropout=0.1), ("no", "yes"))
    else:
        base = open_tiny(architecture, base_dropout=0.1)
    trial = make_plan(9, seed=9, epochs=3, adapter=AdapterPlan(4, 8.0, 0.2))
    wide = make_plan(1, seed=1, adapter=AdapterPlan(16, 4.0, 0.5, ("all-linear",)))
    brief = make_plan(2, seed=2, epochs=1, batch_size=3, adapter=AdapterPlan(1, 1.0))
    exact = run(base, splits, [trial], 1)
    alone = run(base, splits, [trial], 1, "bf16")
    among = run(base, splits, [wide, brief, trial], 3, "bf16")

    def apart(one: Recorder, other: Recorder) -> float:
        losses = np.abs(np.array(one.losses[9]) - other.losses[9]).max()
        logits = [np.abs(a - b).max() for a, b in zip(one.logits[9], other.logits[9], strict=True)]
        return float(max(losses, *logits))

    rounding = apart(exact, alone)
    assert 0 < rounding < 0.2
    assert apart(alone, among) <= 2 * rounding
