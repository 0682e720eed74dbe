"""One step's rows of all lanes, laid behind one another as a single list of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model.kernel_library import RowPlaces
from lorasweep.model.lane_spans import LaneSpans
from lorasweep.model.packed_dropout import token_keys
from lorasweep.model.row_buckets import Buckets, make_buckets
from lorasweep.model.transfer import on_device


@dataclass(frozen=True, slots=True)
class LaneRows:
    """What one lane contributes to a batch.

    Attributes:
        rows: Indices into the split, int64 ``(rows,)``, in the order of the lane's own batch.
        key: Of the trial's dropout, from :func:`lorasweep.model.packed_dropout.lane_key`.
        step: The trial's own step, which its dropout masks depend on.
        of: How many rows the lane's whole batch has, where these are a part of it.
    """

    rows: NDArray[np.int64]
    key: int = 0
    step: int = 0
    of: int | None = None


@dataclass(slots=True)
class PackedBatch:
    """Rows of all lanes, lane after lane, row after row; no row is padded.

    There may be a few filling tokens behind each lane's rows, which belong to no row.

    Attributes:
        split: Where the rows are from.
        ids: Token ids, int64 ``(1, tokens)``.
        positions: Each token's place in its row from 0, int64 ``(1, tokens)``.
        labels: int64 ``(rows,)``.
        token_spans, row_spans: Which tokens, and which rows, are whose.
        first: The first token of each row, int64 ``(rows,)``.
        row_starts: Where each row begins as long as there are no filling tokens, and the end of
            the last one, int32 ``(rows + 1,)``.
        row_lengths: Tokens of each row, int64 ``(rows,)``.
        real: Which tokens belong to rows, int64 ``(real tokens,)``; None for all.
        row_weight: One over the rows of the row's lane, float32 ``(rows,)``: a lane's loss is
            the mean over its own rows.
        lengths: :attr:`row_lengths` on the host.
        streams, row_streams: Dropout streams of tokens, and rows; None outside training.
        lane_streams: One for each lane, for what all of its rows share.
        split_tokens: Where each token lies in its split, int64 ``(tokens,)``.
        lanes: Which of the pack's lanes these are.
        part: Which part of a step it is, where one is cut in several.
    """

    split: EncodedSplit
    ids: Tensor
    positions: Tensor
    labels: Tensor
    token_spans: LaneSpans
    row_spans: LaneSpans
    first: Tensor
    row_starts: Tensor
    row_lengths: Tensor
    real: Tensor | None
    row_weight: Tensor
    lengths: NDArray[np.int64]
    streams: Tensor | None
    row_streams: Tensor | None
    lane_streams: Tensor | None
    split_tokens: Tensor
    lanes: range
    part: int = 0
    _buckets: Buckets | None = None
    _places: dict[bool, RowPlaces] = field(default_factory=dict)

    @property
    def buckets(self) -> Buckets:
        """How attention lays the rows out, where it has no compiled kernel; made on demand."""
        if self._buckets is None:
            self._buckets = make_buckets(self.lengths, self.ids.device)
        return self._buckets

    def places(self, *, first_only: bool) -> RowPlaces:
        """Where the rows lie, for compiled attention.

        Args:
            first_only: There is one query a row, of its first token.
        """
        if first_only not in self._places:
            length, gaps = torch.from_numpy(self.lengths), self._gaps()
            queries = (self.first, length, gaps)
            if first_only:
                queries = (torch.arange(len(length)), torch.ones_like(length), None)
            first, count, query_gaps = queries
            self._places[first_only] = RowPlaces(self.first, length, first, count, gaps, query_gaps)
        return self._places[first_only]

    def _gaps(self) -> Tensor | None:
        """Return the filling tokens, int64 ``(filling tokens,)``; None for none."""
        if self.real is None:
            return None
        filling = torch.ones(self.ids.shape[1], dtype=torch.bool, device=self.ids.device)
        filling[self.real] = False
        return filling.nonzero().squeeze(1)

    @property
    def tokens(self) -> int:
        """Tokens of the batch's rows."""
        return int(self.lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max(initial=0))

    @property
    def attended(self) -> int:
        """Tokens that were computed: filling tokens and attention's own padding included."""
        return max(self.ids.shape[1], 0 if self._buckets is None else len(self._buckets.token))


