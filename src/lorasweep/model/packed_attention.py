"""Attention over rows of unequal length that lie behind one another, without padding tokens.

Everything else in an encoder works token by token and never notices where a row ends;
attention does. Rows of like length form a bucket, each bucket is one batched product, and a
row is padded to the longest of its bucket at most (never across lanes' values: a row's
padding repeats its own first token, masked out, so a NaN can't travel).

The attention function is registered with transformers under :data:`PACKED`, so the model's
own code runs unchanged around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from lorasweep.model.kernels import Attending, RowPlaces, kernels_for
from lorasweep.model.packed_dropout import Mask, kept_scale, rate_byte

PACKED = "lorasweep_packed"

# Padding inside a bucket that is not worth another bucket's calls: measured on SST-2 and IMDB.
_SPARE = 0.06


@dataclass(slots=True)
class Bucket:
    """Rows that attend in one batched product.

    Attributes:
        rows: How many.
        longest: Tokens of the longest; the others are padded to it.
        start: The bucket's first place in the padded order.
        first_row: How many rows lie in the buckets before it.
        real: Which places are tokens of their row, bool ``(rows, longest)``; None when all.
        window: Which pairs a sliding window lets see each other, by its width; made on demand.
    """

    rows: int
    longest: int
    start: int
    first_row: int
    real: Tensor | None
    window: dict[int, Tensor] = field(default_factory=dict)

    @property
    def places(self) -> int:
        """Tokens computed, padding included."""
        return self.rows * self.longest


@dataclass(slots=True)
class Buckets:
    """How the tokens of a batch are laid out for attention.

    Attributes:
        each: The buckets, in padded order.
        token: Which token each place of the padded order holds, int64 ``(places,)``.
        place: Where each token lies in the padded order, int64 ``(tokens,)``.
        row: Which row of the batch comes next in the padded order, int64 ``(rows,)``.
        by_head: Indices for a layout with heads, by number of heads and kind.
    """

    each: tuple[Bucket, ...]
    token: Tensor
    place: Tensor
    row: Tensor
    by_head: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def indices(self, heads: int, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """Return indices from ``(token, head)`` to ``(row, head, place)`` order, and back.

        Args:
            heads: How many.
            first_only: For queries of each row's first token only: from ``(row, head)`` in the
                batch's order to ``(row, head)`` in the padded order, and back.
        """
        kind = heads, first_only
        if kind not in self.by_head:
            made = self._first_indices(heads) if first_only else self._indices(heads)
            self.by_head[kind] = made
        return self.by_head[kind]

    def _first_indices(self, heads: int) -> tuple[Tensor, Tensor]:
        head = torch.arange(heads, device=self.row.device)
        forth = (self.row[:, None] * heads + head[None, :]).flatten()
        return forth, torch.argsort(forth)

    def _indices(self, heads: int) -> tuple[Tensor, Tensor]:
        head = torch.arange(heads, device=self.token.device)
        parts = []
        for bucket in self.each:
            token = self.token[bucket.start : bucket.start + bucket.places]
            token = token.view(bucket.rows, 1, bucket.longest)
            parts.append((token * heads + head.view(1, heads, 1)).flatten())
        forth = torch.cat(parts)
        # Each token's last place among duplicates would be padding: place names the real one.
        back = torch.empty(len(self.place), heads, dtype=torch.int64, device=forth.device)
        for bucket in self.each:
            inside = (self.place >= bucket.start) & (self.place < bucket.start + bucket.places)
            tokens = inside.nonzero().squeeze(1)
            local = self.place[tokens] - bucket.start
            row, column = local // bucket.longest, local % bucket.longest
            base = bucket.start * heads + row * heads * bucket.longest + column
            back[tokens] = base[:, None] + head[None, :] * bucket.longest
        return forth, back.flatten()


def make_buckets(lengths: NDArray[np.int64], device: torch.device) -> Buckets:
    """Sort rows into buckets of like length.

    Args:
        lengths: Tokens of each row, ``(rows,)``; the rows lie behind one another.
        device: Where the indices shall lie.
    """
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    each, tokens = [], []
    place = np.empty(int(lengths.sum()), dtype=np.int64)
    at = 0
    for first, last in bucket_bounds(lengths[order]):
        rows = order[first:last]
        longest = int(lengths[rows[0]])
        column = np.arange(longest)
        real = column[None, :] < lengths[rows, None]
        token = np.where(real, starts[rows, None] + column[None, :], starts[rows, None])
        grid = at + np.arange(len(rows))[:, None] * longest + column[None, :]
        place[token[real]] = grid[real]
        mask = None if real.all() else torch.from_numpy(real).to(device)
        each.append(Bucket(len(rows), longest, at, first, mask))
        tokens.append(token.ravel())
        at += len(rows) * longest
    return Buckets(
        tuple(each),
        torch.from_numpy(np.concatenate(tokens)).to(device),
        torch.from_numpy(place).to(device),
        torch.from_numpy(order).to(device),
    )


def bucket_bounds(lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut rows sorted by falling length where padding to the longest would cost too much."""
    bounds = []
    first, places, tokens = 0, 0, 0
    for index, length in enumerate(lengths.tolist()):
        longest = int(lengths[first])
        grown, real = places + longest, tokens + length
        if index > first and (grown - real) > _SPARE * grown:
            bounds.append((first, index))
            first, grown, real = index, length, length
        places, tokens = grown, real
    bounds.append((first, len(lengths)))
    return bounds


