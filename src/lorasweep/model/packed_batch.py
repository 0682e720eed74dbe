"""One step's rows of all lanes, laid behind one another as a single list of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasweep.core.records import EncodedSplit
from lorasweep.model.packed_attention import Buckets, make_buckets
from lorasweep.model.packed_dropout import token_keys


@dataclass(frozen=True, slots=True)
class LaneRows:
    """What one lane contributes to a batch.

    Attributes:
        rows: Indices into the split, int64 ``(rows,)``, in the order of the lane's own batch.
        key: Of the trial's dropout, from :func:`lorasweep.model.packed_dropout.lane_key`.
        step: The trial's own step, which its dropout masks depend on.
    """

    rows: NDArray[np.int64]
    key: int = 0
    step: int = 0


@dataclass(slots=True)
class PackedBatch:
    """Rows of all lanes, lane after lane, row after row, without any padding.

    Attributes:
        split: Where the rows are from.
        ids: Token ids, int64 ``(1, tokens)``.
        positions: Each token's place in its row from 0, int64 ``(1, tokens)``.
        labels: int64 ``(rows,)``.
        token_ends, row_ends: One past each lane's last token, and row; int32 ``(lanes,)``.
        token_lane, row_lane: The lane of each token, and row; int64.
        first: The first token of each row, int64 ``(rows,)``.
        row_starts: ``first`` with the number of tokens appended, int64 ``(rows + 1,)``.
        row_weight: One over the rows of the row's lane, float32 ``(rows,)``: a lane's loss is
            the mean over its own rows.
        buckets: How attention lays the rows out.
        streams, row_streams: Dropout streams of tokens, and rows; None outside training.
        lane_streams: One for each lane, for what all of its rows share.
        split_tokens: Where each token lies in its split, int64 ``(tokens,)``.
    """

    split: EncodedSplit
    ids: Tensor
    positions: Tensor
    labels: Tensor
    token_ends: Tensor
    row_ends: Tensor
    token_lane: Tensor
    row_lane: Tensor
    first: Tensor
    row_starts: Tensor
    row_weight: Tensor
    buckets: Buckets
    streams: Tensor | None
    row_streams: Tensor | None
    lane_streams: Tensor | None
    split_tokens: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the batch, all of them real."""
        return self.ids.shape[1]

    @property
    def attended(self) -> int:
        """Tokens that attention computes, its padding included."""
        return len(self.buckets.token)


def lay_out(
    split: EncodedSplit,
    lanes: Sequence[LaneRows],
    device: torch.device,
    *,
    training: bool,
) -> PackedBatch:
    """Gather each lane's rows into one batch.

    Args:
        split: Tokens and labels.
        lanes: One entry a lane, in the order of the lanes' weights; may have no rows.
        device: Where the batch shall lie.
        training: Make dropout streams.
    """
    rows = np.concatenate([lane.rows for lane in lanes])
    per_lane = np.array([len(lane.rows) for lane in lanes], dtype=np.int64)
    row_lane = np.repeat(np.arange(len(lanes)), per_lane)
    lengths = split.lengths[rows]
    ends = np.cumsum(lengths)
    first = ends - lengths
    positions = np.arange(int(ends[-1])) - np.repeat(first, lengths)
    split_tokens = np.repeat(split.offsets[rows], lengths) + positions
    token_lane = np.repeat(row_lane, lengths)
    lane_tokens = np.bincount(token_lane, minlength=len(lanes))
    streams = row_streams = lane_streams = None
    if training:
        keys = np.array([lane.key for lane in lanes], dtype=np.int64)
        steps = np.array([lane.step for lane in lanes], dtype=np.int64)
        made = token_keys(keys[token_lane], steps[token_lane], np.repeat(rows, lengths), positions)
        streams = torch.from_numpy(made).to(device)
        row_streams = torch.from_numpy(made[first]).to(device)
        none = np.full(len(lanes), -1, dtype=np.int64)
        lane_streams = torch.from_numpy(token_keys(keys, steps, none, none)).to(device)

    def there(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    weight = (1.0 / np.maximum(per_lane, 1)).astype(np.float32)
    return PackedBatch(
        split=split,
        ids=there(split.tokens[split_tokens].astype(np.int64)).unsqueeze(0),
        positions=there(positions).unsqueeze(0),
        labels=there(split.labels[rows]),
        token_ends=there(np.cumsum(lane_tokens).astype(np.int32)),
        row_ends=there(np.cumsum(per_lane).astype(np.int32)),
        token_lane=there(token_lane),
        row_lane=there(row_lane),
        first=there(first),
        row_starts=there(np.append(first, ends[-1])),
        row_weight=there(weight[row_lane]),
        buckets=make_buckets(lengths, device),
        streams=streams,
        row_streams=row_streams,
        lane_streams=lane_streams,
        split_tokens=there(split_tokens),
    )
