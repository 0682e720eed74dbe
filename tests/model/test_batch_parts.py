"""Rows cut in parts of as many tokens: nobody is lost, doubled, or moved."""

from __future__ import annotations

import numpy as np
import pytest

from lorasweep.model.batch_parts import BatchPart, cut
from lorasweep.model.packed_batch import LaneRows

RNG = np.random.default_rng(4)
LENGTHS = RNG.integers(1, 60, 200)


def lanes_of(*sizes: int) -> list[LaneRows]:
    """Lanes of so many rows each, no row in two of them."""
    rows = RNG.permutation(len(LENGTHS))[: sum(sizes)]
    pieces = np.split(rows, np.cumsum(sizes)[:-1])
    return [LaneRows(piece, key=n, step=10 * n) for n, piece in enumerate(pieces)]


def joined(parts: list[BatchPart], lanes: int) -> list[list[int]]:
    """Each lane's rows, from all parts in their order."""
    found: list[list[int]] = [[] for _ in range(lanes)]
    for part in parts:
        for lane, entry in enumerate(part.entries, part.first_lane):
            found[lane] += entry.rows.tolist()
    return found


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "sizes",
    [(16,) * 8, (1, 64, 3), (16,), (2,), (8, 0, 0, 16, 0), (0, 0, 9), (0, 1, 0, 1, 1, 1, 1)],
    ids=str,
)
def test_each_row_is_in_one_part_where_it_was(sizes, parts):
    lanes = lanes_of(*sizes)
    found = cut(lanes, LENGTHS, parts)
    assert joined(found, len(lanes)) == [entry.rows.tolist() for entry in lanes]
    for part in found:
        assert sum(len(entry.rows) for entry in part.entries) > 0
        for lane, entry in enumerate(part.entries, part.first_lane):
            assert (entry.key, entry.step) == (lane, 10 * lane)
            if len(found) > 1 and sizes[lane]:
                assert entry.of == sizes[lane]  # a loss is the mean over all of the lane's rows
    assert len(found) <= parts


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_have_as_many_tokens_as_rows_allow(parts):
    for _ in range(20):
        lanes = lanes_of(*RNG.integers(1, 33, 6))
        found = cut(lanes, LENGTHS, parts)
        tokens = [sum(int(LENGTHS[e.rows].sum()) for e in part.entries) for part in found]
        assert len(tokens) == parts
        # Each of a part's two ends is at most half a row from where it should be.
        assert max(tokens) - sum(tokens) / parts <= LENGTHS.max()


def test_a_lane_may_be_in_several_parts():
    lengths = np.full(12, 10)
    parts = cut([LaneRows(np.arange(12))], lengths, 3)
    assert [part.entries[0].rows.tolist() for part in parts] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert [(part.first_lane, part.entries[0].of) for part in parts] == [(0, 12)] * 3


def test_there_are_no_more_parts_than_rows_or_tokens_allow():
    parts = cut([LaneRows(np.array([3])), LaneRows(np.array([5]))], LENGTHS, 7)
    assert [part.first_lane for part in parts] == [0, 1]
    (whole,) = cut([LaneRows(np.array([3]))], LENGTHS, 7)
    assert whole.entries[0].of is None
    lengths = np.full(10, 7)
    for fewest, parts in ((1, 3), (23, 3), (24, 2), (35, 2), (36, 1), (71, 1)):
        assert len(cut([LaneRows(np.arange(10))], lengths, 3, fewest)) == parts
    (nothing,) = cut([LaneRows(np.array([], dtype=np.int64))], LENGTHS, 2)
    assert len(nothing.entries) == 1
