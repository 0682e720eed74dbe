"""Scoring: row order, padding and batch size leave no trace in the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model import scoring
from lorasweep.model.base import fresh_classifier
from lorasweep.model.scoring import pad_rows, predict_logits

CPU = torch.device("cpu")


def score(model, split, batch_size=4, precision="fp32"):
    return predict_logits(
        model, split, pad_id=0, batch_size=batch_size, device=CPU, precision=precision
    )


@pytest.mark.parametrize(
    "architecture", ["bert", "distilbert", "roberta", "deberta-v2", "modernbert", "mpnet", "xlnet"]
)
def test_each_row_scores_as_if_it_were_alone(architecture, open_tiny, encode):
    base = open_tiny(architecture)
    split = encode(base)
    model = fresh_classifier(base, seed=3).model
    with torch.no_grad():
        alone = [
            model(input_ids=torch.from_numpy(split.row(at).astype(np.int64))[None]).logits[0]
            for at in range(len(split))
        ]
    expected = torch.stack(alone).numpy()
    assert np.ptp(expected, axis=0).min() > 0.01  # rows do differ, so order would show
    for batch_size in (1, 2, 100):
        found = score(model, split, batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batches_are_padded_to_their_longest_row_only(open_tiny, encode, monkeypatch):
    base = open_tiny()
    split = encode(base)
    shapes = []
    real = scoring.pad_rows

    def spy(*args, **kwargs):
        batch = real(*args, **kwargs)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(scoring, "pad_rows", spy)
    score(fresh_classifier(base, 0).model, split, batch_size=2)
    lengths = sorted(split.lengths, reverse=True)
    assert [tokens for _, tokens in shapes] == lengths[::2]


def test_scoring_is_in_evaluation_mode_and_leaves_the_mode_as_it_was(open_tiny, encode):
    base = open_tiny(base_dropout=0.5)
    model = fresh_classifier(base, 0).model
    split = encode(base)
    expected = score(model, split)
    model.train()
    np.testing.assert_array_equal(score(model, split), expected)
    assert model.training
    assert all(value.grad is None for value in model.parameters())


def test_bf16_is_near_and_comes_back_as_float32(open_tiny, encode):
    base = open_tiny()
    model = fresh_classifier(base, 0).model
    split = encode(base)
    exact, half = score(model, split), score(model, split, precision="bf16")
    assert half.dtype == np.float32
    assert 0 < np.abs(exact - half).max() < 0.05
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_no_rows_give_no_logits(open_tiny):
    base = open_tiny("bert", labels=("a", "b", "c"))
    nothing = EncodedSplit(
        "none", np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64)
    )
    assert score(fresh_classifier(base, 0).model, nothing).shape == (0, 3)


def test_pad_rows_fills_the_end_or_the_start():
    split = EncodedSplit(
        "x",
        np.array([5, 6, 7, 8, 9, 10], np.int32),
        np.array([0, 3, 4, 6], np.int64),
        np.array([0, 1, 2]),
    )
    batch = pad_rows(split, [2, 1], 0)
    assert batch["input_ids"].tolist() == [[9, 10], [8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [2, 1]
    batch = pad_rows(split, [0, 1], 99, left=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [99, 99, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
