"""What a sweep ran on and with: versions, machine, git commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "lorasweep",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "scikit-learn",
    "statsmodels",
    "optuna",
    "mlflow",
    "numpy",
    "pandas",
)


def describe(folder: Path | None = None) -> dict[str, Any]:
    """Return what the environment is, as plain data that JSON takes. Never raises.

    Args:
        folder: Whose git repository is named; the current folder when None.

    Returns:
        ``python``, ``platform``, ``cpu`` (model), ``cores`` (usable by this process),
        ``memory_gib``, ``gpu`` (names; empty without one), ``versions`` by package,
        ``git_commit`` and ``git_dirty`` (both None outside a repository).
    """
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpus(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use: a container or taskset may have left it fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """Name the processor, and its family: virtual machines hide what follows the brand."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    family, model = found.get("cpu family"), found.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def _gpus() -> list[str]:
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [str(torch.cuda.get_device_name(index)) for index in range(count)]
    except (ImportError, RuntimeError, AssertionError):  # a driver that doesn't fit the build
        return []


def _git(folder: Path | None, *words: str) -> str | None:
    """What git answers; None without git, outside a repository, or when it takes too long."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
