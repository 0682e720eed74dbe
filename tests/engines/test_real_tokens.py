"""Nine tokens in ten that a pack computes are real, on real texts, whatever the mix of lanes.

There are two ways to lay rows out, and each computes some tokens that nobody asked for: with
compiled kernels there are filling tokens, which go through everything; without them attention
pads inside buckets. Both are counted, of the batches that lanes ask for and of those that score a
split.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from recorder import Recorder, keep_nothing

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import EngineSettings
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.packing import Progress, length_batches
from lorasweep.model import grouped_products, kernels
from lorasweep.model.base import open_base
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.spec.schema import ModelSpec

pytestmark = pytest.mark.data
CPU = torch.device("cpu")
# Numbers of rows that no batch size divides, so that an epoch has a smaller batch, too.
CORPORA = {
    "sst2 phrases": ("sst2/glue_train.csv", "sentence", 7_989),
    "sst2 sentences": ("sst2/glue_validation.csv", "sentence", 869),
    "imdb": ("imdb/imdb_train_2k.csv", "text", 1_989),
}
# Batch sizes of the lanes; the rows of each lane are a trial's own.
MIXES = {
    "one lane, row by row": [1],
    "one lane, small batches": [4],
    "one lane": [16],
    "one lane, large batches": [64],
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


@pytest.fixture(params=["filling tokens", "buckets"])
def compute(request) -> Callable[[EncodedSplit, list[LaneRows]], PackedBatch]:
    """Lay rows out, and have them laid out for attention, in one of the two ways."""
    compiled = request.param == "filling tokens"

    def make(split: EncodedSplit, entries: list[LaneRows]) -> PackedBatch:
        batch = lay_out(split, entries, CPU, training=False, filled=compiled)
        if compiled:
            computed = batch.ids.numel()
        else:
            assert batch.ids.numel() == batch.tokens  # all but attention computes no padding
            computed = sum(bucket.places for bucket in batch.buckets.each)
        # What the engine's own count is made of.
        assert batch.attended == computed
        return batch

    return make


def real_share(batches: list[PackedBatch]) -> float:
    return sum(batch.tokens for batch in batches) / sum(batch.attended for batch in batches)


def assert_real(batches: list[PackedBatch], mix: str = "") -> None:
    assert real_share(batches) >= 0.9, mix
    # It is no matter of luck with a few batches: each of them keeps to it.
    assert min(real_share([batch]) for batch in batches) >= 0.9, mix


def steps_of(lanes: list[Progress]) -> Iterator[list[LaneRows]]:
    """Yield each step's rows until all lanes have ended; nothing replaces one that has."""
    while lanes := [lane for lane in lanes if not lane.ended]:
        yield [LaneRows(lane.next_rows()) for lane in lanes]
        for lane in lanes:
            lane.step += 1


@pytest.mark.parametrize("max_length", [128, 512])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("ending", [False, True], ids=["under way", "about to end"])
def test_while_training(ending, corpus, max_length, compute, split_of, make_plan):
    split, every = split_of(corpus, max_length), []
    for mix, sizes in MIXES.items():
        lanes = [
            Progress(make_plan(n, batch_size=size, seed=n, epochs=9), split.lengths, step=3 * n)
            for n, size in enumerate(sizes)
        ]
        if ending:  # one after the other, until a single lane is left
            for n, lane in enumerate(lanes):
                lane.step = lane.steps - 1 - n % STEPS
        batches = [compute(split, entries) for entries in islice(steps_of(lanes), STEPS)]
        assert_real(batches, mix)
        every += batches
    # Something was computed that isn't real, or the share would say nothing.
    assert real_share(every) < 1


def test_in_a_whole_epoch_with_its_smaller_batch(compute, split_of, make_plan):
    split = split_of("sst2 sentences", 128)
    for sizes in ([16], [64], [16, 32, 64]):
        lanes = [
            Progress(make_plan(n, batch_size=size, seed=n, epochs=1), split.lengths)
            for n, size in enumerate(sizes)
        ]
        steps = list(steps_of(lanes))
        rows = [{len(entry.rows) for entry in entries} for entries in steps]
        assert {len(split) % size for size in sizes} <= set.union(*rows)
        assert_real([compute(split, entries) for entries in steps], str(sizes))


