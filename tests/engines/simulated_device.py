"""A device without hardware: its tensors refuse to meet the CPU's, and it notes each host wait.

On an accelerator the host hands out work and goes on. Whatever needs a number back, or copies
from memory that isn't pinned, makes it wait until the device has done all that came before.
Here the tensors of the device hold CPU data, so every operation gives what it gives on a CPU;
but an operation that CUDA would refuse is refused, and one for which CUDA's host would wait is
noted, with the line that asked for it.

What it can't show: memory that isn't pinned (a copy counts as one that nobody waits for when
it says ``non_blocking=True``), whether what arrives by such a copy is read too early, waits
inside a library's own kernels, and speed.

Registering a device is for the whole process, so import this in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from host_waits import HostWait, place_of_caller, what_it_awaits
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "simulated"


class _Backend(_DummyBackendModule):
    """What torch asks of any device; this one draws no random numbers."""

    def get_rng_state(self, device: Any) -> None:
        pass

    def set_rng_state(self, state: None, device: Any) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
_BY_INDEX = (Tensor.__getitem__, Tensor.__setitem__)


class SimulatedTensor(torch.Tensor):
    """A tensor of the device; ``held`` is its data."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimulatedTensor:
        """Wrap a CPU tensor without copying it."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to work where the device isn't switched on: a wait would go unseen."""
        raise RuntimeError(f"{func} outside of `with SimulatedDevice()`")

    def tolist(self) -> Any:
        """Copy to the host first, as torch does for devices that it knows."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Show the data, without an operation."""
        return f"simulated {self.held!r}"


class _Written(TorchFunctionMode):
    """Lists that become tensors of the device, also as indices: torch copies them unseen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BY_INDEX and isinstance(args[0], SimulatedTensor):
            index = tuple(
                torch.tensor(x).to(DEVICE) if isinstance(x, list) else x
                for x in (args[1] if isinstance(args[1], tuple) else (args[1],))
            )
            return func(args[0], index, *args[2:])
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """While switched on, carries out every operation and notes what it does to the host.

    Attributes:
        waits: All of them, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[HostWait] = []
        self._during = ""
        self._written = _Written()

    def __enter__(self) -> SimulatedDevice:
        self._written.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._written.__exit__(*error)

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Name what goes on, for the waits that are noted meanwhile."""
        before, self._during = self._during, what
        try:
            yield
        finally:
            self._during = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out one operation on what the tensors hold."""
        kwargs = kwargs or {}
        ours, near = _apart((args, kwargs))
        wanted = kwargs.get("device")
        there = bool(ours) if wanted is None else _is_ours(wanted)
        self._look(func, args, kwargs, ours, near, there)
        if there and wanted is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        held_args, held_kwargs = tree_map_only(SimulatedTensor, lambda x: x.held, (args, kwargs))
        out = func(*held_args, **held_kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if not there:
            return out
        known = {id(x.held): x for x in ours}  # what is written in place stays who it is
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else _wrapped(x), out)

    def _look(
        self, func: Any, args: Any, kwargs: Any, ours: list[Any], near: list[Any], there: bool
    ) -> None:
        """Note a wait, or refuse what CUDA refuses."""
        if func is torch.ops.aten._to_copy.default:
            if there != bool(ours):
                self._copy(there, kwargs.get("non_blocking"))
        elif func is torch.ops.aten.copy_.default:
            if ours and near:
                asked = args[2] if len(args) > 2 else kwargs.get("non_blocking")
                self._copy(isinstance(args[0], SimulatedTensor), asked)
        elif ours and any(x.dim() for x in near):
            raise RuntimeError(
                f"{func} of tensors on {NAME} and on the CPU, at {place_of_caller()}"
            )
        elif ours and (kind := what_it_awaits(func, args, kwargs)):
            self._note(kind)

    def _copy(self, there: bool, non_blocking: bool | None) -> None:
        if not non_blocking:
            self._note("copy to the device" if there else "copy to the host")

    def _note(self, kind: str) -> None:
        self.waits.append(HostWait(kind, place_of_caller(), self._during))


def _apart(tree: Any) -> tuple[list[SimulatedTensor], list[Tensor]]:
    """Find all tensors in nested arguments: the device's, and others."""
    ours: list[SimulatedTensor] = []
    near: list[Tensor] = []

    def sort(x: Any) -> Any:
        (ours if isinstance(x, SimulatedTensor) else near).append(x)
        return x

    tree_map_only(Tensor, sort, tree)
    return ours, near


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _wrapped(x: Tensor) -> SimulatedTensor:
    return x if isinstance(x, SimulatedTensor) else SimulatedTensor(x)
