"""What replaces the layers of a base so that one forward pass serves all lanes.

The model's own code runs unchanged, on one row of all lanes' tokens, ``(1, tokens, hidden)``.
These modules know the pack's batch, and so which token belongs to whom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasweep.model.frozen_linear import FrozenLinear
from lorasweep.model.lane_spans import lane_repeat
from lorasweep.model.packed_dropout import Dropout, Mask, kept_scale, module_key, rate_byte
from lorasweep.model.packed_products import Adapting, adapted_linear, lane_linear

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel
    from lorasweep.model.packed_pass import Side


class PackedModule(nn.Module):
    """A module of the pack: it knows its own name and the pack.

    Args:
        pack: The pack; not a submodule, so that it isn't moved, counted or saved.
        name: Full name in the base.

    Attributes:
        pack_key: Of its dropout masks.
    """

    pack: PackedModel
    pack_key: int

    def __init__(self, pack: PackedModel, name: str) -> None:
        super().__init__()
        self.__dict__["pack"] = pack
        self.pack_name = name
        self.__dict__["pack_key"] = module_key(name)


class AdaptableLinear(PackedModule):
    """A frozen linear layer that carries the LoRA of those lanes that adapt it."""

    def __init__(self, pack: PackedModel, name: str, replaced: nn.Linear) -> None:
        super().__init__(pack, name)
        self.frozen = FrozenLinear(replaced)
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.down, self.up = f"{name}.lora_A", f"{name}.lora_B"

    def forward(self, x: Tensor, side: Side | None = None) -> Tensor:
        """Apply the layer to ``(…, in)``: all tokens, or one vector a row.

        Args:
            x: The input.
            side: Whose each vector is, where they are neither tokens nor rows.
        """
        if self.down not in self.pack.weights:
            applied: Tensor = self.frozen(x)
            return applied
        now = self.pack.now
        flat = x.reshape(-1, self.in_features)
        side = side or now.side(flat.shape[0])
        mask = None
        if side.rate is not None and side.streams is not None:
            mask = Mask(side.streams, self.pack_key, side.rate)
        ranks = self.pack.weights.first_sizes(self.down, now.batch.lanes)
        y = adapted_linear(
            flat,
            now.parameters[self.down],
            now.parameters[self.up],
            self.frozen,
            Adapting(side.spans, side.scaling, mask, ranks),
        )
        return y.view(*x.shape[:-1], self.out_features)


class LaneLinearLayer(PackedModule):
    """A linear layer that is trained as a whole: every lane has its own, in float32."""

    def __init__(self, pack: PackedModel, name: str, replaced: nn.Linear) -> None:
        super().__init__(pack, name)
        self.out_features = replaced.out_features
        self.biased = replaced.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply each lane's layer to its rows, ``(…, in)``."""
        now = self.pack.now
        weight = now.parameters[f"{self.pack_name}.weight"]
        bias = now.parameters[f"{self.pack_name}.bias"] if self.biased else None
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        y = lane_linear(flat, weight, bias, now.side(flat.shape[0]).spans)
        return y.view(*x.shape[:-1], self.out_features)


class LaneLayerNorm(PackedModule):
    """A layer norm that is trained as a whole: every lane has its own scale and shift."""

    def __init__(self, pack: PackedModel, name: str, replaced: nn.LayerNorm) -> None:
        super().__init__(pack, name)
        self.normalized_shape, self.eps = replaced.normalized_shape, replaced.eps
        self.biased = replaced.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(…, hidden)``."""
        now = self.pack.now
        scale = now.parameters[f"{self.pack_name}.weight"]
        flat = x.reshape(-1, x.shape[-1]).to(scale.dtype)
        spans = now.side(flat.shape[0]).spans
        y = F.layer_norm(flat, self.normalized_shape, eps=self.eps) * lane_repeat(scale, spans)
        if self.biased:
            y = y + lane_repeat(now.parameters[f"{self.pack_name}.bias"], spans)
        return y.view(x.shape)


class KeyedDropout(PackedModule):
    """The base's own dropout, from the counter instead of a random state.

    Each call of a pass has masks of its own: the heads of RoBERTa and ELECTRA drop twice through
    one module.

    Attributes:
        p: The rate; attention modules read it.
    """

    def __init__(self, pack: PackedModel, name: str, rate: float) -> None:
        super().__init__(pack, name)
        self.p = rate

    def forward(self, x: Tensor, side: Side | None = None) -> Tensor:
        """Drop elements of ``(…, hidden)`` while training; ``side`` as in AdaptableLinear."""
        if not self.training or self.p == 0:
            return x
        now = self.pack.now
        side = side or now.side(x.numel() // x.shape[-1])
        if side.streams is None:
            return x
        mask = Mask(side.streams, self._key(now.call(self.pack_name)), rate_byte(self.p))
        result: Tensor = Dropout.apply(x, mask, kept_scale(self.p))
        return result

    def _key(self, call: int) -> int:
        """Return the key of a call's mask, by its number in the pass."""
        return self.pack_key if call == 0 else module_key(f"{self.pack_name} {call}")


def first_tokens(pack: PackedModel, hidden: Tensor) -> Tensor:
    """From ``(1, tokens, hidden)`` take each row's first token: ``(rows, 1, hidden)``.

    What already is one vector a row stays as it is.
    """
    if hidden.shape[1] == 1:
        return hidden
    return hidden[0].index_select(0, pack.now.batch.first).unsqueeze(1)


def row_means(pack: PackedModel, hidden: Tensor) -> Tensor:
    """Average ``(1, tokens, hidden)`` over the tokens of each row: ``(rows, 1, hidden)``."""
    batch = pack.now.batch
    tokens = hidden[0] if batch.real is None else hidden[0].index_select(0, batch.real)
    lengths = batch.row_lengths
    # Unsafe: without checking lengths on the host, which would have to wait for them.
    sums = torch.segment_reduce(tokens.float(), "sum", lengths=lengths, axis=0, unsafe=True)
    return (sums / lengths.unsqueeze(1)).to(hidden.dtype).unsqueeze(1)


def replace_output(change: Any, pack: PackedModel) -> Any:
    """Make a forward hook that changes a module's hidden states and leaves the rest alone."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(pack, output[0]), *output[1:])
        return change(pack, output)

    return hook
