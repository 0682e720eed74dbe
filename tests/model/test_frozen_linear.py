"""A frozen layer's products are those of the layer, whether its weight was laid out or not."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from lane_numbers import numbers
from torch import nn

from lorasweep.core.plans import AdapterPlan
from lorasweep.model import frozen_linear
from lorasweep.model.adapter import attach
from lorasweep.model.base import fresh_classifier
from lorasweep.model.frozen_linear import FrozenLinear, lays_out
from lorasweep.model.packed_lora import LaneSettings, PackedModel

TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def forgetful():
    frozen_linear._proven.cache_clear()
    yield
    frozen_linear._proven.cache_clear()


def layer_of(dtype: torch.dtype, inside: int, outside: int, biased: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inside, outside, bias=biased).to(dtype).requires_grad_(False)


def held(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Rounded once, from a sum in float32."""
    apart, largest = (found.double() - exact).abs(), exact.abs().amax() if len(exact) else 0
    assert found.shape == exact.shape
    assert (apart <= torch.finfo(dtype).eps * exact.abs() + 2e-6 * largest).all()


def test_weights_are_laid_out_on_this_machine():
    assert all(lays_out(dtype) for dtype in TYPES)
    assert not lays_out(torch.float64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("inside", "outside"), [(384, 384), (384, 1536), (7, 5), (1, 3)])
