"""Attention over rows of unequal length that lie behind one another, without padding tokens.

Everything else in an encoder works token by token and never notices where a row ends; attention
does. On a CPU a compiled loop takes row after row. On CUDA torch's own kernel takes all rows at
once, where it has proven itself and nothing stands against it (``varlen_attention.py``). For all
else ``row_attention.py`` does it in buckets of like length. The attention function is registered
with transformers under :data:`PACKED`, so the model's own code runs unchanged around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from lorasweep.model.kernel_library import Attending, RowPlaces
from lorasweep.model.kernels import kernels_for
from lorasweep.model.packed_dropout import rate_byte
from lorasweep.model.row_attention import AttentionDropout, RowAttention
from lorasweep.model.varlen_attention import varlen_attention
from lorasweep.model.varlen_proof import proven_options

PACKED = "lorasweep_packed"


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
        module: The attention module; ``module.pack.now`` knows the batch.
        query: ``(1, heads, tokens, width)``, or with rows instead of tokens.
        key: ``(1, heads, tokens, width)``.
        value: As ``key``.
        attention_mask: None: the rows are known from the batch.
        scaling: Of the scores; None for ``width ** -0.5``.
        dropout: Rate on the attention weights; 0 outside training.
        sliding_window: One more than how far a token sees in either direction; None for all.

    Returns:
        ``(1, tokens, heads, width)``, and None for the weights.

    Raises:
        ValueError: Several query heads share a key head, which no part of a pack is made for.
    """
    del attention_mask
    if key.shape[1] != query.shape[1]:  # compiled loops would read beyond the keys
        raise ValueError(f"{query.shape[1]} query heads share {key.shape[1]} key heads")
    batch = module.pack.now.batch
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    masked = None
    if dropout > 0 and batch.streams is not None:
        masked = AttentionDropout(batch.streams, module.pack_key, dropout)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    first_only = len(q) != len(k)
    if kernels_for(q) is not None:
        places = batch.places(first_only=first_only)
        out = CompiledAttention.apply(q, k, v, scaling, places, masked, sliding_window)
        return out.unsqueeze(0), None
    options = None
    # Torch's kernel draws dropout itself, and takes no tokens that belong to no row.
    if masked is None and batch.real is None and not (first_only and sliding_window):
        options = proven_options(q.device, q.dtype, q.shape[1], q.shape[2], sliding_window)
    if options is None:
        out = RowAttention.apply(q, k, v, scaling, batch.buckets, masked, sliding_window)
    else:
        starts, longest = batch.row_starts, batch.longest
        out = varlen_attention(q, k, v, scaling, starts, longest, sliding_window, options)
    return out.unsqueeze(0), None


def register() -> None:
    """Make :data:`PACKED` known to transformers; without a mask function it makes no mask."""
    AttentionInterface.register(PACKED, packed_attention)
