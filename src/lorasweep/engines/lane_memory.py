"""What a lane takes of the memory at hand, and how to tell that there is none left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor


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


def is_out_of_memory(error: Any) -> bool:
    """Whether an exception says that memory ran out."""
    # On a CPU torch raises a plain RuntimeError from its allocator.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
