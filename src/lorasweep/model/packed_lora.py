"""Many LoRA adapters on one frozen base: the model of a pack.

The base is loaded once and changed in place: its linear layers can carry one adapter per lane,
its newly initialised modules have weights per lane, its dropouts are keyed, and attention
knows where rows end. After the last layer only each row's first token (or mean) goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from lorasweep.model.adapter import trained_whole
from lorasweep.model.base import FreshClassifier
from lorasweep.model.frozen_linear import FrozenLinear
from lorasweep.model.kernels import kernels_for
from lorasweep.model.lane_adapter import adapter_blocks, trained_parameters
from lorasweep.model.lane_weights import Block, LaneState, LaneWeights
from lorasweep.model.packed_attention import PACKED, register
from lorasweep.model.packed_batch import PackedBatch
from lorasweep.model.packed_check import PackedCheck, refused, refusing
from lorasweep.model.packed_disentangled import carries_disentangled
from lorasweep.model.packed_dropout import kept_scale, module_key, rate_byte
from lorasweep.model.packed_last_layer import spare_last_layer
from lorasweep.model.packed_modules import (
    AdaptableLinear,
    KeyedDropout,
    LaneLayerNorm,
    LaneLinearLayer,
    first_tokens,
    replace_output,
    row_means,
)
from lorasweep.model.packed_pass import LaneFactors, Pass, Start
from lorasweep.model.packed_shared import SharedLayers
from lorasweep.model.transfer import on_device


@dataclass(frozen=True, slots=True)
class LaneSettings:
    """What of a lane's adapter is not a weight.

    Attributes:
        scaling: ``alpha / rank``.
        dropout: On the adapter's input.
    """

    scaling: float
    dropout: float


class PackedModel:
    """A base with as many adapters and heads as there are lanes.

    Args:
        fresh: A base just loaded; it is changed in place and belongs to the pack from now on.
        device: Where to compute.
        dtype: Of the base's weights and activations; adapters and heads are float32 (or
            float64 with a float64 base).

    Raises:
        ModelError: The architecture has a part that a pack can't carry.

    Attributes:
        weights: What is trained, of all lanes.
        shared: The layers below the first adapted one.
    """

    weights: LaneWeights
    device: torch.device
    dtype: torch.dtype

    def __init__(
        self, fresh: FreshClassifier, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.base = fresh.base
        self.whole = trained_whole(fresh)
        self.model = fresh.model
        if unfit := _changing_positions(self.model):
            raise refused(self.base, unfit)
        check = PackedCheck(fresh, self.whole)
        self._passes: dict[int, Pass] = {}
        self._settings: list[LaneSettings] = []
        self._factors: dict[bool, LaneFactors] = {}
        with refusing(self.base):
            self._replace_modules()
            self._place_hooks()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.position_offset = self._position_offset()
        self._move(torch.device("cpu"), torch.float32)
        check.prove(self)
        self._move(device, dtype)
        for module in self.model.modules():
            if isinstance(module, FrozenLinear):
                module.lay_out()

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.probe = torch.empty(0, device=device, dtype=dtype)
        self.weights = LaneWeights(device, torch.promote_types(dtype, torch.float32))
        # Buffers such as rotary frequencies keep their precision.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.to(device)

    # -- lanes -------------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return self.weights.lanes

    def add_lane(self, peft_model: PeftModel, settings: LaneSettings) -> int:
        """Append a lane that starts from a PEFT model's own first weights."""
        values = {name: value.detach() for name, value, _ in trained_parameters(peft_model)}
        lane = self.weights.add(adapter_blocks(peft_model), values)
        self._add_settings(settings)
        return lane

    def add_untrained_lane(self, blocks: list[Block], values: Mapping[str, Tensor]) -> int:
        """Append a lane without an adapter, its head as given."""
        lane = self.weights.add(blocks, values)
        self._add_settings(LaneSettings(0.0, 0.0))
        return lane

    def lane_state(self, lane: int, peft_model: PeftModel) -> LaneState:
        """Copy a lane's weights and moments to the CPU, to be restored later."""
        shapes = {name: value.shape for name, value, _ in trained_parameters(peft_model)}
        return self.weights.state(lane, shapes)

    def restore_lane(self, peft_model: PeftModel, settings: LaneSettings, state: LaneState) -> int:
        """Append a lane that was taken out before, where it left off."""
        lane = self.weights.restore(adapter_blocks(peft_model), state)
        self._add_settings(settings)
        return lane

    def keep_lanes(self, lanes: list[int]) -> None:
        """Keep only these lanes, in this order: by selection, so that no NaN comes along."""
        self.weights.keep(lanes)
        self._settings = [self._settings[lane] for lane in lanes]
        self._factors.clear()

    def lane_values(self, lane: int, peft_model: PeftModel) -> dict[str, Tensor]:
        """Copy to the CPU what a lane's PEFT model trains, by the pack's names."""
        shapes = {name: value.shape for name, value, _ in trained_parameters(peft_model)}
        return self.weights.values(lane, shapes)

    @property
    def filled(self) -> bool:
        """Whether batches should be filled up to sizes that come back; see ``filled_up``."""
        return not self._disentangled and kernels_for(self.probe) is not None

    # -- a pass ------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, *, training: bool) -> Tensor:
        """Return logits, float32 ``(rows, labels)``, in the batch's row order.

        Several threads may be in here at the same time, if they are all training or none is, if
        their batches are different parts, and if ``shared.keep`` was called before. None may be
        while lanes come and go.
        """
        start = self.shared.start(batch, training)
        return self.run_base(batch, training=training, start=start)

    def run_base(self, batch: PackedBatch, *, training: bool, start: Start | None = None) -> Tensor:
        """Do a pass from a given start; :meth:`forward` is what callers want."""
        lanes, thread = batch.lanes, threading.get_ident()
        factors = self._lane_factors(training).of(lanes)
        self._passes[thread] = Pass(batch, self.weights.part(lanes, batch.part), factors, start)
        try:
            self.model.train(training)
            output = self.model(
                input_ids=batch.ids,
                position_ids=self._positions(batch),
                attention_mask=self._attention_mask(batch),
            )
        finally:
            del self._passes[thread]
        logits: Tensor = output.logits
        return logits.to(self.weights.dtype)

    @property
    def now(self) -> Pass:
        """The pass that the calling thread is in."""
        return self._passes[threading.get_ident()]

    def _lane_factors(self, training: bool) -> LaneFactors:
        """Return what all lanes' adapters multiply by; made anew for other lanes."""
        if training not in self._factors:
            rates = [rate_byte(setting.dropout) if training else 0 for setting in self._settings]
            scales = [
                setting.scaling * (kept_scale(setting.dropout) if training else 1.0)
                for setting in self._settings
            ]
            scaling, rate = on_device([np.array(scales), np.array(rates, np.int16)], self.device)
            scaling = scaling.to(self.weights.dtype)
            self._factors[training] = LaneFactors(scaling, rate if any(rates) else None)
        return self._factors[training]

    def _add_settings(self, settings: LaneSettings) -> None:
        self._settings.append(settings)
        self._factors.clear()

    def _positions(self, batch: PackedBatch) -> Tensor:
        """Number each row's tokens as the base does, ``(1, tokens)``."""
        if not self.position_offset:
            return batch.positions
        # RoBERTa's kind numbers no padding token, not even one that a text spells out.
        padding = self.position_offset - 1
        counts = (batch.ids != padding).long()
        so_far = counts.cumsum(1)
        starts = torch.arange(counts.shape[1], device=self.device) - batch.positions
        before = (so_far - counts).gather(1, starts)
        return (so_far - before) * counts + padding

    def _attention_mask(self, batch: PackedBatch) -> Tensor | None:
        """None, but for ModernBERT's mean, which divides by it after the rows were averaged."""
        if not self._pools_means:
            return None
        return torch.ones(len(batch.first), 1, device=self.device, dtype=torch.int64)

    # -- changing the base -------------------------------------------------------------

    def _replace_modules(self) -> None:
        owned = {}
        for name in self.whole:
            for inner, module in self.model.get_submodule(name).named_modules():
                owned[".".join(filter(None, (name, inner)))] = module
        for name, module in list(self.model.named_modules()):
            new = self._replacement(name, module, name in owned)
            if new is not None:
                self.model.set_submodule(name, new)
            module.__dict__["pack"] = self
            module.__dict__["pack_key"] = module_key(f"{name}.weights")
        unfit, self._disentangled = carries_disentangled(self, self.model)
        if unfit:
            raise refused(self.base, unfit)
        register()
        self.model.config._attn_implementation = PACKED

    def _replacement(self, name: str, module: nn.Module, whole: bool) -> nn.Module | None:
        if isinstance(module, nn.Dropout):
            return KeyedDropout(self, name, module.p)
        if not whole:
            return AdaptableLinear(self, name, module) if isinstance(module, nn.Linear) else None
        if isinstance(module, nn.Linear):
            return LaneLinearLayer(self, name, module)
        if isinstance(module, nn.LayerNorm):
            return LaneLayerNorm(self, name, module)
        if next(module.parameters(recurse=False), None) is not None:
            raise refused(self.base, f"{name} is a {type(module).__name__} that each trial trains")
        return None

    def _place_hooks(self) -> None:
        self._pools_means = getattr(self.model.config, "classifier_pooling", "cls") == "mean"
        encoder = self.model.base_model
        count = self.model.config.num_hidden_layers
        stacks = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if not stacks:
            raise refused(self.base, "its layers were not found")
        name, layers = stacks[0]
        last = encoder.final_norm if self._pools_means else layers[-1]
        if not self._pools_means:
            spare_last_layer(self, self.model, self.model.config.model_type, last)
            last = layers[-1]
        last.register_forward_hook(
            replace_output(row_means if self._pools_means else first_tokens, self)
        )
        self.shared = SharedLayers(self, name, layers)

    def _position_offset(self) -> int:
        """RoBERTa counts positions from its padding id + 1, and says so by a padding row."""
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return 0 if module.padding_idx is None else module.padding_idx + 1
        return 0


def _changing_positions(model: nn.Module) -> str:
    """Say so where rotary frequencies change with the longest row, whosever that is."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind == "longrope" or "dynamic" in str(kind):
                return f"its rotary positions ({kind}) depend on the longest row of a batch"
    return ""
