"""The two baselines that look at the base: untrained and linear_probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasweep.baselines.linear_probe import LinearProbeBaseline
from lorasweep.baselines.untrained import UntrainedBaseline
from lorasweep.core.corpora import TextSplit
from lorasweep.core.plans import EngineSettings
from lorasweep.core.protocols import Baseline
from lorasweep.data.embedded import generate_reviews
from lorasweep.model.base import Base, fresh_classifier, open_base
from lorasweep.spec.schema import ModelSpec

TEXTS = ["a great film", "awful", "it was a bad bad movie and a great film is not it", "fine"]


def test_untrained_is_the_model_of_that_seed(
    build: Callable[..., Baseline], base: Base, split: Callable[..., TextSplit]
) -> None:
    found = build("untrained", seed=7).predict(split([("a", 0), ("b", 1)]), TEXTS, 2)
    model = fresh_classifier(base, 7).model
    for text, row in zip(TEXTS, found, strict=True):
        tokens = base.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            expected = model(**tokens).logits.softmax(dim=1)[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-6)


def test_untrained_depends_on_the_seed_alone(
    build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    one, other = split([("a", 0), ("b", 1)]), split([("c", 1), ("d", 0)])
    first = build("untrained", seed=1).predict(one, TEXTS, 2)
    np.testing.assert_array_equal(first, build("untrained", seed=1).predict(other, TEXTS, 2))
    assert not np.allclose(first, build("untrained", seed=2).predict(one, TEXTS, 2), atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta"])
def test_the_probe_pools_tokens_and_no_padding(
    architecture: str,
    tiny_base_folder: Callable[..., Path],
    settings: EngineSettings,
) -> None:
    spec = ModelSpec(name=str(tiny_base_folder(architecture)), max_length=32)
    opened = open_base(spec, ("no", "yes"))
    together = LinearProbeBaseline(opened, 42, settings)._features(TEXTS)
    alone = LinearProbeBaseline(opened, 42, replace(settings, eval_batch_size=1))._features(TEXTS)
    assert together.shape == (len(TEXTS), opened.config.hidden_size)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    encoder = fresh_classifier(opened, 42).model.base_model
    tokens = opened.tokenizer(TEXTS[2], return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        expected = encoder(**tokens)[0][0].mean(dim=0)
    np.testing.assert_allclose(together[2], expected.numpy(), atol=1e-5)


def test_baselines_keep_the_order_of_texts(
    build: Callable[..., Baseline], split: Callable[..., TextSplit]
) -> None:
    train = split([("a great film", 1), ("awful", 0), ("good movie", 1), ("bad", 0)])
    for name in ("untrained", "linear_probe"):
        forward = build(name).predict(train, TEXTS, 2)
        backward = build(name).predict(train, TEXTS[::-1], 2)
        np.testing.assert_allclose(forward, backward[::-1], atol=1e-5)


def test_on_the_embedded_base_the_probe_knows_more_than_the_untrained(
    settings: EngineSettings,
) -> None:
    rows = [
        review
        for review in generate_reviews(2400, 5).train
        if set(review.tags) <= {"plain", "intensifier", "addition"}
    ]
    texts, labels = [row.text for row in rows], np.asarray([row.label for row in rows])
    base = open_base(ModelSpec(max_length=64), ("negative", "positive"))
    half = len(rows) // 2
    train = TextSplit("train", tuple(texts[:half]), tuple(labels[:half].tolist()), ())

    def right(baseline: Baseline, unseen: Sequence[str]) -> float:
        return float((baseline.predict(train, unseen, 2).argmax(axis=1) == labels[half:]).mean())

    wide = replace(settings, eval_batch_size=64)
    probe = right(LinearProbeBaseline(base, 42, wide), texts[half:])
    untrained = right(UntrainedBaseline(base, 42, wide), texts[half:])
    assert probe > 0.75
    assert untrained < 0.7
