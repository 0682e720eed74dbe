"""Whose each row of a flat matrix is, and what is summed or repeated by lane.

All tokens of a pack lie in one matrix, ``(tokens, width)``, lane after lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LaneSpans:
    """Which rows of a flat matrix are whose: lane ``l`` has ``ends[l - 1]:ends[l]``.

    Attributes:
        ends: One past each lane's last row, int32 ``(lanes,)``.
        lane: Each row's lane, int64 ``(rows,)``.
        longest: Rows of the lane that has the most; asking the device would make the host wait.
    """

    ends: Tensor
    lane: Tensor
    longest: int

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return len(self.ends)

    @cached_property
    def starts(self) -> Tensor:
        """Each lane's first row, and the end of the last: int64 ``(lanes + 1,)``."""
        return F.pad(self.ends.long(), (1, 0))

    @cached_property
    def place(self) -> Tensor:
        """Where each row goes in a ``(lanes, longest)`` grid laid out flat, int64 ``(rows,)``."""
        row = torch.arange(len(self.lane), device=self.lane.device)
        return row + (self.lane * self.longest - self.starts.index_select(0, self.lane))


class LaneRepeat(torch.autograd.Function):
    """Each row's lane's entry; torch's own gradient of a selection adds up in any order on CUDA."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, spans: LaneSpans) -> Tensor:
        """Return ``(rows, n)`` of ``(lanes, n)``."""
        ctx.spans = spans
        return values.index_select(0, spans.lane)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return lane_sums(grads[0].contiguous(), ctx.spans), None


def lane_repeat(values: Tensor, spans: LaneSpans) -> Tensor:
    """Give each row its lane's entry: ``(lanes, n)`` to ``(rows, n)``."""
    result: Tensor = LaneRepeat.apply(values, spans)
    return result


def lane_sums(values: Tensor, spans: LaneSpans) -> Tensor:
    """Sum the rows of each lane: ``(rows, n)`` to ``(lanes, n)``."""
    # segment_reduce sums inside each lane only: a NaN elsewhere can't get in, which a
    # difference of cumulative sums or a product with a 0/1 matrix would let happen. Unsafe only
    # means that no version of torch looks at the offsets, for which the host would have to wait.
    return torch.segment_reduce(
        values, "sum", offsets=spans.starts, axis=0, initial=0.0, unsafe=True
    )
