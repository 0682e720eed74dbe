"""A base, a handful of texts, and tokens of them, for every test of the room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorasweep.core.corpora import EncodedSplit
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
