"""Products of one long list of tokens with one small matrix per lane, and their gradients.

All tokens of a pack lie in one matrix, lane after lane: ``x`` is ``(tokens, in)``, and
:class:`LaneSpans` says which rows are whose. A grouped product multiplies each lane's rows with
that lane's own matrix in one call, without padding and without a copy; rows of different lanes
never meet in a sum, so a NaN in one lane stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasweep.model.packed_dropout import Mask


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


def grouped_product(x: Tensor, matrices: Tensor, spans: LaneSpans) -> Tensor:
    """Multiply each lane's rows with its own matrix.

    Args:
        x: ``(rows, in)``, lane after lane.
        matrices: ``(lanes, in, out)``.
        spans: Whose each row is.

    Returns:
        ``(rows, out)``.
    """
    if _grouped_kernel(x, matrices):
        return F.grouped_mm(x, matrices, offs=spans.ends)
    padded = torch.bmm(_spread(x, spans), matrices)
    return padded.reshape(-1, padded.shape[-1]).index_select(0, spans.place)


def grouped_outer(left: Tensor, right: Tensor, spans: LaneSpans) -> Tensor:
    """Sum each lane's outer products: ``left[rows].T @ right[rows]`` for every lane.

    Args:
        left: ``(rows, n)``, lane after lane.
        right: ``(rows, m)``.
        spans: Whose each row is.

    Returns:
        ``(lanes, n, m)``; zero for a lane without rows.
    """
    if _grouped_kernel(left, right):
        return F.grouped_mm(left.t(), right, offs=spans.ends)
    return torch.bmm(_spread(left, spans).transpose(1, 2), _spread(right, spans))


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
        narrow = grouped_product(dropped, down.to(x.dtype).transpose(1, 2), spans)
        narrow = narrow.mul_(scaling)
        y = F.linear(x, weight, bias)
        y += grouped_product(narrow, up.to(x.dtype).transpose(1, 2), spans)
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
        grad_narrow = grouped_product(grad, up.to(grad.dtype), spans).mul_(scaling)
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


def lane_sums(values: Tensor, spans: LaneSpans) -> Tensor:
    """Sum the rows of each lane: ``(rows, n)`` to ``(lanes, n)``."""
    # segment_reduce sums inside each lane only: a NaN elsewhere can't get in, which a
    # difference of cumulative sums or a product with a 0/1 matrix would let happen. Unsafe
    # only means that it doesn't look at the offsets, for which the host would have to wait.
    return torch.segment_reduce(
        values, "sum", offsets=spans.starts, axis=0, initial=0.0, unsafe=True
    )


def _grouped_kernel(*operands: Tensor) -> bool:
    """Whether torch multiplies such groups itself.

    It has no float64 kernel, on CUDA none but bfloat16's, and wants every row to start on 16
    bytes, which a head of two labels doesn't; those go through a padded batched product.
    """
    dtype, device = operands[0].dtype, operands[0].device
    if not hasattr(F, "grouped_mm"):
        return False
    if device.type == "cuda":
        known = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] >= 8
    else:
        known = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return known and all(_aligned(operand) for operand in operands)


def _aligned(operand: Tensor) -> bool:
    bytes_a_number = operand.element_size()
    return all(
        stride == 1 or (stride > 0 and stride * bytes_a_number % 16 == 0)
        for stride in operand.stride()
    )


def _spread(x: Tensor, spans: LaneSpans) -> Tensor:
    """Lay the rows of a flat matrix into a zero-padded grid, ``(lanes, longest, width)``."""
    grid = x.new_zeros(spans.lanes * spans.longest, x.shape[1])
    grid.index_copy_(0, spans.place, x)
    return grid.view(spans.lanes, spans.longest, x.shape[1])
