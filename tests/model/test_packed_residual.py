"""A block's end in one pass is what torch does in four."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorasweep.model.base import fresh_classifier
from lorasweep.model.kernel_library import Dropping, Norm
from lorasweep.model.packed_dropout import Mask, kept_scale, rate_byte
from lorasweep.model.packed_lora import PackedModel
from lorasweep.model.packed_residual import ResidualEnd, ResidualNorm

CPU = torch.device("cpu")
ENTRIES = 23
# Where bfloat16 rounds to another neighbour, the norm makes one unit in the last place of it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [5, 16, 37, 384])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_norm_of_a_residual_and_its_gradients_are_those_of_torch(dtype, width, rate):
    x, residual, upstream = (drawn(ENTRIES, width, seed=n, dtype=dtype) for n in range(3))
    gain, shift = (drawn(width, seed=n, dtype=dtype) for n in (3, 4))
    streams, scale = torch.arange(ENTRIES) * 7919 + 3, kept_scale(rate)
    norm = Norm(gain, shift, 1e-6)
    dropping = Dropping(streams, 5, rate_byte(rate), scale) if rate else None

    exact = [each.double().requires_grad_() for each in (x, residual)]
    kept = Mask(streams, 5, rate_byte(rate)).applied(torch.ones_like(x)) if rate else 1.0
    plain = exact[1] + exact[0] * kept * scale
    # The sum is rounded to the type in between, as torch's own addition rounds it.
    plain = plain + (plain.to(dtype).double() - plain).detach()
    plain = F.layer_norm(plain, (width,), gain.double(), shift.double(), 1e-6)

    given = [each.requires_grad_() for each in (x, residual)]
    found = ResidualNorm.apply(*given, norm, dropping)
    assert found.dtype == dtype
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), plain, **close)
    for one, other in zip(
        torch.autograd.grad(found, given, upstream),
        torch.autograd.grad(plain, exact, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=2 * close["rtol"], atol=close["atol"])
    if rate:
        assert (kept == 0).any()


def test_a_nan_stays_in_its_entry():
    x, residual = (drawn(ENTRIES, 8, seed=n, dtype=torch.float32) for n in range(2))
    norm = Norm(torch.ones(8), torch.zeros(8), 1e-6)
    clean = ResidualNorm.apply(x, residual, norm, None)
    x[4, 2] = torch.nan
    given = [each.requires_grad_() for each in (x, residual)]
    found = ResidualNorm.apply(*given, norm, None)
    others = [entry for entry in range(ENTRIES) if entry != 4]
    assert torch.equal(found[others], clean[others])
    assert found[4].isnan().all()
    for gradient in torch.autograd.grad(found, given, torch.ones_like(found)):
        assert gradient[others].isfinite().all()
        assert gradient[4].isnan().all()


@pytest.mark.parametrize(
    ("architecture", "ends"), [("bert", 4), ("roberta", 4), ("electra", 4), ("distilbert", 0)]
)
def test_which_layers_end_in_one_pass(architecture, ends, open_tiny):
    pack = PackedModel(fresh_classifier(open_tiny(architecture), 0), CPU)
    layers = pack.model.config.num_hidden_layers
    found = [module for module in pack.model.modules() if isinstance(module, ResidualEnd)]
    assert len(found) == ends * layers // 2
