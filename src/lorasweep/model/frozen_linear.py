"""Products with the base's frozen weights, which are laid out once.

oneDNN multiplies blocks of a weight in an order of the processor's own, and torch has it lay the
weight out so in each product anew; it writes a bias into the result first and then adds to that.
A weight that never changes can be laid out once, forth and back, and a bias added on the way, by
the operations that torch's own compiler puts into frozen models in bfloat16.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasweep.model.torch_errors import first_line, is_out_of_memory

_log = logging.getLogger(__name__)

_TYPES = frozenset({torch.float32, torch.bfloat16})
# Of the product that a layout is chosen for: about what half a pack's pass has.
_ROWS = 2048


class FrozenLinear(nn.Module):
    """A linear layer whose weights get no gradient.

    Args:
        linear: Whose weight and bias to take over.

    Attributes:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        in_features, out_features: As in the layer.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._blocks: tuple[Tensor, Tensor] | None = None

    def lay_out(self) -> None:
        """Lay the weight out where torch can; to be called again once it was moved or changed."""
        self._blocks = None
        weight = self.weight.detach()
        if weight.device.type == "cpu" and lays_out(weight.dtype):
            self._blocks = _in_blocks(weight), _in_blocks(weight.t())

    @property
    def laid_out(self) -> tuple[Tensor, Tensor] | None:
        """The weight for the way forth and for the way back; None where torch multiplies plainly.

        oneDNN may be switched off at any time, also by us where it finds no room for its code.
        """
        return self._blocks if torch.backends.mkldnn.enabled else None

    def product(self, x: Tensor) -> Tensor:
        """Return ``(rows, out)`` of ``(rows, in)``; no gradient."""
        if (blocks := self.laid_out) is None:
            return F.linear(x, self.weight, self.bias)
        return _multiplied(x, blocks[0], self.bias)

    def product_back(self, grad: Tensor) -> Tensor:
        """Return the gradient of ``x``, ``(rows, in)``, from that of the product."""
        if (blocks := self.laid_out) is None:
            return grad @ self.weight
        return _multiplied(grad, blocks[1], None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(…, in)``."""
        y: Tensor = _FrozenProduct.apply(x.reshape(-1, self.in_features), self)
        return y.view(*x.shape[:-1], self.out_features)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_back(grads[0]), None


def _in_blocks(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return found


def _multiplied(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")
    return found


def lays_out(dtype: torch.dtype) -> bool:
    """Whether this torch multiplies by weights laid out before, and did the right thing when tried.

    The operations aren't among those that torch promises to keep.
    """
    if dtype not in _TYPES or not torch.backends.mkldnn.enabled:
        return False
    return _proven(dtype)


@cache
def _proven(dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where they are errors, one is no refusal
            why = "" if _alike(dtype) else "their results are others"
    except Exception as error:
        if is_out_of_memory(error):
            raise  # it says nothing about the operations, and must not be remembered
        why = first_line(error)
    if why:
        _log.info("weights are laid out anew in each product: %s", why)
    return not why


def _alike(dtype: torch.dtype) -> bool:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw).to(dtype) for shape in ((5, 48), (40, 48), (40,))
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    back = expected.to(dtype).double() @ weight.double()
    tried = (
        (_multiplied(x, _in_blocks(weight), bias), expected),
        (_multiplied(expected.to(dtype), _in_blocks(weight.t()), None), back),
    )
    return all(
        float((found.double() - right).abs().max())
        <= 2 * torch.finfo(dtype).eps * right.abs().max()
        for found, right in tried
    )
