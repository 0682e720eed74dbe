"""Which of torch's operations make the host wait for an accelerator, and who asked for one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

_aten = torch.ops.aten
# What CUDA can't answer before it knows how much there is to answer, or at all.
_ASKS = {
    _aten._local_scalar_dense.default: "a number is read",
    _aten.equal.default: "equal",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "masked_select",
    _aten.bincount.default: "bincount",
    _aten._unique.default: "unique",
    _aten._unique2.default: "unique",
    _aten.unique_dim.default: "unique",
    _aten.unique_consecutive.default: "unique",
    _aten.unique_dim_consecutive.default: "unique",
}
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_PASSED_OVER = ("torch", "simulated_device", __name__)


@dataclass(frozen=True, slots=True)
class HostWait:
    """One wait of the host.

    Attributes:
        kind: What it waits for.
        place: File and line of lorasweep or transformers that asked, or of whoever did.
        during: What :meth:`SimulatedDevice.during` was told; empty outside.
    """

    kind: str
    place: str
    during: str


def what_it_awaits(func: Any, args: Any, kwargs: Any) -> str:
    """Say what an operation on the device makes the host wait for; empty for nothing.

    Copies are not told here: it depends on where from and where to.
    """
    if func in _INDEXING:
        chosen = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        # One value for all that is chosen needs no list of places.
        filling = func is not _aten.index.Tensor and args[2].numel() == 1
        return "index by mask" if chosen and not filling else ""
    if func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if func is _aten.segment_reduce.default and not kwargs.get("unsafe"):
        return "segment_reduce without unsafe"
    return _ASKS.get(func, "")


def place_of_caller() -> str:
    """File and line of the innermost frame that is lorasweep's or transformers', if any."""
    frame: Any = sys._getframe(1)
    nearest = ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        line = f"{module.replace('.', '/')}.py:{frame.f_lineno}"
        package = module.partition(".")[0]
        if package in ("lorasweep", "transformers"):
            return line
        if not nearest and package not in _PASSED_OVER:
            nearest = line
        frame = frame.f_back
    return nearest
