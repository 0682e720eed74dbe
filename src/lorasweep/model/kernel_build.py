"""Compile ``csrc/`` for the machine at hand, once, and keep the result in the cache.

Plain C and C++ compilers are all it takes (some seconds). Where there is none, or it
fails, the packed engine does without and says so in its log.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_SOURCES = Path(__file__).with_name("csrc")
# No -ffast-math: it would let the compiler assume that there are no NaNs.
_FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-mprefer-vector-width=512"),
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"),
)
_CPP_FLAGS = ("-std=gnu++20", "-O2", "-shared", "-fPIC")
# Set to 0 to do without whatever is compiled.
SWITCH = "LORASWEEP_KERNELS"


class KernelBuildError(Exception):
    """There is no compiled kernel; says why in a sentence."""


def built_kernels() -> Path:
    """Return the compiled loops, from the cache where they were compiled before.

    Raises:
        KernelBuildError: Switched off, no compiler, or the compiler failed.
    """
    _refuse_where_untried()
    return _built("kernels.c", _compiler("C", "CC", "cc", "gcc"), [*_FLAGS, "-lm"])


def built_step_memory() -> Path:
    """Return the compiled allocator, from the cache where it was compiled for this torch before.

    Raises:
        KernelBuildError: Switched off, no compiler, or the compiler failed.
    """
    _refuse_where_untried()
    compiler = _compiler("C++", "CXX", "c++", "g++")
    of_torch = Path(torch.__file__).parent
    words = [*_CPP_FLAGS, f"-I{of_torch / 'include'}", f"-L{of_torch / 'lib'}", "-lc10"]
    return _built("step_memory.cpp", compiler, words)


def _refuse_where_untried() -> None:
    if os.environ.get(SWITCH, "1") == "0":
        raise KernelBuildError(f"{SWITCH}=0 switches them off")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelBuildError(f"not tried on {platform.system()} {platform.machine()}")


def _compiler(language: str, variable: str, *names: str) -> str:
    """Find the one that the variable names, or the first of the names that is there."""
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise KernelBuildError(f"there is no {language} compiler ({names[0]}) on the PATH")
    return found


def _built(source: str, compiler: str, words: Sequence[str]) -> Path:
    folder = _cache_folder()
    library = folder / f"{Path(source).stem}-{_identity(compiler, words)}.so"
    if not library.is_file():
        _compile(source, compiler, words, library)
    return library


def _identity(compiler: str, words: Sequence[str]) -> str:
    """Name what the result depends on: a home folder may be shared by unlike machines."""
    version = _said([compiler, "--version"])
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = next((line for line in processor.splitlines() if line.startswith("flags")), "")
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir())]
    libc = " ".join(platform.libc_ver())
    parts = [*sources, version, flags, libc, torch.__version__, *words]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(source: str, compiler: str, words: Sequence[str], library: Path) -> None:
    # Next to its place, then renamed: two sweeps may start at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        # What it links to comes after the source that wants it.
        _said([compiler, str(_SOURCES / source), "-o", str(made), *words])
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
