"""Tokenised once, truncated with special tokens, never padded."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import BertTokenizerFast

from lorasweep.core.corpora import TextSplit
from lorasweep.data.tokens import encode

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY), encoding="utf-8")
    return BertTokenizerFast(vocab=str(path), model_max_length=512)


def split(*texts: str) -> TextSplit:
    return TextSplit("train", texts, tuple(n % 2 for n in range(len(texts))), texts)


def test_ids_labels_and_offsets(tokenizer: BertTokenizerFast) -> None:
    encoded = encode(split("good films", "bad", "???"), tokenizer, 16)
    assert encoded.row(0).tolist() == [2, 5, 7, 8, 3]
    assert encoded.row(1).tolist() == [2, 6, 3]
    assert encoded.lengths.tolist() == [5, 3, 5]
    assert encoded.labels.tolist() == [0, 1, 0]
    assert 0 not in encoded.tokens
    assert (encoded.tokens.dtype, encoded.offsets.dtype) == (np.int32, np.int64)
    assert (encoded.labels.dtype, encoded.truncated, encoded.name) == (np.int64, 0, "train")


def test_long_rows_lose_their_end_but_not_their_special_tokens(
    tokenizer: BertTokenizerFast,
) -> None:
    exact, longer = "good " * 6, "good " * 6 + "bad"
    encoded = encode(split(exact, longer, "bad " * 1000), tokenizer, 8)
    assert encoded.lengths.tolist() == [8, 8, 8]
    assert encoded.row(1).tolist() == [2, 5, 5, 5, 5, 5, 5, 3]
    assert encoded.truncated == 2


def test_rows_keep_their_order_over_many_batches(tokenizer: BertTokenizerFast) -> None:
    texts = ["good " * (1 + n % 5) for n in range(2345)]
    encoded = encode(split(*texts), tokenizer, 16)
    assert encoded.lengths.tolist() == [3 + n % 5 for n in range(2345)]


def test_words_of_a_million_letters_and_no_rows_at_all(tokenizer: BertTokenizerFast) -> None:
    assert encode(split("x" * 1_000_000), tokenizer, 16).row(0).tolist() == [2, 1, 3]
    assert len(encode(split(), tokenizer, 16)) == 0
