"""What a lane takes of the memory at hand."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan
from lorasweep.engines.packing import length_batches
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.model.torch_errors import is_out_of_memory

# What a lane is measured with; a larger batch or rank takes more.
_PROBE_ROWS = 16
_PROBE_PLAN = AdapterPlan(rank=16, alpha=16.0, dropout=0.1)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return int(psutil.virtual_memory().available)


def saved_bytes(forward: Callable[[], Tensor], device: torch.device) -> int:
    """Measure the memory of one forward and backward pass.

    Args:
        forward: Computes a scalar to differentiate.
        device: Where it computes. CUDA's allocator knows its own peak; on a CPU the tensors
            kept for the backward pass are counted, and doubled for what comes and goes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().backward()
        return int(torch.cuda.max_memory_allocated(device) - before)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward()
    return 2 * sum(kept.values())


def lane_bytes(
    model: PackedModel, base: Base, train: EncodedSplit, device: torch.device
) -> int | None:
    """Measure what one more lane takes: a step at the longest rows, weights and moments.

    Args:
        model: A pack without lanes; it has none again afterwards.
        base: What it carries.
        train: Where the rows are from.
        device: Where the pack computes.

    Returns:
        Bytes; None where not even one lane fits.
    """
    probe = attach(fresh_classifier(base, 0), _PROBE_PLAN, 0)
    model.add_lane(probe, LaneSettings(_PROBE_PLAN.scaling, _PROBE_PLAN.dropout))
    rows = length_batches(train, _PROBE_ROWS)[0]
    batch = lay_out(train, [LaneRows(rows)], device, training=True)

    def forward() -> Tensor:
        return model.forward(batch, training=True).sum()

    try:
        if device.type == "cuda":  # the first time, libraries take workspaces that they keep
            forward().backward()
            model.weights.drop_gradients()
        step = saved_bytes(forward, device)
        # Weights, gradients and both moments come on top.
        return step + 4 * model.weights.weights.nbytes
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        model.keep_lanes([])
