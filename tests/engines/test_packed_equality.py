"""The packed engine trains what the trainer engine trains: the tests the project stands on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import PACKED
from recorder import Recorder

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.outcomes import TrialState
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.base import Base, open_base
from lorasweep.model.checkpoint import load_finetuned
from lorasweep.model.scoring import predict_logits
from lorasweep.spec.schema import ModelSpec

# Every step is reported, so every step is compared.
DEVICE = os.environ.get("LORASWEEP_TEST_DEVICE", "cpu")
SETTINGS = EngineSettings(precision="fp32", device=DEVICE, log_every=1, eval_batch_size=16)
LOSSES, LOGITS = 1e-4, 1e-3


def random_split(base: Base, name: str, rows: int, seed: int, longest: int = 24) -> EncodedSplit:
    """Rows of random ordinary tokens between the special ones; labels that can be learned."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(rows):
        inside = rng.integers(5, base.config.vocab_size, rng.integers(1, longest))
        pieces.append(np.concatenate([[2], inside, [3]]).astype(np.int32))
    lengths = [len(piece) for piece in pieces]
    return EncodedSplit(
        name=name,
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.asarray([int(piece.sum() % 2) for piece in pieces], dtype=np.int64),
    )


@pytest.fixture
def open_base_of(tiny_base_folder) -> Callable[..., Base]:
    def make(architecture: str, base_dropout: float | None = 0.0) -> Base:
        spec = ModelSpec(
            name=str(tiny_base_folder(architecture)), max_length=64, base_dropout=base_dropout
        )
        return open_base(spec, ("no", "yes"))

    return make


@pytest.fixture
def plans(tmp_path: Path) -> list[TrialPlan]:
    """Five trials that differ in all that may differ; the shortest has 50 steps and more."""
    first = TrialPlan(
        number=0,
        seed=11,
        adapter=AdapterPlan(rank=4, alpha=8.0),
        learning_rate=2e-3,
        epochs=5,
        batch_size=8,
        weight_decay=0.01,
        warmup=0.1,
        scheduler="linear",
        max_grad_norm=1.0,
        folder=tmp_path / "0000",
    )
    changes = (
        {},
        {"adapter": AdapterPlan(8, 4.0), "batch_size": 4, "epochs": 3, "scheduler": "cosine"},
        {
            "adapter": AdapterPlan(1, 4.0, targets=("all-linear",)),
            "weight_decay": 0.3,
            "warmup": 0.0,
        },
        {
            "adapter": AdapterPlan(16, 16.0, top_layers=1),
            "max_grad_norm": 0.05,
            "epochs": 6,
            "scheduler": "constant_with_warmup",
            "warmup": 0.5,
        },
        {"learning_rate": 5e-4, "batch_size": 5, "scheduler": "constant", "max_grad_norm": 0.0},
    )
    return [
        dataclasses.replace(first, number=n, seed=11 + n, folder=tmp_path / f"{n:04d}", **change)
        for n, change in enumerate(changes)
    ]


def run(engine: PackedEngine | TrainerEngine, plans: list[TrialPlan]) -> Recorder:
    recorder = Recorder()
    outcomes = list(engine.run(plans, recorder))
    assert [o.reason for o in outcomes] == [""] * len(plans)
    assert {outcome.state for outcome in outcomes} == {TrialState.COMPLETED}
    return recorder


def assert_same(one: Recorder, other: Recorder, trial: int, losses: float, logits: float) -> None:
    first, second = one.steps[trial], other.steps[trial]
    assert len(first) == len(second) >= 50
    np.testing.assert_allclose(
        [report.loss for report in first], [report.loss for report in second], rtol=0, atol=losses
    )
    np.testing.assert_allclose(
        [report.learning_rate for report in first],
        [report.learning_rate for report in second],
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        [report.grad_norm for report in first],
        [report.grad_norm for report in second],
        rtol=1e-2,
    )
    assert len(one.epochs[trial]) == len(other.epochs[trial])
    for a, b in zip(one.epochs[trial], other.epochs[trial], strict=True):
        np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=logits)


@pytest.mark.parametrize("architecture", PACKED)
def test_every_trial_of_a_mixed_pack_equals_a_trainer_of_its_own(architecture, open_base_of, plans):
    base = open_base_of(architecture)
    train = random_split(base, "train", 80, seed=1)
    validation = random_split(base, "validation", 30, seed=2)
    packed = run(PackedEngine(base, train, validation, SETTINGS, 3), plans)
    reloaded = {
        plan.number: predict_logits(
            load_finetuned(base, plan.adapter_folder),
            validation,
            pad_id=base.pad_id,
            batch_size=7,
            device=torch.device("cpu"),
        )
        for plan in plans
    }
    alone = run(TrainerEngine(base, train, validation, SETTINGS), plans)
    for plan in plans:
        assert_same(packed, alone, plan.number, LOSSES, LOGITS)
        # It did learn, or the comparison would compare nothing.
        logits = alone.epochs[plan.number]
        assert np.abs(logits[0].logits - logits[-1].logits).max() > 10 * LOGITS
        facts, expected = packed.facts[plan.number], alone.facts[plan.number]
        assert dataclasses.replace(facts, lane=None) == expected
        # The adapter kept, loaded by plain PEFT, scores as the pack said.
        np.testing.assert_allclose(
            reloaded[plan.number], packed.epochs[plan.number][-1].logits, rtol=0, atol=1e-5
        )


def test_the_embedded_minilm_with_three_labels_equals_a_trainer_too(plans):
    """Real weights, and a head of another width; few and short rows, since it is no tiny model."""
    base = open_base(
        ModelSpec(name="embedded/minilm", max_length=64, base_dropout=0.0), ("bad", "so so", "good")
    )
    train, validation = (
        dataclasses.replace(split, labels=np.arange(len(split), dtype=np.int64) % 3)
        for split in (
            random_split(base, "train", 40, seed=0, longest=10),
            random_split(base, "validation", 12, seed=1, longest=10),
        )
    )
    chosen = [
        dataclasses.replace(plan, epochs=5, batch_size=size, learning_rate=5e-4)
        for plan, size in ((plans[0], 4), (plans[2], 3))
    ]
    packed = run(PackedEngine(base, train, validation, SETTINGS, 2), chosen)
    alone = run(TrainerEngine(base, train, validation, SETTINGS), chosen)
    for plan in chosen:
        assert_same(packed, alone, plan.number, LOSSES, LOGITS)
        first, *_, last = alone.epochs[plan.number]
        assert first.logits.shape == (12, 3)
        assert np.abs(first.logits - last.logits).max() > 10 * LOGITS
