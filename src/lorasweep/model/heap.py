"""Keep the memory that a step frees for the next step, until it is wanted back."""

from __future__ import annotations

import ctypes
import platform

from lorasweep.model.step_memory import installed_step_memory, step_memory

# glibc's names for what mallopt sets (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MOST_ARENAS = -1, -2, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_TOP = 256 << 20


def keep_freed_memory() -> None:
    """Don't give freed memory back to the kernel between steps, where that can be helped.

    A training step on a CPU frees some hundred megabytes and asks for them again at once.
    By default glibc returns them, and the kernel clears every page anew
    (docs/performance-history.md says what that took). The process keeps its largest step's
    memory instead: tensors in :mod:`lorasweep.model.step_memory`; what else is allocated, and
    tensors where that isn't there, in glibc's heap.
    """
    step_memory()
    if (libc := _glibc()) is None:
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, _TOP)
    # Threads to come share heaps with those that are there: each of its own would keep memory.
    libc.mallopt(_MOST_ARENAS, 1)


def give_freed_memory_back() -> None:
    """Return to the kernel what was kept and isn't used: memory is short, or no step follows."""
    if (kept := installed_step_memory()) is not None:
        kept.give_back()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
