"""The last layer, for each row's first token only.

A BERT-like classifier reads the first token's vector and nothing else, so in the last layer
only that token has to ask, and only its result goes through the feed-forward part; keys and
values are needed of all tokens. That is exact, and spares four fifths of that layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorasweep.model.packed_attention import packed_attention
from lorasweep.model.packed_modules import PackedModule, first_tokens

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel

# Their layers are written alike: attention.self, attention.output, intermediate, output.
_LIKE_BERT = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})


def spare_last_layer(pack: PackedModel, model: nn.Module, kind: str, last: Any) -> None:
    """Replace the last layer's attention where its architecture is known; else do nothing.

    Args:
        pack: The pack.
        model: The whole classifier.
        kind: Its model type.
        last: Its last layer.
    """
    name = next(name for name, module in model.named_modules() if module is last)
    if kind in _LIKE_BERT:
        whole = f"{name}.attention.self"
        parts = ("query", "key", "value")
        attention = FirstTokenAttention(pack, whole, last.attention.self, parts)
        model.set_submodule(whole, attention)
        # Its residual connection adds the layer's input: of the first tokens as well.
        last.attention.output.register_forward_pre_hook(
            lambda _, inputs: (inputs[0], first_tokens(pack, inputs[1]))
        )
    elif kind == "distilbert":
        model.set_submodule(name, FirstTokenBlock(pack, name, last))


class FirstTokenAttention(PackedModule):
    """Attention in which each row's first token asks and all tokens answer."""

    def __init__(
        self, pack: PackedModel, name: str, replaced: Any, parts: tuple[str, str, str]
    ) -> None:
        super().__init__(pack, name)
        self.__dict__["pack_key"] = replaced.pack_key
        self.parts = parts
        for part in parts:
            self.add_module(part, getattr(replaced, part))
        self.width = replaced.attention_head_size
        self.scaling = replaced.scaling
        self.rate = replaced.dropout.p

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        """Attend: ``(1, tokens, hidden)`` to ``(rows, 1, hidden)``, and None for the weights."""
        query, key, value = (getattr(self, part) for part in self.parts)
        inputs = (first_tokens(self.pack, hidden_states).transpose(0, 1), *[hidden_states] * 2)
        laid = [
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer, x in zip((query, key, value), inputs, strict=True)
        ]
        dropout = self.rate if self.training else 0.0
        found, _ = packed_attention(self, laid[0], laid[1], laid[2], None, self.scaling, dropout)
        return found.flatten(2).transpose(0, 1), None


class FirstTokenBlock(PackedModule):
    """DistilBERT's layer, for each row's first token."""

    sa_layer_norm: nn.Module
    ffn: nn.Module
    output_layer_norm: nn.Module

    def __init__(self, pack: PackedModel, name: str, replaced: Any) -> None:
        super().__init__(pack, name)
        # Submodules keep their names, by which adapters and dropouts are found.
        parts = ("q_lin", "k_lin", "v_lin")
        self.attention = FirstTokenAttention(pack, f"{name}.attention", replaced.attention, parts)
        self.attention.add_module("out_lin", replaced.attention.out_lin)
        self.sa_layer_norm = replaced.sa_layer_norm
        self.ffn = replaced.ffn
        self.output_layer_norm = replaced.output_layer_norm

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return ``(rows, 1, hidden)`` of ``(1, tokens, hidden)``."""
        found, _ = self.attention(hidden_states)
        found = self.attention.get_submodule("out_lin")(found)
        found = self.sa_layer_norm(found + first_tokens(self.pack, hidden_states))
        result: Tensor = self.output_layer_norm(self.ffn(found) + found)
        return result