def lay_out(
    split: EncodedSplit,
    lanes: Sequence[LaneRows],
    device: torch.device,
    *,
    training: bool,
    filled: bool = False,
    first_lane: int = 0,
    part: int = 0,
) -> PackedBatch:
    """Gather each lane's rows into one batch.

    Args:
        split: Tokens and labels.
        lanes: One entry a lane, in the order of the lanes' weights; may have no rows.
        device: Where the batch shall lie.
        training: Make dropout streams.
        filled: Round lanes and the whole up by filling tokens, see :func:`filled_up`.
        first_lane: Which of the pack's lanes the first entry is.
        part: Which part of a step it is.
    """
    rows = np.concatenate([lane.rows for lane in lanes])
    per_lane = np.array([len(lane.rows) for lane in lanes], dtype=np.int64)
    row_lane = np.repeat(np.arange(len(lanes)), per_lane)
    lengths = split.lengths[rows]
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    token_row = np.repeat(np.arange(len(rows)), lengths)
    lane_tokens = np.bincount(row_lane, lengths, len(lanes)).astype(np.int64)
    sizes = filled_up(lane_tokens) if filled else lane_tokens
    shift = (np.cumsum(sizes) - sizes) - (np.cumsum(lane_tokens) - lane_tokens)
    first = starts + shift[row_lane]
    real = first[token_row] + positions
    total = int(sizes.sum())

    def spread(values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Leave room for the filling tokens, which get 0."""
        if total == len(values):
            return values
        found = np.zeros(total, dtype=np.int64)
        found[real] = values
        return found

    split_tokens = split.offsets[rows][token_row] + positions
    counts = [lane.of or max(1, len(lane.rows)) for lane in lanes]
    weight = (1.0 / np.array(counts)).astype(np.float32)
    arrays: dict[str, NDArray[Any]] = {
        "ids": spread(split.tokens[split_tokens].astype(np.int64)),
        "positions": spread(positions),
        "labels": split.labels[rows],
        "token_ends": np.cumsum(sizes).astype(np.int32),
        "token_lane": np.repeat(np.arange(len(lanes)), sizes),
        "row_ends": np.cumsum(per_lane).astype(np.int32),
        "row_lane": row_lane,
        "first": first,
        "row_starts": np.append(starts, lengths.sum()).astype(np.int32),
        "row_lengths": lengths,
        "row_weight": weight[row_lane],
        "split_tokens": spread(split_tokens),
    }
    if total != len(real):
        arrays["real"] = real
    if training:
        keys = np.array([lane.key for lane in lanes], dtype=np.int64)
        steps = np.array([lane.step for lane in lanes], dtype=np.int64)
        lane_of = row_lane[token_row]
        made = token_keys(keys[lane_of], steps[lane_of], rows[token_row], positions)
        none = np.full(len(lanes), -1, dtype=np.int64)
        arrays["streams"], arrays["row_streams"] = spread(made), made[starts]
        arrays["lane_streams"] = token_keys(keys, steps, none, none)
    which = range(first_lane, first_lane + len(lanes))
    return _batch(split, arrays, lengths, device, which, part)


def _batch(
    split: EncodedSplit,
    arrays: dict[str, NDArray[Any]],
    lengths: NDArray[np.int64],
    device: torch.device,
    lanes: range,
    part: int,
) -> PackedBatch:
    """Bring what was laid out to the device."""

    def spans(kind: str) -> LaneSpans:
        most = int(np.diff(arrays[f"{kind}_ends"], prepend=0).max(initial=1))
        return LaneSpans(there[f"{kind}_ends"], there[f"{kind}_lane"], most)

    there = dict(zip(arrays, on_device(list(arrays.values()), device), strict=True))
    return PackedBatch(
        split=split,
        ids=there["ids"].unsqueeze(0),
        positions=there["positions"].unsqueeze(0),
        labels=there["labels"],
        token_spans=spans("token"),
        row_spans=spans("row"),
        first=there["first"],
        row_starts=there["row_starts"],
        row_lengths=there["row_lengths"],
        real=there.get("real"),
        row_weight=there["row_weight"],
        lengths=lengths,
        streams=there.get("streams"),
        row_streams=there.get("row_streams"),
        lane_streams=there.get("lane_streams"),
        split_tokens=there["split_tokens"],
        lanes=lanes,
        part=part,
    )


def filled_up(lane_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round each lane's tokens up, and then all of them, by at most 1/32 each.

    Sizes that come back are worth more than the few tokens: oneDNN compiles a product anew for
    each size that it hasn't seen lately, and buffers of ever new sizes fragment glibc's heap,
    where that serves, until each step asks the kernel for fresh pages (docs/performance-history.md
    says what that took).

    Args:
        lane_tokens: Tokens of each lane, ``(lanes,)``.

    Returns:
        Tokens and filling tokens of each lane, ``(lanes,)``; the last one fills up the whole.
    """
    sizes = np.array([_rounded_up(count) for count in lane_tokens.tolist()], dtype=np.int64)
    total = int(sizes.sum())
    sizes[-1] += _rounded_up(total) - total
    return sizes


def _rounded_up(count: int) -> int:
    """Round up to a multiple of the largest power of two within a 32nd."""
    step = 1 << max(0, (count >> 5).bit_length() - 1)
    return -(-count // step) * step
