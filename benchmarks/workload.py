"""The work that every contender gets: the same texts, the same trials, the same scores."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from lorasweep.core.records import TextSplit

RATES = (2e-4, 5e-4, 1e-3, 2e-3)
RANKS = (4, 8, 16, 32)
BATCH_SIZE = 16
EVAL_BATCH_SIZE = 64
MAX_LENGTH = 128
DROPOUT = 0.1
LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Work:
    """What is to be done.

    trials: How many of the 16 points, in order. epochs: Of each. train_rows, validation_rows:
    So many of each split, evenly spaced, since the file is sorted by label; None for all.
    """

    trials: int = 16
    epochs: int = 2
    train_rows: int | None = None
    validation_rows: int | None = None

    def points(self) -> list[dict[str, float]]:
        """A grid of learning rates and ranks, the rank varying fastest."""
        grid = [{"learning_rate": rate, "rank": rank} for rate in RATES for rank in RANKS]
        return grid[: self.trials]


def read(work: Work) -> tuple[TextSplit, TextSplit]:
    """SST-2's whole sentences: 6,920 to train, 872 to validate."""
    folder = Path(os.environ["LORASWEEP_DATA"]) / "sst2"
    return (
        _split(folder / "sentences_train.csv", "train", work.train_rows),
        _split(folder / "sentences_validation.csv", "validation", work.validation_rows),
    )


def _split(path: Path, name: str, rows: int | None) -> TextSplit:
    with path.open(newline="", encoding="utf-8") as stream:
        everything = list(csv.DictReader(stream))
    count = len(everything) if rows is None else min(rows, len(everything))
    found = [everything[at * len(everything) // count] for at in range(count)]
    return TextSplit(
        name=name,
        texts=tuple(row["text"] for row in found),
        labels=tuple(int(row["label"]) for row in found),
        ids=tuple(f"{path.name}:{at}" for at in range(len(found))),
    )