class RowAttention(torch.autograd.Function):
    """Softmax attention inside each row (Vaswani et al. 2017, arXiv:1706.03762).

    Written out because torch's own kernel is several times slower on short rows on a CPU, and
    can't take a given dropout mask. ``gradcheck`` holds the gradient to the truth.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        buckets: Buckets,
        dropout: AttentionDropout | None,
        window: int | None,
    ) -> Tensor:
        """Return ``(tokens, heads, width)`` from three of the same shape.

        With a query for each row instead of each token, ``(rows, heads, width)``, only each
        row's first token attends.
        """
        _, heads, width = query.shape
        first_only = len(query) != len(key)
        forth, back = buckets.indices(heads, first_only)
        all_forth, all_back = buckets.indices(heads)
        q_laid = query.reshape(-1, width).index_select(0, forth)
        k_laid, v_laid = (x.reshape(-1, width).index_select(0, all_forth) for x in (key, value))
        out = torch.empty_like(q_laid)
        weights, masks = [], []
        for bucket in buckets.each:
            q, o = (_of_bucket(x, bucket, heads, first_only) for x in (q_laid, out))
            k, v = (_of_bucket(x, bucket, heads) for x in (k_laid, v_laid))
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
            weight = _softmax(scores, bucket, heads, window)
            mask = None
            if dropout is not None:
                mask = dropout.mask(buckets, bucket, heads, first_only)
            weights.append(weight)
            masks.append(mask)
            torch.bmm(_dropped(weight, mask, dropout), v, out=o)
        ctx.save_for_backward(q_laid, k_laid, v_laid, back, all_back, *weights)
        ctx.packing = (scaling, buckets, dropout, first_only, masks)
        return out.index_select(0, back).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaling, buckets, dropout, first_only, masks = ctx.packing
        query, key, value, back, all_back, *weights = ctx.saved_tensors
        _, heads, width = grads[0].shape
        # Padding places repeat a token; what they output is never read, so its gradient is 0.
        grad_out = torch.zeros_like(query)
        grad_out.index_copy_(0, back, grads[0].reshape(-1, width))
        results = [torch.empty_like(x) for x in (query, key, value)]
        for bucket, weight, mask in zip(buckets.each, weights, masks, strict=True):
            q, go, gq = (
                _of_bucket(x, bucket, heads, first_only) for x in (query, grad_out, results[0])
            )
            k, v, gk, gv = (_of_bucket(x, bucket, heads) for x in (key, value, *results[1:]))
            torch.bmm(_dropped(weight, mask, dropout).transpose(1, 2), go, out=gv)
            grad_weight = _dropped(torch.bmm(go, v.transpose(1, 2)), mask, dropout)
            grad_scores = _softmax_gradient(grad_weight, weight).mul_(scaling)
            torch.bmm(grad_scores, k, out=gq)
            if ctx.needs_input_grad[1]:  # not below the first adapted layer
                torch.bmm(grad_scores.transpose(1, 2), q, out=gk)
        gathered = (
            found.index_select(0, index).view(-1, heads, width) if wanted else None
            for found, index, wanted in zip(
                results, (back, all_back, all_back), ctx.needs_input_grad[:3], strict=True
            )
        )
        return (*gathered, None, None, None, None)


class CompiledAttention(torch.autograd.Function):
    """What :class:`RowAttention` does, row by row in one loop, without buckets or padding."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        places: RowPlaces,
        dropout: AttentionDropout | None,
        window: int | None,
    ) -> Tensor:
        """Return what :class:`RowAttention` returns."""
        how = Attending(scaling, window or 0)
        if dropout is not None:
            rate = rate_byte(dropout.rate)
            how = Attending(scaling, window or 0, dropout.streams, dropout.key, rate)
        kernels = kernels_for(query)
        assert kernels is not None  # packed_attention asked before
        out, sums = kernels.attend(query, key, value, places, how)
        ctx.save_for_backward(query, key, value, sums)
        ctx.packing = (kernels, places, how)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sums = ctx.saved_tensors
        kernels, places, how = ctx.packing
        found = kernels.attend_backward(
            grads[0], sums, query, key, value, places, how, ctx.needs_input_grad[1]
        )
        return (*found, None, None, None, None)


