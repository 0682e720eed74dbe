"""What ends each half of a BERT-like layer: dropout, the residual, and the norm, in one pass.

``norm(residual + dropout(dense(x)))`` takes torch four passes over all tokens, and as many
buffers; the compiled loop takes one. Without compiled kernels torch does the four.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasweep.model.kernel_library import Dropping, Norm
from lorasweep.model.kernels import kernels_for
from lorasweep.model.packed_dropout import kept_scale, rate_byte
from lorasweep.model.packed_modules import KeyedDropout, PackedModule

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel

# Modules of transformers that are written alike: dense, dropout, LayerNorm.
_ENDS = frozenset(
    f"{family}{part}"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
    for part in ("SelfOutput", "Output")
)


class ResidualNorm(torch.autograd.Function):
    """``norm(residual + dropped(x))`` with a frozen norm; see ``csrc/residual_norm.h``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, norm: Norm, dropping: Dropping | None
    ) -> Tensor:
        """Return ``(entries, width)`` from two of the same shape."""
        kernels = kernels_for(x)
        assert kernels is not None  # ResidualEnd asked before
        out, kept = kernels.residual_norm(x.contiguous(), residual.contiguous(), norm, dropping)
        ctx.save_for_backward(*kept)
        ctx.packing = kernels, norm, dropping
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernels, norm, dropping = ctx.packing
        total, mean, inverse = ctx.saved_tensors
        grad = grads[0].contiguous()
        found = kernels.residual_norm_backward(grad, (total, mean, inverse), norm, dropping)
        return (*found, None, None)


class ResidualEnd(PackedModule):
    """The end of an attention or feed-forward block, its submodules under their own names."""

    dense: nn.Module
    dropout: KeyedDropout

    def __init__(self, pack: PackedModel, name: str, replaced: Any) -> None:
        super().__init__(pack, name)
        self.dense, self.dropout = replaced.dense, replaced.dropout
        self.LayerNorm: nn.LayerNorm = replaced.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return the norm of ``input_tensor (…, hidden)`` and what ``dense`` makes of the other."""
        x, norm = self.dense(hidden_states), self.LayerNorm
        if kernels_for(x) is None:
            found: Tensor = norm(self.dropout(x) + input_tensor)
            return found
        width = x.shape[-1]
        flat, residual = x.reshape(-1, width), input_tensor.reshape(-1, width)
        frozen = Norm(norm.weight, norm.bias, norm.eps)
        out: Tensor = ResidualNorm.apply(flat, residual, frozen, self._dropping(len(flat)))
        return out.view(x.shape)

    def _dropping(self, entries: int) -> Dropping | None:
        dropout = self.dropout
        if not self.training or dropout.p == 0:
            return None
        streams = self.pack.side(entries).streams
        if streams is None:
            return None
        return Dropping(streams, dropout.pack_key, rate_byte(dropout.p), kept_scale(dropout.p))


def fuse_residuals(pack: PackedModel, model: nn.Module) -> None:
    """Replace the ends of blocks that are written as transformers' BERT writes them."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in _ENDS and isinstance(module.LayerNorm, nn.LayerNorm):
            model.set_submodule(name, ResidualEnd(pack, name, module))
