"""Linear layers of a pack: a frozen one with each lane's LoRA, and each lane's own.

Their gradients are written by hand on top of grouped products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasweep.model.grouped_products import grouped_outer, grouped_product
from lorasweep.model.lane_spans import LaneSpans, lane_sums
from lorasweep.model.packed_dropout import Mask


class AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer for all tokens, plus each lane's own low-rank update.

    ``y = x W' + b + s (m x) A' B'`` (Hu et al. 2021, arXiv:2106.09685), where ``s`` and the
    dropout mask ``m`` are those of the token's lane. The gradient is written by hand because
    it needs fewer and smaller copies than autograd makes; ``gradcheck`` holds it to the truth.
    No gradient is taken with respect to the frozen weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: Tensor,
        mask: Mask | None,
        spans: LaneSpans,
    ) -> Tensor:
        dropped = x if mask is None else mask.applied(x)
        of_rank = down.to(x.dtype).transpose(1, 2)
        narrow = grouped_product(dropped, of_rank, spans, scaling=scaling)
        y = F.linear(x, weight, bias)
        grouped_product(narrow, up.to(x.dtype).transpose(1, 2), spans, onto=y)
        ctx.save_for_backward(x, down, up, weight, scaling, narrow)
        ctx.mask, ctx.spans = mask, spans
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        x, down, up, weight, scaling, narrow = ctx.saved_tensors
        mask: Mask | None = ctx.mask
        spans: LaneSpans = ctx.spans
        grad_up = grouped_outer(grad, narrow, spans).to(up.dtype)
        grad_narrow = grouped_product(grad, up.to(grad.dtype), spans, scaling=scaling)
        dropped = x if mask is None else mask.applied(x)
        grad_down = grouped_outer(grad_narrow, dropped, spans).to(down.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_product(grad_narrow, down.to(grad.dtype), spans)
            if mask is not None:
                grad_x = mask.applied(grad_x, in_place=True)
            grad_x.addmm_(grad, weight)
        return grad_x, grad_down, grad_up, None, None, None, None, None


def adapted_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    mask: Mask | None,
    spans: LaneSpans,
) -> Tensor:
    """Apply a frozen linear layer with one LoRA adapter per lane.

    Args:
        x: ``(tokens, in)``, lane after lane, in the base's precision.
        down: LoRA's A of all lanes, ``(lanes, rank, in)``; zero rows where a lane's rank is
            smaller, all zero where it does not adapt this layer.
        up: LoRA's B, ``(lanes, out, rank)``.
        weight: Of the frozen layer, ``(out, in)``.
        bias: Of the frozen layer, ``(out,)`` or None.
        scaling: Of each token's lane, with dropout's ``1 / (1 - p)`` in it, ``(tokens, 1)``.
        mask: Dropout on the adapter's input; None for no dropout.
        spans: Whose each token is.

    Returns:
        ``(tokens, out)``.
    """
    result: Tensor = AdaptedLinear.apply(x, down, up, weight, bias, scaling, mask, spans)
    return result


class LaneLinear(torch.autograd.Function):
    """A linear layer with weights of each lane's own, such as the classifier."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spans: LaneSpans
    ) -> Tensor:
        """Return ``(rows, out)`` of ``x (rows, in)``, ``weight (lanes, out, in)``."""
        y = grouped_product(x, weight.transpose(1, 2), spans)
        if bias is not None:
            y += bias.index_select(0, spans.lane)
        ctx.save_for_backward(x, weight)
        ctx.biased, ctx.spans = bias is not None, spans
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        x, weight = ctx.saved_tensors
        spans: LaneSpans = ctx.spans
        grad_x = grouped_product(grad, weight, spans) if ctx.needs_input_grad[0] else None
        grad_bias = lane_sums(grad, spans) if ctx.biased else None
        return grad_x, grouped_outer(grad, x, spans), grad_bias, None


def lane_linear(x: Tensor, weight: Tensor, bias: Tensor | None, spans: LaneSpans) -> Tensor:
    """Apply each lane's own linear layer to its rows.

    Args:
        x: ``(rows, in)``, lane after lane.
        weight: ``(lanes, out, in)``.
        bias: ``(lanes, out)`` or None.
        spans: Whose each row is.

    Returns:
        ``(rows, out)``.
    """
    result: Tensor = LaneLinear.apply(x, weight, bias, spans)
    return result
