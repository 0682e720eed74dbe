"""The base's own dropout in a pack is that of the plain model, place by place.

The two draw masks of their own, so their logits are compared over many draws. Only one place
drops at a time: were it missing in the pack, its logits would not vary at all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model.adapter import trained_whole
from lorasweep.model.base import FreshClassifier, fresh_classifier, seeded
from lorasweep.model.lane_weights import Block
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_dropout import lane_key
from lorasweep.model.packed_lora import PackedModel
from lorasweep.model.scoring import pad_rows

CPU = torch.device("cpu")
RATE = 0.375  # 96/256: rounding to 1/256 changes nothing
LENGTHS = (4, 9, 18)  # the last doesn't fit into ModernBERT's window here
DRAWS, POSITION_DRAWS = 1024, 512
# An equivalence: of normal logits' variance 1024 draws each leave 6 % in doubt (one standard
# error), of the difference of means 4 % of a standard deviation. Half the rate, or kept elements
# not scaled, would take 60 % of the variance, and a place left out all of it.
VARIANCE, MEAN, SHARED = 0.3, 0.2, 0.1


@dataclass(frozen=True)
class Drawn:
    """Logits ``(passes, copies, rows, labels)`` of some rows, copies of which share a pass."""

    logits: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean over the draws, ``(rows, labels)``."""
        return self.logits.mean((0, 1))

    @property
    def variance(self) -> NDArray[np.float64]:
        """Variance over the draws, summed over labels, ``(rows,)``."""
        return self.logits.var((0, 1)).sum(-1)

    @property
    def own(self) -> float:
        """Share of the variance that copies in one pass don't have in common, 0 to 1."""
        inside = self.logits.var(1, ddof=1).mean(0)
        return float(inside.sum() / self.variance.sum())


def rows_of(lengths: tuple[int, ...], copies: int, vocabulary: int) -> EncodedSplit:
    """Rows of random ordinary tokens, one of each length, again and again."""
    rng = np.random.default_rng(5)
    one = [np.array([2, *rng.integers(5, vocabulary, n - 2), 3], np.int32) for n in lengths]
    rows = one * copies
    return EncodedSplit(
        name="rows",
        tokens=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        labels=np.zeros(len(rows), dtype=np.int64),
    )


def places_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Where a classifier drops: modules, and the attribute that holds the rate of each."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            yield name, "p"
        elif isinstance(getattr(module, "attention_dropout", None), float):
            yield name, "attention_dropout"  # ModernBERT's, applied by a function


def dropping_at(fresh: FreshClassifier, place: tuple[str, str]) -> FreshClassifier:
    """Copy a classifier, the copy to drop at one place only."""
    model = copy.deepcopy(fresh.model)
    for name, attribute in places_of(model):
        rate = RATE if (name, attribute) == place else 0.0
        setattr(model.get_submodule(name), attribute, rate)
    return dataclasses.replace(fresh, model=model)


def plain_draws(fresh: FreshClassifier, split: EncodedSplit, passes: int) -> Drawn:
    """Let the model that transformers made draw."""
    batch = pad_rows(split, range(len(split)), fresh.base.pad_id)
    model = fresh.model.train()
    with seeded(1), torch.no_grad():
        found = [
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for _ in range(passes)
        ]
    return drawn(torch.stack(found))


def pack_of(fresh: FreshClassifier, lanes: int) -> PackedModel:
    """Make a pack whose lanes have the classifier's own head and no adapter."""
    head = {
        f"{name}.{inner}": value.detach().clone()
        for name in trained_whole(fresh)
        for inner, value in fresh.model.get_submodule(name).named_parameters()
    }
    pack = PackedModel(fresh, CPU)
    for _ in range(lanes):
        pack.add_untrained_lane([Block(n, tuple(v.shape)) for n, v in head.items()], head)
    return pack


def packed_draws(fresh: FreshClassifier, split: EncodedSplit, passes: int) -> Drawn:
    """Let a pack draw: what is a batch of a trial's own to it is a pass here."""
    lanes = 8
    pack = pack_of(fresh, lanes)
    every, found = np.arange(len(split)), []
    for step in range(passes // lanes):
        rows = [LaneRows(every, lane_key(lane), step) for lane in range(lanes)]
        batch = lay_out(split, rows, CPU, training=True, filled=pack.filled)
        with torch.no_grad():
            found.append(pack.forward(batch, training=True).view(lanes, len(split), -1))
    return drawn(torch.cat(found))


def drawn(logits: torch.Tensor) -> Drawn:
    """From ``(passes, copies * rows, labels)``."""
    return Drawn(logits.double().unflatten(1, (-1, len(LENGTHS))).numpy())


@pytest.mark.parametrize(
    ("architecture", "pooling", "places"),
    [
        ("bert", None, 8),
        ("distilbert", None, 6),
        ("roberta", None, 8),
        ("electra", None, 8),
        ("deberta-v2", None, 11),
        ("modernbert", "cls", 8),
        ("modernbert", "mean", 8),
    ],
)
def test_dropout_at_each_place_does_what_it_does_in_the_plain_model(
    architecture, pooling, places, open_tiny, monkeypatch
):
    base = open_tiny(architecture, base_dropout=RATE)
    if pooling:
        base.config.classifier_pooling = pooling
    fresh = fresh_classifier(base, seed=3)
    # ModernBERT makes no dropout where its rate is 0, so the places are those of this model.
    found = list(places_of(fresh.model))
    assert len(found) >= places
    for place in found:
        # All rows of a batch share the dropout of relative positions: a pass is one draw.
        shared = place[0].endswith("pos_dropout")
        copies = 2 if shared else 64
        passes = POSITION_DRAWS if shared else DRAWS // copies
        split = rows_of(LENGTHS, copies, base.config.vocab_size)
        plain = plain_draws(dropping_at(fresh, place), split, passes)
        assert plain.variance.min() > 1e-4, place  # else there would be nothing to miss
        for kernels in ("compiled", "torch"):
            with monkeypatch.context() as patch:
                if kernels == "torch":
                    patch.setattr("lorasweep.model.kernels.loaded_kernels", lambda: None)
                packed = packed_draws(dropping_at(fresh, place), split, passes)
            ratio = packed.variance / plain.variance
            assert np.abs(ratio - 1).max() < VARIANCE, (place, kernels, ratio)
            apart = np.abs(packed.mean - plain.mean).max(-1) / np.sqrt(plain.variance)
            assert apart.max() < MEAN, (place, kernels, apart)
            assert abs(packed.own - plain.own) < SHARED, (place, kernels, packed.own, plain.own)


@pytest.mark.parametrize("architecture", ["roberta", "electra"])
def test_a_dropout_called_twice_in_a_pass_draws_twice(architecture, open_tiny):
    """Their heads drop before and after a layer through one and the same module."""
    base = open_tiny(architecture, base_dropout=RATE)
    pack = pack_of(fresh_classifier(base, seed=3), 1)
    dropped: list[torch.Tensor] = []
    pack.model.get_submodule("classifier.dropout").register_forward_hook(
        lambda _module, _inputs, output: dropped.append(output == 0)
    )
    split = rows_of(LENGTHS, 100, base.config.vocab_size)
    batch = lay_out(split, [LaneRows(np.arange(len(split)), lane_key(1))], CPU, training=True)
    with torch.no_grad():
        for _ in range(2):
            pack.forward(batch, training=True)
    first, second, *again = (kept.double().flatten() for kept in dropped)
    # As good as independent: of 9600 elements, with five standard errors.
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 5 / len(first) ** 0.5
    # And still a function of the step alone: the next pass over the same batch is the same.
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
