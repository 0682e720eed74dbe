"""A tiny base with splits of generated tokens, for every engine's own tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, TrialPlan
from lorasweep.model.base import Base, open_base
from lorasweep.spec.schema import ModelSpec


def tokens_split(name: str, rows: int, seed: int) -> EncodedSplit:
    """Rows of 3 to 20 random token ids between [CLS] and [SEP]; labels alternate."""
    rng = np.random.default_rng(seed)
    parts = [
        np.concatenate([[2], rng.integers(5, 90, rng.integers(1, 19)), [3]]) for _ in range(rows)
    ]
    return EncodedSplit(
        name=name,
        tokens=np.concatenate(parts).astype(np.int32),
        offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        labels=np.arange(rows, dtype=np.int64) % 2,
    )


@pytest.fixture(scope="session")
def splits() -> tuple[EncodedSplit, EncodedSplit]:
    """Training (30 rows) and validation (14 rows)."""
    return tokens_split("train", 30, 1), tokens_split("validation", 14, 2)


@pytest.fixture
def open_tiny(tiny_base_folder: Callable[..., Path]) -> Callable[..., Base]:
    """``open_tiny("bert", base_dropout=0.0)``."""

    def make(architecture: str = "bert", **spec: object) -> Base:
        folder = tiny_base_folder(architecture)
        return open_base(ModelSpec(name=str(folder), **{"max_length": 64, **spec}), ("no", "yes"))

    return make


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., TrialPlan]:
    """``make_plan(3, epochs=1)``: a small plan with every knob off its neutral value."""

    def make(number: int = 0, **changes: object) -> TrialPlan:
        values: dict = {
            "seed": 11,
            "adapter": AdapterPlan(rank=4, alpha=8.0, dropout=0.0),
            "learning_rate": 3e-3,
            "epochs": 2,
            "batch_size": 8,
            "weight_decay": 0.1,
            "warmup": 0.3,
            "scheduler": "linear",
            "max_grad_norm": 0.5,
        }
        return TrialPlan(number=number, folder=tmp_path / f"{number:04d}", **{**values, **changes})

    return make
