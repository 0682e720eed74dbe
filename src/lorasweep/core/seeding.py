"""Seeds derived from one another by name, so that no two uses share a stream by accident."""

from __future__ import annotations

import hashlib


def derive_seed(root: int, *path: str | int) -> int:
    """Return a seed in ``[0, 2**31)`` that depends on ``root`` and on every part of ``path``.

    The same arguments give the same seed in every process and on every platform, which
    Python's own ``hash`` does not. 31 bits is what NumPy, scikit-learn, Optuna and
    ``transformers.set_seed`` all accept.

    >>> derive_seed(42, "trial", 5) == derive_seed(42, "trial", 5)
    True
    >>> derive_seed(42, "trial", 5) == derive_seed(42, "trial", 6)
    False
    """
    # The length prefix keeps ("ab", "c") and ("a", "bc") apart; the type keeps 5 and "5" apart.
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in (root, *path))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