@dataclass(slots=True)
class AttentionDropout:
    """Dropout on attention weights, keyed like every other.

    Attributes:
        streams: int64, ``(tokens,)``: of each token as a query.
        key: Of the module.
        rate: Share dropped.
    """

    streams: Tensor
    key: int
    rate: float

    def mask(
        self,
        buckets: Buckets,
        bucket: Bucket,
        heads: int,
        first_only: bool = False,
    ) -> Mask:
        """Return which weights are kept, for ``(rows * heads, queries, longest)``."""
        token = buckets.token[bucket.start : bucket.start + bucket.places]
        token = token.view(bucket.rows, 1, bucket.longest)
        streams = self.streams[token[..., :1] if first_only else token]
        # A stream for each head: odd multiples keep them apart.
        offset = torch.arange(1, 2 * heads, 2, device=streams.device).view(1, heads, 1)
        return Mask((streams * offset).contiguous(), self.key, rate_byte(self.rate))

    @property
    def scale(self) -> float:
        """What kept weights are multiplied by."""
        return kept_scale(self.rate)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend inside each row: the function that transformers calls, for all tokens at once.

    Args:
        module: The attention module; ``module.pack`` knows the batch (see ``packed_lora``).
        query: ``(1, heads, tokens, width)``, or with rows instead of tokens.
        key: ``(1, heads, tokens, width)``.
        value: As ``key``.
        attention_mask: None: the rows are known from the batch.
        scaling: Of the scores; None for ``width ** -0.5``.
        dropout: Rate on the attention weights; 0 outside training.
        sliding_window: One more than how far a token sees in either direction; None for all.

    Returns:
        ``(1, tokens, heads, width)``, and None for the weights.
    """
    del attention_mask
    pack = module.pack
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    masked = None
    if dropout > 0 and pack.batch.streams is not None:
        masked = AttentionDropout(pack.batch.streams, module.pack_key, dropout)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if kernels_for(q) is None:
        out = RowAttention.apply(q, k, v, scaling, pack.batch.buckets, masked, sliding_window)
    else:
        places = pack.batch.places(first_only=len(q) != len(k))
        out = CompiledAttention.apply(q, k, v, scaling, places, masked, sliding_window)
    return out.unsqueeze(0), None


def register() -> None:
    """Make :data:`PACKED` known to transformers; without a mask function it makes no mask."""
    AttentionInterface.register(PACKED, packed_attention)


def _of_bucket(x: Tensor, bucket: Bucket, heads: int, first_only: bool = False) -> Tensor:
    """View a bucket's part of ``(places * heads, width)`` as ``(rows * heads, longest, width)``.

    With ``first_only``, its part of ``(rows * heads, width)`` as ``(rows * heads, 1, width)``.
    """
    start, places = (bucket.first_row, bucket.rows) if first_only else (bucket.start, bucket.places)
    part = x.narrow(0, start * heads, places * heads)
    return part.view(bucket.rows * heads, -1, x.shape[-1])


def _softmax(scores: Tensor, bucket: Bucket, heads: int, window: int | None) -> Tensor:
    """Return the attention weights of ``(rows * heads, queries, longest)`` scores."""
    grid = scores.view(bucket.rows, heads, -1, bucket.longest)
    if window is not None and bucket.longest > window:
        unseen = _outside_window(bucket, window, scores.device)
        grid.masked_fill_(unseen[:, :, : grid.shape[2]], -torch.inf)
    elif bucket.real is not None:
        grid.masked_fill_(~bucket.real[:, None, None, :], -torch.inf)
    # In float32: more exact, and torch's bfloat16 softmax is slow where rows don't fill vectors.
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores.to(wide), -1).to(scores.dtype)


def _softmax_gradient(gradient: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the scores, from that of the weights."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    found = torch._softmax_backward_data(gradient.to(wide), weights.to(wide), -1, wide)
    return found.to(weights.dtype)


def _dropped(weights: Tensor, mask: Mask | None, dropout: AttentionDropout | None) -> Tensor:
    """Apply dropout to attention weights, or to their gradient."""
    if mask is None or dropout is None:
        return weights
    return mask.applied(weights, dropout.scale)


def _outside_window(bucket: Bucket, window: int, device: torch.device) -> Tensor:
    """Which keys a query doesn't see: ``(rows or 1, 1, longest, longest)``, True for unseen."""
    if window not in bucket.window:
        place = torch.arange(bucket.longest, device=device)
        distance = (place[:, None] - place[None, :]).abs()
        unseen = (distance >= window)[None, None]
        if bucket.real is not None:
            unseen = unseen | ~bucket.real[:, None, None, :]
        # A padding query may have only padding around it: seeing itself, it has a softmax.
        bucket.window[window] = unseen & (distance > 0)
    return bucket.window[window]


def attention_places(lengths: Sequence[int] | NDArray[np.int64]) -> int:
    """Count the tokens attention computes for rows of these lengths, padding included."""
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))[::-1]
    return sum((last - first) * int(ordered[first]) for first, last in bucket_bounds(ordered))
