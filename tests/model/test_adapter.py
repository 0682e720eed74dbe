"""What of a classifier is trained whole, where it brings a head of its own along."""

from __future__ import annotations

import shutil

import pytest
import torch

from lorasweep.core.errors import ModelError
from lorasweep.core.plans import AdapterPlan
from lorasweep.model import adapter
from lorasweep.model.adapter import adapted_modules, attach, trained_whole
from lorasweep.model.base import fresh_classifier, open_base
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.spec.schema import ModelSpec


def test_peft_taking_more_than_what_was_meant_is_refused(tiny_base_folder, monkeypatch):
    """It finds modules by the ends of their names."""
    base = open_base(ModelSpec(name=str(tiny_base_folder("bert")), max_length=32), ("no", "yes"))
    first = "bert.encoder.layer.0.attention.self.query"
    monkeypatch.setattr(adapter, "short_names", lambda names, modules: ["query"])
    with pytest.raises(ModelError, match="PEFT attached to other modules than meant"):
        attach(fresh_classifier(base, 0), AdapterPlan(2, 4.0, targets=(first,)), 0)


@pytest.mark.parametrize(
    ("architecture", "new", "whole"),
    [
        ("bert", ("classifier",), ("classifier",)),
        ("distilbert", ("classifier",), ("pre_classifier", "classifier")),
        ("roberta", ("classifier.out_proj",), ("classifier",)),
        ("electra", ("classifier.out_proj",), ("classifier",)),
    ],
)
def test_a_head_made_for_other_labels_is_trained_with_what_lies_about_its_new_part(
    architecture, new, whole, tiny_base_folder, tmp_path
):
    folder = tmp_path / "three"
    shutil.copytree(tiny_base_folder(architecture), folder)
    spec = ModelSpec(name=str(folder), max_length=32)
    fresh_classifier(open_base(spec, ("a", "b", "c")), 5).model.save_pretrained(folder)

    fresh = fresh_classifier(open_base(spec, ("no", "yes")), 6)
    assert fresh.new_modules == new
    assert trained_whole(fresh) == whole
    model = attach(fresh, AdapterPlan(2, 4.0), 0)  # sees to it that PEFT trains the same
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all(any(f".{part}." in name for name in trained) for part in whole)
    assert adapted_modules(model)

    pack = PackedModel(fresh_classifier(fresh.base, 6), torch.device("cpu"))
    assert pack.add_lane(model, LaneSettings(2.0, 0.0)) == 0
