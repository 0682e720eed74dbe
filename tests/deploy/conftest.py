"""Tiny fine-tuned models: a base, and an adapter that says something of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasweep.core.plans import AdapterPlan
from lorasweep.deploy.export import export
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier, open_base
from lorasweep.model.checkpoint import save_adapter
from lorasweep.spec.schema import ModelSpec

TEXTS = (
    "a great film",
    "the movie was not very good, and i was bad at it for the whole long and awful night",
    "fine",
    "dull but great?",
    "it was a bad bad movie and a great film is not it",
)


@pytest.fixture
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture
def finetuned(
    tiny_base_folder: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Base, Path]]:
    """Make a base and an adapter that isn't zero: ``finetuned("bert", ("no", "yes"))``."""

    def make(
        architecture: str = "bert", labels: tuple[str, ...] = ("no", "yes"), max_length: int = 24
    ) -> tuple[Base, Path]:
        folder = tiny_base_folder(architecture)
        base = open_base(ModelSpec(name=str(folder), max_length=max_length), labels)
        model = attach(fresh_classifier(base, seed=1), AdapterPlan(rank=4, alpha=8.0), seed=2)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        save_adapter(model, tmp_path / f"adapter-{architecture}")
        return base, tmp_path / f"adapter-{architecture}"

    return make


@pytest.fixture
def exported(finetuned: Callable[..., tuple[Base, Path]], tmp_path: Path) -> Callable[..., Path]:
    """Export a tiny model: ``exported("bert", ("no", "yes"))``."""

    def make(architecture: str = "bert", labels: tuple[str, ...] = ("no", "yes")) -> Path:
        base, adapter = finetuned(architecture, labels)
        return export(base, adapter, tmp_path / f"export-{architecture}", {"sweep": "tiny"})

    return make
