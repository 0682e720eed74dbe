"""One pass of a pack: whose each token is, whose weights it meets, and where the pass begins.

Everything that is true of one pass only lies here, so that several may go through the same base
at the same time, each in a thread of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasweep.model.lane_spans import LaneSpans
from lorasweep.model.packed_batch import PackedBatch
from lorasweep.model.packed_dropout import scrambled


@dataclass(frozen=True, slots=True)
class LaneFactors:
    """What each lane's adapters multiply by, and drop.

    Attributes:
        scaling: With dropout's rescaling, ``(lanes,)``.
        rate: Dropout byte, int16 ``(lanes,)``; None where no lane drops anything.
    """

    scaling: Tensor
    rate: Tensor | None

    def of(self, lanes: range) -> LaneFactors:
        """Return those of some lanes."""
        part = slice(lanes.start, lanes.stop)
        return LaneFactors(self.scaling[part], None if self.rate is None else self.rate[part])


@dataclass(frozen=True, slots=True)
class Side:
    """The batch as layers see it: token by token, or (after pooling) row by row.

    Attributes:
        spans: Which entries are whose.
        streams: Dropout streams, int64 ``(entries,)``; None outside training.
        scaling: Of each entry's adapter, ``(entries, 1)``, dropout's rescaling included.
        rate: Dropout byte of each entry's adapter, int16 ``(entries, 1)``; None where no
            lane drops anything.
    """

    spans: LaneSpans
    streams: Tensor | None
    scaling: Tensor
    rate: Tensor | None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a pass begins to compute.

    Attributes:
        layer: The first layer that is computed.
        hidden: What goes into it, ``(tokens, hidden)``; None where that is yet to be found, and
            the pass is to end there.
    """

    layer: int
    hidden: Tensor | None


class Pass:
    """One pass.

    Args:
        batch: Its rows, of some or all lanes.
        parameters: What those lanes train, by name, ``(lanes, *shape)`` each.
        factors: Of those lanes.
        start: Where it begins; None for the first layer.

    Attributes:
        batch, parameters, start: As given.
    """

    def __init__(
        self,
        batch: PackedBatch,
        parameters: Mapping[str, Tensor],
        factors: LaneFactors,
        start: Start | None = None,
    ) -> None:
        self.batch = batch
        self.parameters = parameters
        self.start = start
        self._factors = factors
        self._calls: Counter[str] = Counter()
        # Where there are as many tokens as rows, they are the same entries: tokens go last.
        self._sides = {
            len(spans.lane): self._side(spans, streams)
            for spans, streams in (
                (batch.row_spans, batch.row_streams),
                (batch.token_spans, batch.streams),
            )
        }

    @property
    def lanes(self) -> int:
        """How many lanes it is of."""
        return len(self.batch.lanes)

    def side(self, entries: int) -> Side:
        """Return the batch as seen by a layer with this many input vectors."""
        return self._sides[entries]

    def shared_side(self, entries: int, first: int) -> Side:
        """Return the side of what all rows share, repeated for each lane.

        Args:
            entries: How many vectors each lane has; they lie lane after lane.
            first: Number of the first one, so that its dropout doesn't depend on the others.
        """
        device = self.batch.ids.device
        lanes = torch.arange(self.lanes, device=device)
        streams = None
        if self.batch.lane_streams is not None:
            number = torch.arange(first, first + entries, device=device)
            streams = scrambled(self.batch.lane_streams[:, None] + number[None, :]).flatten()
        ends = ((lanes + 1) * entries).to(torch.int32)
        return self._side(LaneSpans(ends, lanes.repeat_interleave(entries), entries), streams)

    def call(self, module: str) -> int:
        """Count the calls of a module in this pass: 0 for the first one."""
        self._calls[module] += 1
        return self._calls[module] - 1

    def _side(self, spans: LaneSpans, streams: Tensor | None) -> Side:
        scaling, rate = self._factors.scaling, self._factors.rate
        return Side(
            spans=spans,
            streams=streams,
            scaling=scaling.index_select(0, spans.lane).unsqueeze(1),
            rate=None if rate is None else rate.index_select(0, spans.lane).unsqueeze(1),
        )
