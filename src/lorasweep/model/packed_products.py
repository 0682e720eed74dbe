"""Linear layers of a pack: a frozen one with each lane's LoRA, and each lane's own.

Their gradients are written by hand on top of grouped products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasweep.model.frozen_linear import FrozenLinear
from lorasweep.model.grouped_products import grouped_outer, grouped_product
from lorasweep.model.lane_spans import LaneSpans, lane_sums
from lorasweep.model.packed_dropout import Mask


@dataclass(frozen=True, slots=True)
class Adapting:
    """What adapters do in a pass besides their weights.

    Attributes:
        spans: Whose each token is.
        scaling: Of each token's lane, with dropout's ``1 / (1 - p)`` in it, ``(tokens, 1)``.
        mask: Dropout on the adapter's input; None for no dropout.
        ranks: How many first rows of A and columns of B belong to each lane, int32 ``(lanes,)``
            on the CPU; the others are 0. None where all belong to all.
    """

    spans: LaneSpans
    scaling: Tensor
    mask: Mask | None = None
    ranks: Tensor | None = None


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
        frozen: FrozenLinear,
        adapting: Adapting,
    ) -> Tensor:
        spans, scaling, ranks = adapting.spans, adapting.scaling, adapting.ranks
        of_rank, of_out = (w.to(x.dtype).transpose(1, 2) for w in (down, up))
        narrow = grouped_product(
            x, of_rank, spans, scaling=scaling, x_mask=adapting.mask, widths=ranks
        )
        y = frozen.product(x)
        grouped_product(narrow, of_out, spans, onto=y, depths=ranks)
        ctx.save_for_backward(x, down, up, narrow)
        ctx.frozen, ctx.adapting = frozen, adapting
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        x, down, up, narrow = ctx.saved_tensors
        adapting: Adapting = ctx.adapting
        spans, mask, ranks = adapting.spans, adapting.mask, adapting.ranks
        grad_up = grouped_outer(grad, narrow, spans, right_sizes=ranks).to(up.dtype)
        grad_narrow = grouped_product(
            grad, up.to(grad.dtype), spans, scaling=adapting.scaling, widths=ranks
        )
        grad_down = grouped_outer(grad_narrow, x, spans, right_mask=mask, left_sizes=ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.product_back(grad)
            wide = down.to(grad.dtype)
            grouped_product(grad_narrow, wide, spans, onto=grad_x, mask=mask, depths=ranks)
        return grad_x, grad_down.to(down.dtype), grad_up, None, None


def adapted_linear(
    x: Tensor, down: Tensor, up: Tensor, frozen: FrozenLinear, adapting: Adapting
) -> Tensor:
    """Apply a frozen linear layer with one LoRA adapter per lane.

    Args:
        x: ``(tokens, in)``, lane after lane, in the base's precision.
        down: LoRA's A of all lanes, ``(lanes, rank, in)``; zero rows where a lane's rank is
            smaller, all zero where it does not adapt this layer.
        up: LoRA's B, ``(lanes, out, rank)``.
        frozen: The layer.
        adapting: Whose each token is, and what of the adapters is not a weight.

    Returns:
        ``(tokens, out)``.
    """
    result: Tensor = AdaptedLinear.apply(x, down, up, frozen, adapting)
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
