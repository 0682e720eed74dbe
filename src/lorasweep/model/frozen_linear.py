"""A linear layer whose weights are frozen: ``x W' + b``, with a gradient for ``x`` alone.

On a CPU torch adds a bfloat16 layer's bias in a pass of its own, before the product. oneDNN can
do it while it stores the product; torch offers that to its compiler under a name of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a frozen linear layer.

    Args:
        x: ``(…, in)``.
        weight: ``(out, in)``; gets no gradient.
        bias: ``(out,)`` or None; gets no gradient.

    Returns:
        ``(…, out)``.
    """
    if not _joins_bias(x, bias):
        return F.linear(x, weight, bias)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _joined(x, weight, bias)
    found: Tensor = _FrozenLinear.apply(x, weight, bias)
    return found


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _joined(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight, None, None


def _joins_bias(x: Tensor, bias: Tensor | None) -> bool:
    return (
        bias is not None
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and _has_joined_product()
    )


def _joined(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


@cache
def _has_joined_product() -> bool:
    """Whether this torch has oneDNN's product with a bias, and it does what it should.

    The name isn't part of torch's public interface: it may go, or change, with any version.
    """
    x, weight, bias = (
        torch.arange(count).sub(count // 2).to(torch.bfloat16).view(shape)
        for count, shape in ((32, (4, 8)), (16, (2, 8)), (2, (2,)))
    )
    try:
        return bool(torch.equal(_joined(x, weight, bias), F.linear(x, weight, bias)))
    except (AttributeError, RuntimeError, TypeError):
        return False
