from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lorasweep.core.corpora import TextSplit
from lorasweep.core.plans import EngineSettings
from lorasweep.core.protocols import Baseline
from lorasweep.model.base import Base, open_base
from lorasweep.spec.schema import ModelSpec


@pytest.fixture
def base(tiny_base_folder: Callable[..., Path]) -> Base:
    return open_base(ModelSpec(name=str(tiny_base_folder("bert")), max_length=32), ("no", "yes"))


@pytest.fixture
def settings() -> EngineSettings:
    return EngineSettings(precision="fp32", eval_batch_size=4, device="cpu")


@pytest.fixture
def build(base: Base, settings: EngineSettings) -> Callable[..., Baseline]:
    from lorasweep.baselines.build import build_baseline

    def make(name: str, seed: int = 42) -> Baseline:
        return build_baseline(name, base=base, seed=seed, settings=settings)

    return make


@pytest.fixture
def split() -> Callable[[Sequence[tuple[str, int]]], TextSplit]:
    def make(rows: Sequence[tuple[str, int]]) -> TextSplit:
        return TextSplit(
            name="train",
            texts=tuple(text for text, _ in rows),
            labels=tuple(label for _, label in rows),
            ids=tuple(f"made:{at}" for at in range(1, len(rows) + 1)),
        )

    return make
