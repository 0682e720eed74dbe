"""Opening a base: what is found, what is refused, and that loading it twice gives the same."""

from __future__ import annotations

import pytest
import torch

from lorasweep.model.base import fresh_classifier, open_base
from lorasweep.spec.schema import ModelSpec

NEW_MODULES = {
    "albert": ("classifier",),
    "bert": ("classifier",),
    "camembert": ("classifier",),
    "deberta": ("pooler", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "electra": ("classifier",),
    "modernbert": ("head", "classifier"),
    "mpnet": ("classifier",),
    "roberta": ("classifier",),
    "xlm-roberta": ("classifier",),
    "xlnet": ("sequence_summary", "logits_proj"),
}


@pytest.mark.parametrize("architecture", NEW_MODULES)
def test_new_modules_are_named_and_are_a_function_of_the_seed(architecture, tiny_base_folder):
    base = open_base(
        ModelSpec(name=str(tiny_base_folder(architecture)), max_length=32), ("no", "yes")
    )
    before = torch.random.get_rng_state()
    first, again, other = (fresh_classifier(base, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.new_modules == NEW_MODULES[architecture]
    differing = set()
    for (name, a), b, c in zip(
        first.model.named_parameters(),
        again.model.parameters(),
        other.model.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        if not torch.equal(a, c):
            differing.add(name)
    assert differing
    assert all(name.startswith(first.new_modules) for name in differing)
