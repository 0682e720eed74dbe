"""Attention inside rows by torch's own products, bucket by bucket: for every device and type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasweep.model.packed_dropout import Mask, kept_scale, rate_byte
from lorasweep.model.row_buckets import Bucket, Buckets


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
