"""A copy of a base that was read once is what reading it again would give."""

from __future__ import annotations

import shutil

import pytest
import torch
from architectures import ENCODERS
from transformers import AutoModelForSequenceClassification

from lorasweep.core.plans import AdapterPlan
from lorasweep.model import fresh_copies
from lorasweep.model.adapter import attach, count_parameters
from lorasweep.model.base import fresh_classifier, open_base
from lorasweep.model.fresh_copies import FreshCopies
from lorasweep.spec.schema import ModelSpec


@pytest.fixture
def base(tiny_base_folder):
    def make(architecture="bert", labels=("no", "yes")):
        folder = tiny_base_folder(architecture)
        return open_base(ModelSpec(name=str(folder), max_length=16), labels)

    return make


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ENCODERS)
def test_what_a_trial_trains_begins_with_the_same_numbers(architecture, base):
    opened = base(architecture)
    copies = FreshCopies(fresh_classifier(opened, 0), 0)
    assert copies.faithful
    plan = AdapterPlan(4, 8.0, 0.1)
    state = torch.random.get_rng_state()
    for seed in (0, 7, 2**40):
        copied, loaded = copies.fresh(seed), fresh_classifier(opened, seed)
        assert (copied.new_modules, copied.drawn) == (loaded.new_modules, loaded.drawn)
        assert not copied.model.training
        ours, theirs = attach(copied, plan, seed + 1), attach(loaded, plan, seed + 1)
        assert count_parameters(ours) == count_parameters(theirs)
        assert trained(ours).keys() == trained(theirs).keys()
        for name, value in trained(theirs).items():
            assert torch.equal(trained(ours)[name], value), name
        assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_head_that_the_base_brings_along_is_kept_or_drawn_as_when_loading(base, tmp_path):
    folder = tmp_path / "classifier"
    shutil.copytree(base().location, folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.save_pretrained(folder)
    for labels in (("no", "yes"), ("a", "b", "c")):
        opened = open_base(ModelSpec(name=str(folder), max_length=16), labels)
        copies = FreshCopies(fresh_classifier(opened, 0), 0)
        assert copies.faithful
        ours, theirs = copies.fresh(5), fresh_classifier(opened, 5)
        assert torch.equal(ours.model.classifier.weight, theirs.model.classifier.weight)
        drawn = not torch.equal(
            copies.fresh(6).model.classifier.weight, ours.model.classifier.weight
        )
        assert drawn == (len(labels) == 3)


def test_copies_share_nothing_with_one_another_or_with_what_was_loaded(base):
    loaded = fresh_classifier(base(), 0)
    copies = FreshCopies(loaded, 0)
    expected = copies.fresh(3).model.classifier.weight.detach().clone()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data * 0 + 9
    first = copies.fresh(3).model
    with torch.no_grad():
        first.classifier.weight.fill_(9)
        for parameter in first.parameters():
            parameter.data = parameter.data.new_empty(0)
    second = copies.fresh(3).model
    assert torch.equal(second.classifier.weight, expected)
    assert second.bert.embeddings.word_embeddings.weight.numel() > 0


def test_frozen_weights_take_no_memory(base):
    model = FreshCopies(fresh_classifier(base(), 0), 0).fresh(1).model
    taken = sum(p.untyped_storage().nbytes() for p in model.bert.parameters())
    assert taken <= 4 * len(list(model.bert.parameters()))


def test_the_base_is_read_once(base, monkeypatch):
    copies = FreshCopies(fresh_classifier(base(), 0), 0)
    monkeypatch.setattr(fresh_copies, "fresh_classifier", None)
    assert copies.fresh(1).model.classifier.weight.any()


def test_where_weights_are_drawn_in_another_way_each_copy_is_loaded(base, monkeypatch):
    opened = base()
    loaded = fresh_classifier(opened, 0)
    draw = type(loaded.model).initialize_weights

    def otherwise(model):
        torch.rand(1)
        draw(model)

    with monkeypatch.context() as patch:
        patch.setattr(type(loaded.model), "initialize_weights", otherwise)
        copies = FreshCopies(loaded, 0)
    assert not copies.faithful
    weight = copies.fresh(4).model.classifier.weight
    assert torch.equal(weight, fresh_classifier(opened, 4).model.classifier.weight)
    assert copies.fresh(4).model.bert.embeddings.word_embeddings.weight.any()
