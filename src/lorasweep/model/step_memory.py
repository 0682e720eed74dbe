"""Memory of a training step on a CPU, kept for the next one (``csrc/step_memory.cpp``)."""

from __future__ import annotations

import ctypes
import logging
from functools import cache

from lorasweep.model.kernel_build import KernelBuildError, built_step_memory

_log = logging.getLogger(__name__)

# What step_memory_install says if not 0.
_REFUSALS = {
    1: "the process may not use twice as many addresses as the machine has memory (ulimit -v)",
    2: "something else has taken its place (another allocator of CPU tensors)",
}


class StepMemory:
    """The allocator, serving every larger tensor that the process makes on the CPU.

    There is one for a process, and it stays for the process's life: :func:`step_memory`.

    Attributes:
        least: Bytes of the smallest tensor that it serves; it knows of no other.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("least", "taken", "peak", "grown"):
            getattr(library, f"step_memory_{name}").restype = ctypes.c_size_t
        self.least = int(library.step_memory_least())

    @property
    def taken(self) -> int:
        """Bytes that tensors hold now, rounded up to pages."""
        return int(self._library.step_memory_taken())

    def peak(self) -> int:
        """Bytes that tensors held at most since this was last asked."""
        return int(self._library.step_memory_peak())

    @property
    def grown(self) -> int:
        """Bytes in use, or kept for use."""
        return int(self._library.step_memory_grown())

    def give_back(self) -> None:
        """Return to the kernel what no tensor holds."""
        self._library.step_memory_give_back()


def step_memory() -> StepMemory | None:
    """Have torch allocate by it from now on; None, with a line in the log, where that can't be."""
    found = _installed()
    return found if isinstance(found, StepMemory) else None


def installed_step_memory() -> StepMemory | None:
    """Return it where :func:`step_memory` was asked for before; else None, and nothing changes."""
    return step_memory() if _installed.cache_info().currsize else None


def why_no_step_memory() -> str | None:
    """Say in a few words why there is none; None if there is."""
    found = _installed()
    return found if isinstance(found, str) else None


@cache
def _installed() -> StepMemory | str:
    try:
        library = ctypes.CDLL(str(built_step_memory()))
    except (KernelBuildError, OSError) as error:
        why = str(error)
    else:
        # By however many threads at once: the library does it one time, and says how that went.
        refused = library.step_memory_install()
        if not refused:
            return StepMemory(library)
        why = _REFUSALS[refused]
    _log.info("torch's own allocator serves the steps of a pack: %s", why)
    return why
