"""A frozen linear layer gives what torch's gives, whoever adds its bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorasweep.model import frozen_linear as module
from lorasweep.model.frozen_linear import frozen_linear


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return numbers(3, 7, 16, seed=0), numbers(24, 16, seed=1), numbers(24, seed=2)


def test_this_torch_adds_a_bias_inside_the_product():
    assert module._has_joined_product()


def test_value_and_gradient_are_those_of_torch(layer):
    x, weight, bias = layer
    x.requires_grad_()
    found, plain = frozen_linear(x, weight, bias), F.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    # Rounded once where torch may round twice, so never further from the truth.
    assert (found.double() - exact).abs().max() <= (plain.double() - exact).abs().max()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-8)
    upstream = numbers(3, 7, 24, seed=3)
    gradients = (torch.autograd.grad(y, x, upstream)[0] for y in (found, plain))
    torch.testing.assert_close(*gradients, rtol=0, atol=2**-6)


def test_without_a_gradient_there_is_no_graph(layer):
    x, weight, bias = layer
    assert frozen_linear(x, weight, bias).grad_fn is None
    with torch.no_grad():
        assert frozen_linear(x.requires_grad_(), weight, bias).grad_fn is None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_that_product_adds_the_bias_apart(layer, error, monkeypatch):
    def missing(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(module, "_joined", missing)
    monkeypatch.setattr(module, "_has_joined_product", module._has_joined_product.__wrapped__)
    assert torch.equal(frozen_linear(*layer), F.linear(*layer))


def test_a_product_that_forgets_its_bias_is_not_used(layer, monkeypatch):
    monkeypatch.setattr(module, "_joined", lambda x, weight, _: F.linear(x, weight))
    monkeypatch.setattr(module, "_has_joined_product", module._has_joined_product.__wrapped__)
    assert torch.equal(frozen_linear(*layer), F.linear(*layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_torchs(dtype, layer, monkeypatch):
    monkeypatch.setattr(module, "_joined", None)
    given = [each.to(dtype) for each in layer]
    assert torch.equal(frozen_linear(*given), F.linear(*given))
