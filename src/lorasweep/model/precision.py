"""Which device trains, and in which precision: from the settings' words to what torch takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from lorasweep.core.errors import ModelError, Problem
from lorasweep.core.plans import Precision


def pick_device(name: str = "auto") -> torch.device:
    """Return the device that a setting means: ``auto`` takes the first CUDA device, else the CPU.

    Raises:
        ModelError: It is no device that lorasweep trains on, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ModelError(Problem("device", f"must be auto, cpu or cuda:N, got {name!r}"))
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= there:
        raise ModelError(
            Problem("device", f"{name} is not there: torch sees {there} CUDA devices", "Use auto.")
        )
    return torch.device("cuda", device.index or 0)


def resolve(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision to train in; ``auto`` is bf16 where ``device`` multiplies it natively.

    Where bf16 is emulated, products are first widened to float32: slower than fp32 itself.
    """
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether the hardware has instructions for products of bfloat16 matrices."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_multiplies_bf16(_cpu_flags())


def _cpu_multiplies_bf16(flags: frozenset[str]) -> bool:
    """Whether a CPU with these flags does, and torch was built to use it.

    x86: AVX512-BF16 or AMX-BF16. ARM: the BF16 extension (``bf16`` in its feature list).
    oneDNN's own check is not enough: it also answers yes where AVX-512 emulates.
    """
    if not flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        return False


def _cpu_flags() -> frozenset[str]:
    """Feature flags of the first CPU as Linux lists them; elsewhere what torch can tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
        return frozenset(
            flag for flag, asks in known.items() if getattr(torch.cpu, asks, lambda: False)()
        )
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()