@pytest.mark.parametrize("rows", [0, 1, 7, 1000])
def test_products_forth_and_back_are_those_of_the_layer(rows, inside, outside, biased, dtype):
    linear = layer_of(dtype, inside, outside, biased)
    x, grad = numbers(rows, inside, dtype=dtype), numbers(rows, outside, seed=1, dtype=dtype)
    forth = F.linear(x.double(), *(p.double() for p in linear.parameters()))
    back = grad.double() @ linear.weight.double()
    frozen = FrozenLinear(linear)
    for laid_out in (False, True):
        if laid_out:
            frozen.lay_out()
        assert (frozen.laid_out is not None) == laid_out
        found = frozen.product(x)
        assert found.dtype == dtype
        held(found, forth, dtype)
        held(frozen.product_back(grad), back, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_any_shape_goes_through_and_gradients_come_back(dtype):
    frozen = FrozenLinear(layer_of(dtype, 16, 24, True))
    x = numbers(16, 5, 3, dtype=dtype).permute(2, 1, 0).requires_grad_()
    plain = frozen(x)
    expected = torch.autograd.grad(plain.float().pow(2).sum(), x)[0]
    frozen.lay_out()
    found = frozen(x)
    assert found.shape == (3, 5, 24)
    held(found.detach(), plain.detach().double(), dtype)
    gradient = torch.autograd.grad(found.float().pow(2).sum(), x)[0]
    held(gradient, expected.double(), dtype)


def test_rows_apart_from_one_another_are_taken_where_they_lie():
    frozen = FrozenLinear(layer_of(torch.bfloat16, 16, 24, True))
    wide = numbers(50, 64, dtype=torch.bfloat16)
    frozen.lay_out()
    inside = wide[:, 16:32]
    assert torch.equal(frozen.product(inside), frozen.product(inside.contiguous()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_no_number_meets_another_rows(poison):
    frozen = FrozenLinear(layer_of(torch.bfloat16, 384, 384, True))
    frozen.lay_out()
    x = numbers(700, 384, dtype=torch.bfloat16)
    clean, clean_back = frozen.product(x), frozen.product_back(x)
    x[333] = poison
    others = torch.arange(700) != 333
    assert torch.equal(frozen.product(x)[others], clean[others])
    assert torch.equal(frozen.product_back(x)[others], clean_back[others])


def refuse(*_args: object) -> torch.Tensor:
    raise RuntimeError("no such operation\nmore of it")


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        (refuse, "RuntimeError: no such operation"),
        (lambda x, laid_out, bias: torch.zeros(len(x), 40), "their results are others"),
        (lambda x, laid_out, bias: torch.full((len(x), 40), torch.nan), "their results are others"),
    ],
)
@pytest.mark.usefixtures("forgetful")
def test_a_torch_that_multiplies_otherwise_is_not_trusted(instead, said, monkeypatch, caplog):
    monkeypatch.setattr(frozen_linear, "_multiplied", instead)
    frozen = FrozenLinear(layer_of(torch.float32, 16, 24, True))
    x = numbers(3, 16, dtype=torch.float32)
    expected = frozen.product(x)
    with caplog.at_level(logging.INFO, logger=frozen_linear.__name__):
        frozen.lay_out()
    assert f"laid out anew in each product: {said}" in caplog.text
    assert "more of it" not in caplog.text
    assert frozen.laid_out is None
    assert torch.equal(frozen.product(x), expected)


@pytest.mark.usefixtures("forgetful")
def test_a_lack_of_memory_says_nothing_about_the_operations(monkeypatch):
    def lacking(*_args: object) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(frozen_linear, "_multiplied", lacking)
        with pytest.raises(MemoryError):
            lays_out(torch.float32)
    assert lays_out(torch.float32)


def test_it_goes_on_without_onednn(monkeypatch):
    """A pack switches it off where it finds no room for its code."""
    frozen = FrozenLinear(layer_of(torch.bfloat16, 16, 24, True))
    x, grad = numbers(9, 16, dtype=torch.bfloat16), numbers(9, 24, dtype=torch.bfloat16)
    frozen.lay_out()
    expected = frozen.product(x), frozen.product_back(grad)
    monkeypatch.setattr(frozen_linear, "_multiplied", refuse)
    torch.backends.mkldnn.set_flags(False)
    try:
        found = frozen.product(x), frozen.product_back(grad)
        assert not lays_out(torch.bfloat16)
    finally:
        torch.backends.mkldnn.set_flags(True)
    for one, other in zip(found, expected, strict=True):
        held(one, other.double(), torch.bfloat16)
    with pytest.raises(RuntimeError, match="no such operation"):
        frozen.product(x)


def test_a_weight_that_changed_is_laid_out_again():
    linear = layer_of(torch.float32, 16, 24, False)
    frozen, x = FrozenLinear(linear), numbers(3, 16, dtype=torch.float32)
    frozen.lay_out()
    linear.weight *= 2
    before = frozen.product(x)
    frozen.lay_out()
    torch.testing.assert_close(frozen.product(x), 2 * before)


def test_two_threads_multiply_at_once():
    frozen = FrozenLinear(layer_of(torch.bfloat16, 384, 384, True))
    frozen.lay_out()
    inputs = [numbers(rows, 384, dtype=torch.bfloat16) for rows in (300, 301)]
    alone = [(frozen.product(x), frozen.product_back(x)) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            forth = list(pool.map(frozen.product, inputs))
            back = list(pool.map(frozen.product_back, inputs))
            for found, expected in zip(zip(forth, back, strict=True), alone, strict=True):
                assert all(map(torch.equal, found, expected))


def test_a_pack_lays_out_every_frozen_layer(open_tiny):
    base = open_tiny("bert")
    pack = PackedModel(fresh_classifier(base, 0), torch.device("cpu"))
    frozen = [module for module in pack.model.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) >= 6 * base.config.num_hidden_layers
    assert all(module.laid_out is not None for module in frozen)
    assert not any(module.weight.requires_grad for module in frozen)


def test_a_lanes_rank_is_known_to_its_products(open_tiny):
    base = open_tiny("bert")
    pack = PackedModel(fresh_classifier(base, 0), torch.device("cpu"))
    targets = {3: ("query",), 13: ("query", "value")}
    for rank, names in targets.items():
        model = attach(fresh_classifier(base, 0), AdapterPlan(rank, 4.0, targets=names), 0)
        pack.add_lane(model, LaneSettings(2.0, 0.0))
    ranks = {
        name.split(".")[-2]: pack.weights.first_sizes(name, range(2)).tolist()
        for name in pack.weights.blocks
        if name.endswith("lora_A")
    }
    assert ranks == {"query": [8, 16], "value": [0, 16]}  # blocks of eight
    name = next(name for name in pack.weights.blocks if name.endswith("query.lora_A"))
    assert pack.weights.first_sizes(name, range(1, 2)).tolist() == [16]
    pack.keep_lanes([1])
    assert pack.weights.first_sizes(name, range(1)).tolist() == [16]
