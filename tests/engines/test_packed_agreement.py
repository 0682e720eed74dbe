"""Where the packed engine can't equal the trainer engine bit by bit, it agrees in distribution.

With dropout both draw masks of their own; in bf16 both round, in another order. Each test first
shows that it would notice: dropout left out, its rate halved, rounding not done.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from architectures import PACKED
from numpy.typing import NDArray
from recorder import Recorder, keep_nothing

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.outcomes import TrialState
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.core.protocols import Engine
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine

DEVICE = os.environ.get("LORASWEEP_TEST_DEVICE", "cpu")
SETTINGS = EngineSettings(precision="fp32", device=DEVICE, log_every=1, eval_batch_size=16)
T_95 = 1.895  # Student's t, 7 degrees of freedom, one-sided 5 %


def run(engine: Engine, plans: Sequence[TrialPlan]) -> Recorder:
    recorder = Recorder(keep_nothing)
    outcomes = list(engine.run(plans, recorder))
    assert [outcome.state for outcome in outcomes] == [TrialState.COMPLETED] * len(plans)
    return recorder


def mean_losses(engine: Engine, plans: Sequence[TrialPlan]) -> NDArray[np.float64]:
    """Mean training loss of each trial, which dropout raises, ``(trials,)``."""
    found = run(engine, plans).losses
    return np.array([np.mean(found[plan.number]) for plan in plans])


def is_equivalent(differences: NDArray[np.float64], margin: float) -> bool:
    """Two one-sided t-tests (Schuirmann 1987): is the mean shown to lie within ± margin?"""
    assert len(differences) == 8
    reach = T_95 * differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(abs(differences.mean()) + reach < margin)


@pytest.fixture
def seeds(make_plan) -> Callable[[float], list[TrialPlan]]:
    """Eight trials that differ in their seeds alone, at a rate where they learn their rows."""

    def make(dropout: float) -> list[TrialPlan]:
        adapter = AdapterPlan(rank=8, alpha=16.0, dropout=dropout, targets=("all-linear",))
        changes = {"adapter": adapter, "learning_rate": 1e-2, "epochs": 12, "warmup": 0.1}
        return [make_plan(n, seed=n, max_grad_norm=1.0, **changes) for n in range(8)]

    return make


@pytest.fixture
def few(splits: tuple[EncodedSplit, EncodedSplit]) -> tuple[EncodedSplit, EncodedSplit]:
    """24 rows to learn by heart, so that there is something for dropout to disturb."""
    train, validation = splits
    end = int(train.offsets[24])
    return (
        EncodedSplit("train", train.tokens[:end], train.offsets[:25], train.labels[:24]),
        validation,
    )


@pytest.mark.parametrize(
    ("architecture", "of", "precision"),
    [
        ("bert", "adapters", "fp32"),
        ("bert", "adapters", "bf16"),
        ("bert", "base", "fp32"),
        ("bert", "base", "bf16"),
        ("distilbert", "adapters", "fp32"),
        ("distilbert", "base", "fp32"),
        ("deberta-v2", "adapters", "fp32"),
        ("deberta-v2", "base", "fp32"),
        ("modernbert", "adapters", "fp32"),
    ],
)
def test_with_dropout_the_mean_over_seeds_is_the_trainers(
    architecture, of, precision, open_tiny, few, seeds
):
    """Pairs share head, adapter and order of rows; only the masks differ.

    The margin is a third of what dropout does to the loss at all, and the same test on a pack
    without dropout, or with half the rate, does not claim equivalence.
    """
    settings = replace(SETTINGS, precision=precision)
    rate, base_rate = (0.5, 0.0) if of == "adapters" else (0.0, 0.1)

    def pack(rate: float, base_rate: float) -> NDArray[np.float64]:
        base = open_tiny(architecture, base_dropout=base_rate)
        return mean_losses(PackedEngine(base, *few, settings, 8), seeds(rate))

    base = open_tiny(architecture, base_dropout=base_rate)
    expected = mean_losses(TrainerEngine(base, *few, settings), seeds(rate))
    without = pack(0.0, 0.0) - expected
    margin = -without.mean() / 3
    assert margin > 0.03  # or there would be nothing to agree on
    differences = pack(rate, base_rate) - expected
    assert (differences != 0).all()
    assert is_equivalent(differences, margin)
    assert not is_equivalent(without, margin)
    assert not is_equivalent(pack(rate / 2, base_rate / 2) - expected, margin)


@pytest.mark.parametrize("architecture", PACKED)
def test_in_bf16_it_is_as_close_to_fp32_as_the_trainer_is(
    architecture, open_tiny, splits, make_plan
):
    """Root mean square distances of losses and logits, over trials, from a fp32 Trainer's.

    A Trainer's autocast keeps sums and norms between the products in float32, a pack keeps
    all activations in bfloat16; so the distances are alike, not equal.
    """
    base = open_tiny(architecture, base_dropout=0.0)
    plans = [make_plan(n, seed=n, learning_rate=5e-4) for n in range(12)]
    half = replace(SETTINGS, precision="bf16")
    exact = run(TrainerEngine(base, *splits, SETTINGS), plans)
    trainer = run(TrainerEngine(base, *splits, half), plans)
    packed = run(PackedEngine(base, *splits, half, 6), plans)

    def distance(found: Recorder, what: str) -> float:
        pairs = (
            np.ravel(getattr(found, what)[plan.number])
            - np.ravel(getattr(exact, what)[plan.number])
            for plan in plans
        )
        return float(np.sqrt(np.mean(np.concatenate(list(pairs)) ** 2)))

    for what in ("losses", "logits"):
        theirs = distance(trainer, what)
        assert theirs > 1e-4  # both do round, or nothing would be compared
        assert 1e-4 < distance(packed, what) < 2 * theirs
