"""Between host and accelerator without waiting: few copies there in a step, one back.

A small array that goes to a GPU from ordinary memory makes the host wait until all earlier work
is done, and so does every number that is read. So arrays go together, from pinned memory, and the
next step is on its way before this one's losses are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 16  # bytes: enough for every type, and what grouped products want


def on_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device, all of them in one transfer that nobody waits for.

    Args:
        arrays: Of any shapes and types.
        device: On the CPU the tensors share the arrays' memory.

    Returns:
        A tensor for each array, of its shape and type.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNED) * _ALIGNED
    # Torch's allocator of pinned memory keeps the buffer until the copy is through.
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = buffer.numpy()
    for start, array in zip(starts, arrays, strict=True):
        flat = np.ascontiguousarray(array).reshape(-1)
        room[start : start + array.nbytes] = flat.view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_type_of(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


class OnItsWay:
    """Numbers that a device computes, and their way to the host.

    All memory is taken at once: to run out of it later would leave a step half done.

    Args:
        values: Where the device will put them.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = self._host = values
        self._arrived: torch.cuda.Event | None = None
        if values.device.type != "cpu":
            on_cuda = values.device.type == "cuda"
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_cuda)
            self._arrived = torch.cuda.Event() if on_cuda else None

    def send(self) -> None:
        """Send off the values: all that changes them is queued, and nobody changes them again."""
        if self._host is self._values:
            return
        # Without an event (on the tests' simulated device) the copy is there when this returns.
        self._host.copy_(self._values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._values.device))

    def read(self) -> list[Any]:
        """Wait for them, and return them in nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[Any] = self._host.tolist()
        return found


def _type_of(array: NDArray[Any]) -> torch.dtype:
    """Return torch's name of an array's type."""
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
