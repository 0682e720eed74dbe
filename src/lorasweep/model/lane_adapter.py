"""A lane's own PEFT model, seen from the pack: what it trains, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Trainer

from lorasweep.model.lane_weights import Block

_PREFIX = "base_model.model."
_ADAPTER = "default"
# PEFT's scaling is exact in float32; ranks are padded to this, since narrower products on
# CUDA must be 16 bytes wide.
_RANK_STEP = 8


def trained_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield what a PEFT model trains: the pack's name, the parameter, and PEFT's own name."""
    for full_name, module in model.named_modules():
        name = full_name.removeprefix(_PREFIX)
        if isinstance(module, LoraLayer):
            for part in ("lora_A", "lora_B"):
                weight = getattr(module, part)[_ADAPTER].weight
                yield f"{name}.{part}", weight, f"{full_name}.{part}.{_ADAPTER}.weight"
        elif isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save[_ADAPTER]
            for inner, parameter in copy.named_parameters():
                yield (
                    f"{name}.{inner}",
                    parameter,
                    f"{full_name}.modules_to_save.{_ADAPTER}.{inner}",
                )


def adapter_blocks(model: PeftModel) -> list[Block]:
    """Describe what a PEFT model trains, in the pack's names, its rank padded."""
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    found = []
    for name, parameter, full_name in trained_parameters(model):
        shape = list(parameter.shape)
        if name.endswith(("lora_A", "lora_B")):
            axis = 0 if name.endswith("lora_A") else 1
            shape[axis] = -(-shape[axis] // _RANK_STEP) * _RANK_STEP
        found.append(Block(name, tuple(shape), full_name in decaying))
    return found


def write_values(model: PeftModel, values: Mapping[str, Tensor]) -> None:
    """Give a PEFT model what ``PackedModel.lane_values`` copied; it takes no memory."""
    for name, parameter, _ in trained_parameters(model):
        parameter.data = values[name]


def release_frozen(model: PeftModel) -> None:
    """Let go of a PEFT model's frozen weights: the pack has its own, and only one copy."""
    trained = {id(parameter) for _, parameter, _ in trained_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.data = parameter.data.new_empty(0)
