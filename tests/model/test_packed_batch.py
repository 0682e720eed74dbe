"""The layout of one step's rows: what is filled up, and that filling changes nothing."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model.packed_batch import LaneRows, filled_up, lay_out

CPU = torch.device("cpu")


def split_of(lengths: list[int]) -> EncodedSplit:
    rng = np.random.default_rng(3)
    return EncodedSplit(
        name="train",
        tokens=rng.integers(1, 99, sum(lengths)).astype(np.int32),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        labels=rng.integers(0, 2, len(lengths)),
    )


def test_filling_rounds_lanes_and_the_whole_by_a_32nd_at_most():
    counts = np.array([425, 0, 7, 816, 64, 1000])
    sizes = filled_up(counts)
    assert (sizes >= counts).all()
    assert (sizes[:-1] <= counts[:-1] * 33 / 32).all()
    assert sizes.sum() <= counts.sum() * (33 / 32) ** 2
    # Sizes of one octave are few: a product compiled for one of them serves again.
    each = {int(filled_up(np.array([count]))[0]) for count in range(256, 512)}
    assert len(each) <= 34


def test_filling_tokens_belong_to_no_row():
    split = split_of([26, 31, 9, 40] * 8)
    lanes = [LaneRows(np.arange(0, 20), 5, 1), LaneRows(np.arange(12, 32), 6, 3)]
    plain, filled = (
        lay_out(split, lanes, CPU, training=True, filled=filled) for filled in (False, True)
    )
    assert filled.ids.shape[1] > plain.ids.shape[1] == plain.tokens == filled.tokens
    assert filled.attended == filled.ids.shape[1]
    for name in ("ids", "positions", "streams", "token_spans.lane", "split_tokens"):
        whole, expected = (attrgetter(name)(batch).flatten() for batch in (filled, plain))
        assert torch.equal(whole[filled.real], expected), name
    assert torch.equal(filled.row_streams, plain.row_streams)
    row = filled.places(first_only=False)
    for at, length in enumerate(plain.lengths):
        start = int(filled.first[at])
        assert filled.positions[0, start : start + length].tolist() == list(range(length))
    assert torch.equal(row.length, torch.from_numpy(plain.lengths))
    everything = torch.cat([row.gaps, filled.real]).sort().values
    assert torch.equal(everything, torch.arange(filled.attended))
    assert torch.equal(row.query_gaps, row.gaps)
    of_first = filled.places(first_only=True)
    assert torch.equal(of_first.gaps, row.gaps)
    assert of_first.query_gaps is None
    assert plain.places(first_only=False).gaps is None
