"""Whether the packed engine's compiled loops are there.

They serve float32 and bfloat16 on a CPU; whoever asks has a way in torch for everything else.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from torch import Tensor

from lorasweep.model.kernel_build import KernelBuildError, built_kernels
from lorasweep.model.kernel_library import TYPES, Kernels

_log = logging.getLogger(__name__)


def kernels_for(x: Tensor) -> Kernels | None:
    """Return the kernels if they serve such a tensor and there are any."""
    if x.device.type != "cpu" or x.dtype not in TYPES:
        return None
    return loaded_kernels()


def loaded_kernels() -> Kernels | None:
    """Return the kernels, compiled before or now; None, with a line in the log, without them."""
    found = _loaded()
    return found if isinstance(found, Kernels) else None


def why_no_kernels() -> str | None:
    """Say in a few words why there are none; None if there are."""
    found = _loaded()
    return found if isinstance(found, str) else None


@cache
def _loaded() -> Kernels | str:
    before = _openmp_libraries()
    try:
        kernels = Kernels(built_kernels())
    except (KernelBuildError, OSError) as error:
        why = str(error)
    else:
        # Two of these would each keep a thread spinning on every core.
        added = _openmp_libraries() - before
        if not added:
            return kernels
        why = f"they would bring a second OpenMP, {added.pop()}"
    _log.info("no compiled kernels: %s; the packed engine uses torch's operations", why)
    return why


def _openmp_libraries() -> set[str]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if _linux() else []
    return {
        line.split()[-1] for line in lines if any(name in line for name in ("libgomp", "libomp"))
    }


def _linux() -> bool:
    return Path("/proc/self/maps").exists()
