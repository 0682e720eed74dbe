"""Nine tokens in ten that a pack computes are real, on real texts, whatever the mix of lanes.

Only attention pads at all; everything else computes exactly the tokens of the batch. So attention's
places are what is counted, of the batches that lanes ask for and of those that score a split.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.engines.packing import Progress, length_batches
from lorasweep.model.base import open_base
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.spec.schema import ModelSpec

pytestmark = pytest.mark.data
CPU = torch.device("cpu")
CORPORA = {
    "sst2 phrases": ("sst2/glue_train.csv", "sentence", 8_000),
    "sst2 sentences": ("sst2/glue_validation.csv", "sentence", 872),
    "imdb": ("imdb/imdb_train_2k.csv", "text", 2_000),
}
# Batch sizes of the lanes; the rows of each lane are a trial's own.
MIXES = {
    "one lane": [16],
    "two lanes": [16, 16],
    "three lanes, mixed": [4, 16, 32],
    "eight lanes": [16] * 8,
    "eight lanes, mixed": [1, 4, 8, 8, 16, 16, 32, 64],
    "thirty-two lanes": [16] * 32,
}
STEPS = 15


@pytest.fixture(scope="module")
def tokens_of(real_data: Path) -> Callable[[str], list[list[int]]]:
    minilm = open_base(ModelSpec(name="embedded/minilm", max_length=512), ("no", "yes"))
    made: dict[str, list[list[int]]] = {}

    def make(corpus: str) -> list[list[int]]:
        if corpus not in made:
            file, column, rows = CORPORA[corpus]
            with (real_data / file).open(newline="", encoding="utf-8") as stream:
                texts = [
                    row[column] for _, row in zip(range(rows), csv.DictReader(stream), strict=False)
                ]
            made[corpus] = minilm.tokenizer(texts, truncation=True, max_length=512)["input_ids"]
        return made[corpus]

    return make


@pytest.fixture
def split_of(tokens_of) -> Callable[[str, int], EncodedSplit]:
    def make(corpus: str, max_length: int) -> EncodedSplit:
        rows = [row[:max_length] for row in tokens_of(corpus)]
        return EncodedSplit(
            name=corpus,
            tokens=np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
            offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
            labels=np.zeros(len(rows), dtype=np.int64),
        )

    return make


def real_share(batches: list[PackedBatch]) -> float:
    # All but attention computes no padding.
    assert all(batch.ids.numel() == batch.tokens for batch in batches)
    return sum(batch.tokens for batch in batches) / sum(batch.attended for batch in batches)


@pytest.mark.parametrize("max_length", [128, 512])
@pytest.mark.parametrize("corpus", CORPORA)
def test_while_training(corpus, max_length, split_of, make_plan):
    split = split_of(corpus, max_length)
    for mix, sizes in MIXES.items():
        lanes = [
            Progress(make_plan(n, batch_size=size, seed=n, epochs=9), split.lengths, step=3 * n)
            for n, size in enumerate(sizes)
        ]
        batches = []
        for _ in range(STEPS):
            batches.append(
                lay_out(split, [LaneRows(lane.next_rows()) for lane in lanes], CPU, training=False)
            )
            for lane in lanes:
                lane.step += 1
        assert real_share(batches) >= 0.9, mix
        # It is no matter of luck with a few batches: each of them keeps to it.
        assert min(map(real_share, ([batch] for batch in batches))) >= 0.9, mix


@pytest.mark.parametrize("max_length", [128, 512])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize(("rows", "lanes"), [(16, 1), (64, 1), (64, 3)])
def test_while_evaluating(rows, lanes, corpus, max_length, split_of):
    split = split_of(corpus, max_length)
    batches, seen = [], 0
    for chosen in length_batches(split, rows):
        # A lane that isn't due takes part with no rows.
        entries = [*(LaneRows(chosen) for _ in range(lanes)), LaneRows(chosen[:0])]
        batches.append(lay_out(split, entries, CPU, training=False))
        seen += batches[-1].tokens
    assert seen == lanes * split.lengths.sum()
    assert real_share(batches) >= 0.9


def test_a_trainers_way_would_not_do(split_of):
    """The corpora are what they are for: drawn and padded naively, most tokens aren't real."""
    lengths = split_of("sst2 phrases", 128).lengths
    rows = np.random.default_rng(0).permutation(len(lengths))[:7_680].reshape(-1, 16)
    assert lengths[rows].sum() / (16 * lengths[rows].max(axis=1).sum()) < 0.5
