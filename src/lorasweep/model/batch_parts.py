"""A step's rows, cut in parts that take as long as one another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorasweep.model.packed_batch import LaneRows


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPart:
    """Some of a step's rows.

    Attributes:
        first_lane: Which lane the first entry is of.
        entries: One a lane, from that lane on.
    """

    first_lane: int
    entries: list[LaneRows]


def cut(
    entries: Sequence[LaneRows], lengths: NDArray[np.int64], parts: int, fewest: int = 1
) -> list[BatchPart]:
    """Cut rows into parts of as many tokens each as rows allow, in the order they are in.

    A lane may be cut too: its rows then are in two parts or more, and its gradient is their sum.

    Args:
        entries: One a lane.
        lengths: Tokens of each row of the split.
        parts: How many; there are fewer where there are fewer rows or tokens.
        fewest: Tokens that parts must have on average.

    Returns:
        At least one part. Rows of all of them, behind one another, are those of the entries.
    """
    whole = BatchPart(0, list(entries))
    if parts == 1:
        return [whole]
    per_lane = [len(entry.rows) for entry in entries]
    rows = np.concatenate([entry.rows for entry in entries])
    tokens = lengths[rows]
    if (parts := min(parts, len(rows), int(tokens.sum()) // fewest)) < 2:
        return [whole]
    ends = np.cumsum(tokens)
    # Each cut goes where the rows before it come nearest to their share of the tokens.
    shares = ends[-1] * np.arange(1, parts) / parts
    after = np.searchsorted(ends - tokens / 2, shares)
    bounds = sorted({0, *after.tolist(), len(rows)})
    starts = np.cumsum([0, *per_lane])
    found = []
    for begin, end in itertools.pairwise(bounds):
        first, last = np.searchsorted(starts, (begin, end - 1), side="right") - 1
        part = []
        for lane in range(int(first), int(last) + 1):
            inside = slice(max(0, begin - starts[lane]), end - starts[lane])
            entry = entries[lane]
            part.append(
                dataclasses.replace(entry, rows=entry.rows[inside], of=per_lane[lane] or None)
            )
        found.append(BatchPart(int(first), part))
    return found
