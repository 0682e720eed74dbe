"""Keep the memory that a step frees for the next step, on large pages."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

# glibc's names for what mallopt sets (malloc.h), and Linux's for what madvise does (mman.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_HUGE_PAGE = 14
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_TOP = 1 << 30  # address space, not memory: a page counts from its first use on


class Heap:
    """The heap of a process on Linux with glibc; elsewhere nothing happens."""

    def __init__(self) -> None:
        self._libc: ctypes.CDLL | None = None
        self._advised = 0
        if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
            return
        self._advised = _heap_start()
        if not self._advised:
            return
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.restype = self._libc.sbrk.restype = ctypes.c_void_p

    def keep_freed_memory(self) -> None:
        """Tell glibc not to give freed memory back to the kernel between steps.

        A training step on a CPU frees some hundred megabytes and asks for them again at once.
        By default glibc returns them, and the kernel clears every page anew
        (docs/performance.md says what that took). The process keeps its largest step's memory
        instead.
        """
        if self._libc is None:
            return
        self._libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        self._libc.mallopt(_TRIM_THRESHOLD, -1)
        self._libc.mallopt(_TOP_PAD, _TOP)
        # Grow it now, so that what the first step takes is advised before it is touched.
        below = _LARGEST_MMAP_THRESHOLD - (1 << 16)  # with malloc's own bytes not a map apart
        self._libc.free(ctypes.c_void_p(self._libc.malloc(below)))

    def advise(self) -> None:
        """Ask for large pages where the heap has grown since the last time.

        A fresh page of 4 KiB costs the kernel about as much as one of 2 MiB, and a step walks
        over so much memory that finding pages takes time too. Where the system doesn't grant
        large pages, nothing changes.
        """
        if self._libc is None:
            return
        end = self._libc.sbrk(0)
        if end > self._advised:
            start = self._advised & -4096
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _HUGE_PAGE)
            self._advised = end


@cache
def heap() -> Heap:
    """Return the process's heap."""
    return Heap()


def _heap_start() -> int:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith("[heap]"):
            return int(line.split("-")[0], 16)
    return 0
