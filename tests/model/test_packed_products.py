"""The packed model's own arithmetic, held to plain loops, to gradcheck, and to PEFT."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import PACKED
from lane_numbers import SPANS, numbers
from torch import nn
from transformers import AutoConfig, AutoModel

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.errors import ModelError
from lorasweep.core.plans import AdapterPlan
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier, open_base
from lorasweep.model.frozen_linear import FrozenLinear
from lorasweep.model.lane_adapter import trained_parameters
from lorasweep.model.packed_attention import packed_attention
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_dropout import Mask, rate_byte
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.model.packed_modules import AdaptableLinear
from lorasweep.model.packed_products import Adapting, adapted_linear, lane_linear
from lorasweep.model.row_attention import AttentionDropout, RowAttention
from lorasweep.model.row_buckets import bucket_bounds, make_buckets
from lorasweep.model.scoring import pad_rows, predict_logits
from lorasweep.spec.schema import ModelSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_the_adapted_linear_layer(dropout, biased):
    frozen = FrozenLinear(nn.Linear(6, 5, bias=biased).double())
    streams = torch.arange(9) * 7919
    mask = Mask(streams, 1, rate_byte(dropout)) if dropout else None
    scaling = torch.rand(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def layer(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return adapted_linear(x, down, up, frozen, Adapting(SPANS, scaling, mask))

    inputs = numbers(9, 6), numbers(4, 2, 6, seed=1), numbers(4, 5, 2, seed=2)
    assert torch.autograd.gradcheck(layer, [x.requires_grad_() for x in inputs])


def test_gradients_of_lanes_own_linear_layers():
    inputs = numbers(9, 6), numbers(4, 3, 6, seed=1), numbers(4, 3, seed=2)

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return lane_linear(x, weight, bias, SPANS)

    assert torch.autograd.gradcheck(layer, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_of_attention(first_only, window, dropout):
    lengths = np.array([4, 1, 5, 4, 2])
    buckets = make_buckets(lengths, CPU)
    masks = AttentionDropout(torch.arange(16) * 31, 3, dropout) if dropout else None
    query = numbers(5 if first_only else 16, 2, 3)

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return RowAttention.apply(*inputs, 0.7, buckets, masks, window)

    inputs = query, numbers(16, 2, 3, seed=1), numbers(16, 2, 3, seed=2)
    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_torchs_own_inside_each_row(window):
    lengths = np.array([7, 1, 6, 12, 2, 7])
    buckets = make_buckets(lengths, CPU)
    query, key, value = (numbers(35, 2, 4, seed=seed) for seed in range(3))
    found = RowAttention.apply(query, key, value, 0.5, buckets, None, window)
    starts = np.cumsum(lengths) - lengths
    firsts = RowAttention.apply(query[starts], key, value, 0.5, buckets, None, window)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        q, k, v = (x[start : start + length].transpose(0, 1) for x in (query, key, value))
        place = torch.arange(length)
        seen = (place[:, None] - place[None, :]).abs() < (window or 100)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5)
        torch.testing.assert_close(found[start : start + length], expected.transpose(0, 1))
        torch.testing.assert_close(firsts[row], expected[:, 0])


def test_buckets_hold_every_token_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    buckets = make_buckets(lengths, CPU)
    assert torch.equal(buckets.token[buckets.place], torch.arange(lengths.sum()))
    assert sum(bucket.places for bucket in buckets.each) == len(buckets.token)
    assert lengths.sum() / len(buckets.token) > 0.92
    bounds = bucket_bounds(np.sort(lengths)[::-1])
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 200
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("architecture", PACKED)
def test_float64_gradients_are_pefts_own(architecture, open_tiny, encode):
    base = open_tiny(architecture, base_dropout=0.0)
    assert_gradients_are_pefts(base, encode(base))


@pytest.mark.parametrize(
    "kinds",
    [{"share_att_key": False}, {"pos_att_type": ["c2p"]}, {"pos_att_type": ["p2c"]}],
    ids=str,
)
def test_so_they_are_with_other_kinds_of_relative_positions(
    kinds, tiny_base_folder, tmp_path, encode
):
    """LoRA on positions' own projections included."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder("deberta-v2"), folder)
    config = AutoConfig.from_pretrained(folder)
    for name, value in kinds.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    spec = ModelSpec(name=str(folder), max_length=64, base_dropout=0.0)
    base = open_base(spec, ("no", "yes"))
    assert_gradients_are_pefts(base, encode(base))


