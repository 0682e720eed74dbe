"""Where LoRA attaches, for every architecture, and the sentences where it can't."""

from __future__ import annotations

import json

import pytest
import torch

from lorasweep.core.errors import ModelError
from lorasweep.core.plans import AdapterPlan
from lorasweep.model.adapter import (
    adapted_modules,
    attach,
    check_targets,
    count_parameters,
    skeleton,
)
from lorasweep.model.base import fresh_classifier
from lorasweep.model.checkpoint import save_adapter

# Last parts of the names that "auto" adapts in each layer.
AUTO = {
    "albert": {"query", "value"},
    "bert": {"query", "value"},
    "camembert": {"query", "value"},
    "deberta": {"in_proj"},
    "deberta-v2": {"query_proj", "value_proj"},
    "distilbert": {"q_lin", "v_lin"},
    "electra": {"query", "value"},
    "modernbert": {"Wqkv"},
    "mpnet": {"q", "v"},
    "roberta": {"query", "value"},
    "xlm-roberta": {"query", "value"},
    "xlnet": {"layer_1", "layer_2"},
}


def plan(*targets, top_layers=None, rank=2):
    return AdapterPlan(rank, 4.0, 0.0, targets or ("auto",), top_layers)


def built(base, adapter):
    return attach(fresh_classifier(base, 0), adapter, 0)


@pytest.mark.parametrize("architecture", AUTO)
def test_auto_adapts_query_and_value_of_every_layer(architecture, open_tiny):
    names = adapted_modules(built(open_tiny(architecture), plan()))
    assert {name.rpartition(".")[2] for name in names} == AUTO[architecture]
    layers = 1 if architecture == "albert" else 2  # ALBERT's layers share their weights
    assert len(names) == layers * len(AUTO[architecture])


@pytest.mark.parametrize("architecture", AUTO)
def test_all_linear_is_every_linear_layer_but_the_head(architecture, open_tiny):
    base = open_tiny(architecture)
    fresh = fresh_classifier(base, 0)
    prefix = fresh.model.base_model_prefix
    expected = [
        name
        for name, module in fresh.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(f"{prefix}.")
    ]
    assert list(adapted_modules(attach(fresh, plan("all-linear"), 0))) == expected
    assert len(expected) > len(AUTO[architecture])


@pytest.mark.parametrize("architecture", sorted(set(AUTO) - {"albert"}))
def test_top_layers_adapts_the_last_ones_only(architecture, open_tiny):
    base = open_tiny(architecture)
    whole = adapted_modules(built(base, plan()))
    top = adapted_modules(built(base, plan(top_layers=1)))
    assert set(top) < set(whole)
    assert len(top) * 2 == len(whole)
    assert all(".1." in name for name in top)
    assert adapted_modules(built(base, plan(top_layers=2))) == whole


def test_names_are_matched_by_their_end_or_in_full(open_tiny):
    base = open_tiny()
    full = "bert.encoder.layer.1.attention.self.key"
    assert adapted_modules(built(base, plan(full))) == (full,)
    names = adapted_modules(built(base, plan("attention.output.dense", "key")))
    assert len(names) == 4


def test_exactly_the_adapter_the_new_modules_and_the_head_are_trained(open_tiny):
    base = open_tiny("deberta-v2")
    model = built(base, plan(rank=3))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in n or "pooler.modules" in n or "classifier.modules" in n for n in trained)
    lora = 2 * 2 * (3 * 32 + 32 * 3)
    pooler, classifier = 32 * 32 + 32, 32 * 2 + 2
    body = sum(
        value.numel()
        for name, value in fresh_classifier(base, 0).model.named_parameters()
        if name.startswith("deberta.")
    )
    assert count_parameters(model) == (
        lora + pooler + classifier,
        body + lora + pooler + classifier,
    )


def test_rank_alpha_and_dropout_arrive_and_each_model_has_its_own_configuration(open_tiny):
    base = open_tiny()
    first = built(base, AdapterPlan(4, 12.0, 0.25))
    second = built(base, AdapterPlan(2, 1.0, 0.0))
    layer = first.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    assert (layer.r["default"], layer.scaling["default"]) == (4, 3.0)
    assert layer.lora_dropout["default"].p == 0.25
    assert first.peft_config["default"] is not second.peft_config["default"]


def test_the_adapter_is_a_function_of_its_seed_alone(open_tiny):
    base = open_tiny()
    torch.manual_seed(1)
    one = attach(fresh_classifier(base, 0), plan(), 5).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    same = attach(fresh_classifier(base, 0), plan(), 5).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    other = attach(fresh_classifier(base, 0), plan(), 6).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    assert all(not one[n].any() for n in one if "lora_B" in n)


def test_adapter_config_is_readable(open_tiny, tmp_path):
    base = open_tiny("distilbert")
    save_adapter(built(base, plan()), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_lin", "v_lin"]
    assert config["modules_to_save"] == ["pre_classifier", "classifier", "score"]
    assert config["base_model_name_or_path"] == base.location
    save_adapter(built(base, plan(top_layers=1)), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == [
        "distilbert.transformer.layer.1.attention.q_lin",
        "distilbert.transformer.layer.1.attention.v_lin",
    ]


def test_targets_that_match_nothing_are_told_all_at_once_with_what_there_is(open_tiny):
    with pytest.raises(ModelError) as caught:
        check_targets(
            open_tiny(),
            [plan("qurey", "value"), plan("q_lin"), plan("classifier"), plan(), plan("qurey")],
        )
    sentences = [str(problem) for problem in caught.value.problems]
    assert len(sentences) == 3
    assert sentences[0].startswith("lora.targets qurey: matches no linear module of bert.")
    assert "Did you mean query? It has query, key, value, dense." in sentences[0]
    assert "Did you mean" not in sentences[1]
    assert "can't adapt: not linear, or part of the head" in sentences[2]


def test_more_top_layers_than_there_are_is_a_sentence(open_tiny):
    base = open_tiny()
    check_targets(base, [plan(top_layers=1), plan("all-linear", top_layers=2)])
    with pytest.raises(ModelError, match=r"top_layers: must be at most 2, .* of this bert, got 3"):
        check_targets(base, [plan(top_layers=3)])
    with pytest.raises(ModelError, match="share one set of weights"):
        check_targets(open_tiny("albert"), [plan(top_layers=2)])
    with pytest.raises(ModelError, match="match nothing in the top 1 layers"):
        check_targets(base, [plan("bert.encoder.layer.0.attention.self.key", top_layers=1)])


def test_checking_loads_no_weights(open_tiny):
    assert {value.device.type for value in skeleton(open_tiny()).parameters()} == {"meta"}


def test_a_head_that_is_not_new_is_trained_all_the_same(open_tiny, tmp_path, tiny_base_folder):
    import shutil

    from lorasweep.model.base import open_base
    from lorasweep.spec.schema import ModelSpec

    folder = shutil.copytree(tiny_base_folder("xlnet"), tmp_path / "tuned")
    fresh_classifier(open_tiny("xlnet"), 0).model.save_pretrained(folder)
    base = open_base(ModelSpec(name=str(folder), max_length=32), ("no", "yes"))
    fresh = fresh_classifier(base, 0)
    assert fresh.new_modules == ()
    trained = [n for n, v in attach(fresh, plan(), 0).named_parameters() if v.requires_grad]
    assert any("sequence_summary" in name for name in trained)
    assert any("logits_proj" in name for name in trained)
