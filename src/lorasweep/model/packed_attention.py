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
from torch import Tensor, nn
from transformers import AttentionInterface

from lorasweep.model.packed_dropout import kept_mask, kept_scale, rate_byte

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
        real: Which places are tokens of their row, bool ``(rows, longest)``; None when all.
        window: Which pairs a sliding window lets see each other, by its width; made on demand.
    """

    rows: int
    longest: int
    start: int
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
        by_head: ``token`` and ``place`` for a layout with heads, by number of heads.
    """

    each: tuple[Bucket, ...]
    token: Tensor
    place: Tensor
    by_head: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def indices(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return indices between ``(tokens, heads)`` rows and ``(row, head, place)`` rows."""
        if heads not in self.by_head:
            self.by_head[heads] = self._indices(heads)
        return self.by_head[heads]

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
        each.append(Bucket(len(rows), longest, at, mask))
        tokens.append(token.ravel())
        at += len(rows) * longest
    return Buckets(
        tuple(each),
        torch.from_numpy(np.concatenate(tokens)).to(device),
        torch.from_numpy(place).to(device),
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
        """Return ``(tokens, heads, width)`` from three of the same shape."""
        tokens, heads, width = query.shape
        forth, back = buckets.indices(heads)
        laid = [x.reshape(-1, width).index_select(0, forth) for x in (query, key, value)]
        out = torch.empty_like(laid[0])
        weights, kept = [], []
        for bucket in buckets.each:
            q, k, v, o = (_of_bucket(x, bucket, heads) for x in (*laid, out))
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
            weight = _softmax(scores, bucket, heads, window)
            weights.append(weight)
            mask = None if dropout is None else dropout.mask(buckets, bucket, heads, o.dtype)
            kept.append(mask)
            torch.bmm(weight if mask is None else weight * mask, v, out=o)
        ctx.save_for_backward(*laid, forth, back, *weights, *kept)
        ctx.packing = (scaling, buckets, heads, tokens)
        return out.index_select(0, back).view(tokens, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaling, buckets, heads, tokens = ctx.packing
        query, key, value, forth, back, *rest = ctx.saved_tensors
        weights, kept = rest[: len(buckets.each)], rest[len(buckets.each) :]
        width = query.shape[-1]
        # Padding places repeat a token; what they output is never read, so its gradient is 0.
        grad_out = grads[0].new_zeros(query.shape)
        grad_out.index_copy_(0, back, grads[0].reshape(-1, width))
        results = [torch.empty_like(x) for x in (query, key, value)]
        for bucket, weight, mask in zip(buckets.each, weights, kept, strict=True):
            q, k, v, go, gq, gk, gv = (
                _of_bucket(x, bucket, heads) for x in (query, key, value, grad_out, *results)
            )
            torch.bmm((weight if mask is None else weight * mask).transpose(1, 2), go, out=gv)
            grad_weight = torch.bmm(go, v.transpose(1, 2))
            if mask is not None:
                grad_weight *= mask
            grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_scores *= scaling
            torch.bmm(grad_scores, k, out=gq)
            torch.bmm(grad_scores.transpose(1, 2), q, out=gk)
        gathered = (x.index_select(0, back).view(tokens, heads, width) for x in results)
        return (*gathered, None, None, None, None)


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

    def mask(self, buckets: Buckets, bucket: Bucket, heads: int, dtype: torch.dtype) -> Tensor:
        """Return what each weight is multiplied by, ``(rows * heads, longest, longest)``."""
        token = buckets.token[bucket.start : bucket.start + bucket.places]
        streams = self.streams[token].view(bucket.rows, 1, bucket.longest)
        # A stream for each head: odd multiples keep them apart.
        offset = torch.arange(1, 2 * heads, 2, device=streams.device).view(1, heads, 1)
        kept = kept_mask(streams * offset, self.key, bucket.longest, rate_byte(self.rate))
        kept = kept.view(bucket.rows * heads, bucket.longest, bucket.longest)
        return kept.to(dtype).mul_(kept_scale(self.rate))


def packed_attention(
    module: nn.Module,
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
        query, key, value: ``(1, heads, tokens, width)``.
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
    buckets = pack.batch.buckets
    out = RowAttention.apply(q, k, v, scaling, buckets, masked, sliding_window)
    return out.unsqueeze(0), None


def register() -> None:
    """Make :data:`PACKED` known to transformers; without a mask function it makes no mask."""
    AttentionInterface.register(PACKED, packed_attention)


def _of_bucket(x: Tensor, bucket: Bucket, heads: int) -> Tensor:
    """View a bucket's part of ``(places * heads, width)`` as ``(rows * heads, longest, width)``."""
    part = x.narrow(0, bucket.start * heads, bucket.places * heads)
    return part.view(bucket.rows * heads, bucket.longest, x.shape[-1])


def _softmax(scores: Tensor, bucket: Bucket, heads: int, window: int | None) -> Tensor:
    """Return the attention weights of ``(rows * heads, longest, longest)`` scores."""
    grid = scores.view(bucket.rows, heads, bucket.longest, bucket.longest)
    if window is not None and bucket.longest > window:
        grid.masked_fill_(_outside_window(bucket, window, scores.device), -torch.inf)
    elif bucket.real is not None:
        grid.masked_fill_(~bucket.real[:, None, None, :], -torch.inf)
    return torch.softmax(scores, -1)


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
