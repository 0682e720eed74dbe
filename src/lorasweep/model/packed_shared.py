"""What is the same for all lanes and epochs is computed once.

Below the first layer that any lane adapts, nothing of a trial has any influence. Where the
base's own dropout is off (always so when evaluating), a row's hidden states down there never
change, so they are computed once for each split and looked up from then on. Only embeddings
are computed in every pass all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.model.packed_modules import KeyedDropout
from lorasweep.model.packed_pass import Start

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel

_ROWS_AT_ONCE = 64


class _ReachedError(Exception):
    """Carries the hidden states out of a pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class SharedLayers:
    """The lower layers of a pack, and what they gave for each split.

    Args:
        pack: The pack.
        name: Full name of the list of layers, such as ``bert.encoder.layer``.
        layers: The layers.

    Attributes:
        most_bytes: A split whose hidden states take more than this isn't kept.
    """

    def __init__(self, pack: PackedModel, name: str, layers: nn.ModuleList) -> None:
        self.pack = pack
        self.prefix = f"{name}."
        self.most_bytes = 0
        self._kept: dict[int, tuple[EncodedSplit, int, Tensor]] = {}
        self._tuples = False
        self._still = not any(
            module.p
            for module in pack.model.base_model.modules()
            if isinstance(module, KeyedDropout)
        ) and not any(
            value
            for key, value in pack.model.config.to_dict().items()
            if "dropout" in key and isinstance(value, float) and "classif" not in key
        )
        for number, layer in enumerate(layers):
            self._make_skippable(number, layer)

    def keep(self, split: EncodedSplit, training: bool) -> tuple[int, Tensor] | None:
        """Compute what passes over a split look up, unless it is kept or can't be.

        Passes do so themselves when they need it; but of several at the same time, each would.

        Returns:
            The first layer that is still to be computed, and what goes into it for each token of
            the split, ``(tokens, hidden)``; None where all layers are.
        """
        first = self._first_adapted()
        if first == 0 or (training and not self._still):
            return None
        hidden = self._hidden(split, first)
        return None if hidden is None else (first, hidden)

    def start(self, batch: PackedBatch, training: bool) -> Start | None:
        """Say from which layer on a batch has to be computed; None for all of them."""
        if not batch.tokens or (kept := self.keep(batch.split, training)) is None:
            return None
        first, hidden = kept
        return Start(first, hidden.index_select(0, batch.split_tokens))

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept.clear()

    def _first_adapted(self) -> int:
        """Number of the lowest layer that a lane adapts; 0 where something below it is."""
        lowest: int | None = None
        for name in self.pack.weights.blocks:
            if not name.endswith(".lora_A"):
                continue
            number = name.removeprefix(self.prefix).split(".")[0]
            if not name.startswith(self.prefix) or not number.isdigit():
                return 0
            lowest = int(number) if lowest is None else min(lowest, int(number))
        return lowest or 0

    def _hidden(self, split: EncodedSplit, first: int) -> Tensor | None:
        """Hidden states of all tokens of a split at the input of a layer; None if too many."""
        kept = self._kept.get(id(split))
        if kept is not None and kept[0] is split and kept[1] == first:
            return kept[2]
        width = self.pack.model.config.hidden_size
        if len(split.tokens) * width * self.pack.dtype.itemsize > self.most_bytes:
            return None
        found = torch.empty(
            len(split.tokens), width, dtype=self.pack.dtype, device=self.pack.device
        )
        order = split.lengths.argsort(kind="stable")
        for at in range(0, len(order), _ROWS_AT_ONCE):
            rows = LaneRows(order[at : at + _ROWS_AT_ONCE])
            batch = lay_out(split, [rows], self.pack.device, training=False)
            found.index_copy_(0, batch.split_tokens, self._reach(batch, first))
        self._kept[id(split)] = (split, first, found)
        return found

    def _reach(self, batch: PackedBatch, layer: int) -> Tensor:
        try:
            with torch.no_grad():
                self.pack.run_base(batch, training=False, start=Start(layer, None))
        except _ReachedError as reached:
            return reached.hidden[0]
        raise AssertionError("the layer was never reached")

    def _make_skippable(self, number: int, layer: nn.Module) -> None:
        original = layer.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            start = self.pack.now.start
            if start is not None and number == start.layer:
                if start.hidden is None:
                    raise _ReachedError(hidden_states)
                hidden_states = start.hidden.unsqueeze(0)
            elif start is not None and start.hidden is not None and number < start.layer:
                return (hidden_states, None) if self._tuples else hidden_states
            output = original(hidden_states, *args, **kwargs)
            self._tuples = isinstance(output, tuple)
            return output

        layer.__dict__["forward"] = forward
