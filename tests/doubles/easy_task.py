"""A task that a random base can learn, and trials of it."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import EngineSettings, TrialPlan
from lorasweep.model.base import Base

SETTINGS = EngineSettings(precision="fp32", device="cpu", log_every=2, eval_batch_size=8)
TRAIN_ROWS, VALIDATION_ROWS = 44, 20


def make_split(base: Base, name: str, rows: int, seed: int) -> EncodedSplit:
    """An easy task: label 1 where ``good`` or ``great`` occurs, else ``bad`` or ``awful`` does."""
    rng = random.Random(seed)
    filler = ["the", "film", "was", "a", "movie", "it", "very", "is", "but", "i"]
    tokens: list[int] = []
    offsets, labels = [0], []
    for row in range(rows):
        label = row % 2
        words = rng.choices(filler, k=rng.randint(1, 14))
        words.insert(
            rng.randint(0, len(words)), rng.choice([["bad", "awful"], ["good", "great"]][label])
        )
        tokens += base.tokenizer(" ".join(words))["input_ids"]
        offsets.append(len(tokens))
        labels.append(label)
    return EncodedSplit(
        name=name,
        tokens=np.asarray(tokens, dtype=np.int32),
        offsets=np.asarray(offsets, dtype=np.int64),
        labels=np.asarray(labels, dtype=np.int64),
    )


def numbered(plan: TrialPlan, number: int, **changes: object) -> TrialPlan:
    changes.setdefault("seed", plan.seed + number)
    return dataclasses.replace(
        plan, number=number, folder=plan.folder.parent / f"{number:04d}", **changes
    )
