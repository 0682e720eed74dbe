"""Compile ``csrc/`` for the processor at hand, once, and keep the result in the cache.

A plain C compiler is all it takes (a second or two). Where there is none, or it fails, the
packed engine does the same with torch's own operations and says so in its log.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).with_name("csrc")
# No -ffast-math: it would let the compiler assume that there are no NaNs.
_FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-mprefer-vector-width=512"),
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"),
)
# Set to 0 to do without compiled kernels.
SWITCH = "LORASWEEP_KERNELS"


class KernelBuildError(Exception):
    """There is no compiled kernel; says why in a sentence."""


def built_kernels() -> Path:
    """Return the compiled library, from the cache where it was compiled before.

    Raises:
        KernelBuildError: Switched off, no compiler, or the compiler failed.
    """
    if os.environ.get(SWITCH, "1") == "0":
        raise KernelBuildError(f"{SWITCH}=0 switches them off")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelBuildError(f"not tried on {platform.system()} {platform.machine()}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise KernelBuildError("there is no C compiler (cc) on the PATH")
    folder = _cache_folder()
    library = folder / f"kernels-{_identity(compiler)}.so"
    if not library.is_file():
        _compile(compiler, library)
    return library


def _identity(compiler: str) -> str:
    """Name what the result depends on: a home folder may be shared by unlike machines."""
    version = _said([compiler, "--version"])
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = next((line for line in processor.splitlines() if line.startswith("flags")), "")
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir())]
    parts = [*sources, version, flags, *_FLAGS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    # Next to its place, then renamed: two sweeps may start at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        _said([compiler, *_FLAGS, "-o", str(made), str(_SOURCES / "kernels.c"), "-lm"])
        made.replace(library)


def _said(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{words[0]} could not be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing"]
        said = next((line for line in lines if "error:" in line), lines[-1])
        raise KernelBuildError(f"{words[0]} failed and said: {said}")
    return done.stdout


def _cache_folder() -> Path:
    """``$XDG_CACHE_HOME/lorasweep``, or a temporary folder where that can't be written."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "lorasweep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        # Of this process alone: a folder that others may write to is no place for code.
        return Path(tempfile.mkdtemp(prefix="lorasweep-kernels-"))
