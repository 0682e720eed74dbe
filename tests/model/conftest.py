"""A base, a handful of texts, and tokens of them, for every test of the room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen
from varlen_kernel import StandIn

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model import packed_attention as attention_module
from lorasweep.model import varlen_proof
from lorasweep.model.base import Base, open_base
from lorasweep.spec.schema import ModelSpec

TEXTS = (
    "a great film",
    "the movie was not very good, and i was bad at it for the whole long and awful night",
    "fine",
    "dull but great",
    "this is it",
    "awful",
    "it was a bad bad movie and a great film is not it",
)


@pytest.fixture
def open_tiny(tiny_base_folder: Callable[..., Path]) -> Callable[..., Base]:
    """Open a tiny base of an architecture: ``open_tiny("bert", labels=("no", "yes"))``."""

    def make(
        architecture: str = "bert", labels: tuple[str, ...] = ("no", "yes"), **spec: object
    ) -> Base:
        folder = tiny_base_folder(architecture)
        return open_base(ModelSpec(name=str(folder), **{"max_length": 64, **spec}), labels)

    return make


@pytest.fixture
def encode() -> Callable[[Base], EncodedSplit]:
    """Tokenise the texts above for a base."""

    def make(base: Base) -> EncodedSplit:
        rows = base.tokenizer(list(TEXTS), truncation=True, max_length=base.max_length)["input_ids"]
        lengths = [len(row) for row in rows]
        return EncodedSplit(
            name="some",
            tokens=np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            labels=np.asarray([at % 2 for at in range(len(rows))], dtype=np.int64),
        )

    return make


@pytest.fixture
def use_kernel(monkeypatch) -> Callable[..., StandIn]:
    """Let a stand-in serve the CPU, instead of compiled attention."""

    def make(kernel=None, types=(torch.bfloat16, torch.float16)):
        kernel = StandIn(types) if kernel is None else kernel
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        monkeypatch.setattr(varlen_proof, "_DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(varlen_proof, "_TYPES", frozenset(types))
        if torch.float32 in types:  # then the buckets that it is held to round as much as it
            monkeypatch.setattr(varlen_proof, "_TOLERANCE", 100)
        monkeypatch.setattr(attention_module, "kernels_for", lambda _: None)
        varlen_proof._tried.cache_clear()
        return kernel

    yield make
    varlen_proof._tried.cache_clear()