@pytest.mark.parametrize("max_length", [128, 512])
@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize(("rows", "lanes"), [(4, 1), (16, 1), (64, 1), (64, 3)])
def test_while_evaluating(rows, lanes, corpus, max_length, compute, split_of):
    split = split_of(corpus, max_length)
    batches = []
    for chosen in length_batches(split, rows):
        # A lane that isn't due takes part with no rows.
        entries = [*(LaneRows(chosen) for _ in range(lanes)), LaneRows(chosen[:0])]
        batches.append(compute(split, entries))
    assert sum(batch.tokens for batch in batches) == lanes * split.lengths.sum()
    assert_real(batches)
    assert real_share(batches) < 1


@pytest.fixture
def trained(split_of, open_tiny, make_plan, monkeypatch) -> Callable[[], PackedEngine]:
    """Train lanes that differ on real rows, in an engine that notes its batches."""

    def make(parts: int = 1) -> PackedEngine:
        base, split = open_tiny(base_dropout=0.0), split_of("sst2 sentences", 64)
        # A tiny base knows few tokens; only how many there are matters here.
        tokens = 5 + split.tokens % (base.config.vocab_size - 5)
        train, validation = (
            EncodedSplit(name, tokens, split.offsets[at : at + n + 1], split.labels[at : at + n])
            for name, at, n in (("train", 0, 75), ("validation", 75, 130))
        )
        settings = EngineSettings(precision="fp32", device="cpu")
        engine = PackedEngine(base, train, validation, settings, 3)
        engine.passes.most, engine.passes.fewest = parts, 128
        plans = [
            make_plan(n, seed=n, batch_size=size, epochs=epochs)
            for n, (size, epochs) in enumerate([(16, 2), (4, 1), (32, 3), (16, 1), (1, 1)])
        ]
        run_base = engine.model.run_base

        def note(batch: PackedBatch, **how: object) -> torch.Tensor:
            logits = run_base(batch, **how)
            engine.seen.append(batch)
            return logits

        engine.seen = []
        monkeypatch.setattr(engine.model, "run_base", note)
        outcomes = list(engine.run(plans, Recorder(keep_nothing)))
        assert [outcome.reason for outcome in outcomes] == [""] * len(plans)
        return engine

    return make


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("compiled", [True, False])
def test_as_the_engine_itself_lays_out_and_counts(compiled, parts, trained, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "_loaded", lambda: "not wanted")
    engine = trained(parts)
    assert {batch.part for batch in engine.seen} == set(range(parts))
    assert {batch._buckets is None for batch in engine.seen} == {compiled}
    # In fit, which has streams of dropout, as in evaluation, which has none.
    kinds = {batch.streams is None for batch in engine.seen if batch.ids.numel() > batch.tokens}
    assert kinds == ({True, False} if compiled else set())
    assert engine.use.tokens == sum(batch.tokens for batch in engine.seen)
    assert engine.use.attended == sum(batch.attended for batch in engine.seen)
    assert engine.use.tokens < engine.use.attended
    assert_real(engine.seen)


def test_lora_pads_no_lane_on_a_cpu(trained, monkeypatch):
    spread, padded = grouped_products._spread, []

    def note(x: torch.Tensor, spans: object) -> torch.Tensor:
        padded.append(len(x))
        return spread(x, spans)

    monkeypatch.setattr(grouped_products, "_spread", note)
    engine = trained()
    # Heads of two labels are padded, row by row; no product of all tokens is.
    assert padded
    assert max(padded) <= max(len(batch.lengths) for batch in engine.seen)


def test_a_trainers_way_would_not_do(split_of):
    """The corpora are what they are for: drawn and padded naively, most tokens aren't real."""
    lengths = split_of("sst2 phrases", 128).lengths
    rows = np.random.default_rng(0).permutation(len(lengths))[:7_680].reshape(-1, 16)
    assert lengths[rows].sum() / (16 * lengths[rows].max(axis=1).sum()) < 0.5
