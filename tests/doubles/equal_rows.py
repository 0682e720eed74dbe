"""Token rows of one length, for what depends on nothing else."""

from __future__ import annotations

import numpy as np

from lorasweep.core.corpora import EncodedSplit


def rows_of_length(tokens: int, *, rows: int) -> EncodedSplit:
    """Random token ids, which any base's vocabulary has; labels alternate."""
    rng = np.random.default_rng(rows)
    return EncodedSplit(
        name="some",
        tokens=rng.integers(5, 90, rows * tokens).astype(np.int32),
        offsets=np.arange(0, (rows + 1) * tokens, tokens),
        labels=np.arange(rows) % 2,
    )