def assert_gradients_are_pefts(base: Base, split: EncodedSplit) -> None:
    """Whole model, three adapters at once, against PEFT one after another."""
    pack = PackedModel(fresh_classifier(base, 0), CPU, torch.float64)
    plans = [AdapterPlan(2, 4.0), AdapterPlan(8, 4.0, targets=("all-linear",)), AdapterPlan(3, 9.0)]
    models = []
    for seed, plan in enumerate(plans):
        model = attach(fresh_classifier(base, seed), plan, seed).double()
        for name, parameter, _ in trained_parameters(model):
            if name.endswith("lora_B"):  # it starts at zero, and hides the gradient of A
                parameter.data = numbers(*parameter.shape, seed=seed) * 0.3
        pack.add_lane(model, LaneSettings(plan.scaling, 0.0))
        models.append(model)
    rows = [np.array([0, 1, 2]), np.array([6]), np.array([3, 4, 5, 1])]
    batch = lay_out(split, [LaneRows(chosen) for chosen in rows], CPU, training=True)
    logits = pack.forward(batch, training=True)
    # float32, as trials have them, would hide all that is beyond it.
    weights = torch.tensor([1 / len(c) for c in rows for _ in c], dtype=torch.float64)
    torch.testing.assert_close(batch.row_weight.double(), weights, rtol=1e-7, atol=0)
    losses = F.cross_entropy(logits, batch.labels, reduction="none") * weights
    losses.sum().backward()
    pack.weights.collect_gradients()
    at = 0
    for lane, (model, chosen) in enumerate(zip(models, rows, strict=True)):
        model.eval()
        padded = pad_rows(split, chosen, base.pad_id)
        expected = model(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
        ).logits
        torch.testing.assert_close(logits[at : at + len(chosen)], expected, rtol=1e-9, atol=1e-12)
        at += len(chosen)
        F.cross_entropy(expected, padded["labels"]).backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.requires_grad]
        )
        torch.testing.assert_close(pack.weights.gradient_norms()[lane], norm, rtol=1e-9, atol=0)
        for name, parameter, _ in trained_parameters(model):
            found = pack.weights.gradient(name)[lane]
            corner = tuple(slice(n) for n in parameter.shape)
            torch.testing.assert_close(found[corner], parameter.grad, rtol=1e-9, atol=1e-12)
            # What pads a smaller rank has no gradient, so it stays zero for ever.
            padding = found.clone()
            padding[corner] = 0
            assert not padding.any()


@pytest.mark.parametrize("architecture", ["xlnet", "deberta", "mpnet"])
def test_an_architecture_that_a_pack_cannot_carry_is_refused_before_training(
    architecture, open_tiny
):
    base = open_tiny(architecture)
    with pytest.raises(ModelError, match=r"can't carry this .*: .*Use engine: trainer\."):
        PackedModel(fresh_classifier(base, 0), CPU)


