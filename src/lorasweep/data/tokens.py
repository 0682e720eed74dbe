"""Texts to token ids, once a sweep: no trial tokenises again, and nothing is padded here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasweep.core.corpora import EncodedSplit, TextSplit

_ROWS_AT_ONCE = 1000


def encode(split: TextSplit, tokenizer: Any, max_length: int) -> EncodedSplit:
    """Tokenise a split, truncated to ``max_length`` with its special tokens.

    Args:
        split: The texts.
        tokenizer: A fast tokenizer of transformers.
        max_length: Most tokens a row may have, special tokens included.
    """
    rows: list[NDArray[np.int32]] = []
    truncated = 0
    for start in range(0, len(split), _ROWS_AT_ONCE):
        batch = tokenizer(
            list(split.texts[start : start + _ROWS_AT_ONCE]),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        rows += [np.asarray(ids, dtype=np.int32) for ids in batch["input_ids"]]
        truncated += sum(bool(encoding.overflowing) for encoding in batch.encodings)
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    offsets[1:] = np.cumsum([len(row) for row in rows])
    return EncodedSplit(
        name=split.name,
        tokens=np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32),
        offsets=offsets,
        labels=np.asarray(split.labels, dtype=np.int64),
        truncated=truncated,
    )