def test_a_convolution_over_neighbouring_tokens_is_refused(tiny_base_folder, tmp_path):
    """DeBERTa-v2's larger models have one, which would reach into the next row."""
    folder = tmp_path / "convolving"
    shutil.copytree(tiny_base_folder("deberta-v2"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.conv_kernel_size = 3
    AutoModel.from_config(config).save_pretrained(folder)
    base = open_base(ModelSpec(name=str(folder), max_length=64), ("no", "yes"))
    with pytest.raises(ModelError, match=r"convolution over neighbouring.*Use engine: trainer\."):
        PackedModel(fresh_classifier(base, 0), CPU)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_pools_both_ways(pooling, open_tiny):
    base = open_tiny("modernbert")
    base.config.classifier_pooling = pooling
    pack = PackedModel(fresh_classifier(base, 0), CPU)  # proves itself
    assert pack.lanes == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_refused(kind, open_tiny):
    """They would be those of whichever neighbour has the longest row."""
    base = open_tiny("modernbert")
    fresh = fresh_classifier(base, 0)
    rotary = next(m for m in fresh.model.modules() if hasattr(m, "rope_type"))
    rotary.rope_type["full_attention"] = kind
    with pytest.raises(ModelError, match=rf"rotary positions \({kind}\) depend on the longest"):
        PackedModel(fresh, CPU)


@pytest.mark.parametrize("architecture", ["roberta", "bert"])
def test_a_padding_token_that_a_text_spells_out_is_numbered_as_in_the_plain_model(
    architecture, open_tiny
):
    """Tokenizers take it for the token, and RoBERTa leaves it out when it counts positions."""
    base = open_tiny(architecture)
    pad = base.pad_id
    rows = [[7, 9, pad, 8, 3, 11], [pad, pad, 6, 9], [9, 7, 8, 6, pad], [12, 9, 8]]
    split = EncodedSplit(
        name="spelt out",
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        labels=np.zeros(len(rows), dtype=np.int64),
    )
    plain = fresh_classifier(base, 0).model
    expected = predict_logits(plain, split, pad_id=pad, batch_size=2, device=CPU)
    pack = PackedModel(fresh_classifier(base, 0), CPU)
    model = attach(fresh_classifier(base, 0), AdapterPlan(2, 4.0), 0)  # B is 0: it adds nothing
    pack.add_lane(model, LaneSettings(2.0, 0.0))
    batch = lay_out(split, [LaneRows(np.arange(4))], CPU, training=False, filled=pack.filled)
    with torch.no_grad():
        found = pack.forward(batch, training=False).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_query_heads_that_share_key_heads_are_refused_before_anything_reads_them():
    query, key = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match="4 query heads share 2 key heads"):
        packed_attention(None, query, key, key, None)


@pytest.mark.parametrize("part", ["_replace_modules", "_place_hooks"])
def test_a_base_whose_code_is_another_than_expected_is_refused_and_no_crash(
    part, open_tiny, monkeypatch
):
    def unknown(self: PackedModel) -> None:
        raise AttributeError("'Encoder' object has no attribute 'final_norm'")

    monkeypatch.setattr(PackedModel, part, unknown)
    with pytest.raises(ModelError, match=r"no attribute 'final_norm'.*Use engine: trainer\."):
        PackedModel(fresh_classifier(open_tiny("bert"), 0), CPU)


def test_the_proof_can_fail(open_tiny, monkeypatch):
    monkeypatch.setattr(PackedModel, "_position_offset", lambda self: 1)
    with pytest.raises(ModelError, match="its logits would be off by"):
        PackedModel(fresh_classifier(open_tiny("bert"), 0), CPU)


@pytest.mark.parametrize(
    "architecture", ["bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert"]
)
@pytest.mark.parametrize("base_dropout", [0.0, 0.1])
def test_layers_below_the_first_adapted_one_are_computed_once(
    architecture, base_dropout, open_tiny, encode, monkeypatch
):
    base = open_tiny(architecture, base_dropout=base_dropout)
    split = encode(base)
    pack = PackedModel(fresh_classifier(base, 0), CPU)
    model = attach(fresh_classifier(base, 0), AdapterPlan(2, 4.0, top_layers=1), 0)
    pack.add_lane(model, LaneSettings(2.0, 0.0))
    rows = LaneRows(np.array([4, 1, 6]), key=5, step=3)
    ran = []
    lowest = next(m for n, m in pack.model.named_modules() if n.endswith(("layer.0", "layers.0")))
    inner = next(m for m in lowest.modules() if isinstance(m, AdaptableLinear))
    inner.register_forward_hook(lambda *_: ran.append(1))
    for training in (False, True):
        batch = lay_out(split, [rows], CPU, training=training)
        pack.shared.most_bytes = 0
        pack.shared.forget()
        plain = pack.forward(batch, training=training)
        assert ran
        pack.shared.most_bytes = 10**9
        torch.testing.assert_close(pack.forward(batch, training=training), plain)
        ran.clear()
        torch.testing.assert_close(pack.forward(batch, training=training), plain)
        assert bool(ran) == (training and base_dropout > 0)
        ran.clear()
    # A lane that adapts the lowest layer leaves nothing to share.
    other = attach(fresh_classifier(base, 1), AdapterPlan(2, 4.0), 1)
    pack.add_lane(other, LaneSettings(2.0, 0.0))
    pack.forward(lay_out(split, [rows, rows], CPU, training=False), training=False)
    assert ran
    ran.clear()
    pack.keep_lanes([0])
    batch = lay_out(split, [rows], CPU, training=False)
    pack.forward(batch, training=False)
    ran.clear()
    found = pack.forward(batch, training=False)
    assert not ran
    assert found.shape == (3, 2)
