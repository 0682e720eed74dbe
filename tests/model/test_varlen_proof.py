"""Torch's kernel for rows of unequal length is trusted only after a proof."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen
from varlen_kernel import (
    BFLOAT16_BY_THE_KERNEL,
    CPU,
    LENGTHS,
    DefaultScale,
    FailsAtFirst,
    IgnoresKeyRows,
    KeyWithoutGradient,
    NeighbourLeaks,
    NotANumber,
    NoWindow,
    OldArguments,
    Raises,
    RefusesSplits,
    StandIn,
    Unsteady,
    WiderWindow,
    WrongKeyGradient,
    attend,
    batch_of_all,
    inputs,
    starts,
)

from lorasweep.model import varlen_proof
from lorasweep.model.row_attention import RowAttention
from lorasweep.model.row_buckets import make_buckets
from lorasweep.model.varlen_attention import varlen_attention
from lorasweep.model.varlen_proof import proven_options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width", "window"), [(2, 16, None), (3, 64, 17), (1, 256, 160)])
def test_a_kernel_that_rounds_as_it_must_is_proven(use_kernel, caplog, dtype, heads, width, window):
    kernel = use_kernel()
    assert proven_options(CPU, dtype, heads, width, window) == {"num_splits": 1}
    assert not caplog.records
    longest = 320 if window == 160 else 261  # a window must have something to hide
    assert {call["max_k"] for call in kernel.calls} == {longest}
    assert {call["max_q"] for call in kernel.calls} == ({1, 261} if window is None else {longest})


def test_the_proof_leaves_torchs_random_numbers_alone(use_kernel):
    use_kernel()
    before = torch.get_rng_state()
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_proof_works_where_gradients_are_off(use_kernel):
    use_kernel()
    with torch.no_grad():
        assert proven_options(*BFLOAT16_BY_THE_KERNEL, None)


def test_a_build_that_refuses_to_be_told_of_splits_is_not_told(use_kernel):
    use_kernel(RefusesSplits())
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None) == {}
    assert attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5).isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "window", "said"),
    [
        (IgnoresKeyRows, None, "its output is off by"),
        (DefaultScale, None, "its output is off by"),
        (WiderWindow, 65, "its output is off by"),
        (NoWindow, 150, "its output is off by"),
        (WrongKeyGradient, None, "its gradient of keys is off by"),
        (NotANumber, None, "its output is off by nan"),
        (NeighbourLeaks, None, "changes from call to call, or with another row"),
        (Unsteady, None, "changes from call to call, or with another row"),
        (KeyWithoutGradient, None, "not have been used in the graph"),
        (Raises, None, "RuntimeError: FlashAttention only supports Ampere"),
        (OldArguments, None, "TypeError: "),
    ],
)
def test_a_kernel_that_fails_the_proof_is_not_used(use_kernel, caplog, kernel, window, said):
    made = use_kernel(kernel())
    given = inputs(False, torch.bfloat16)
    plain = RowAttention.apply(*given, 0.5, make_buckets(LENGTHS, CPU), None, window)
    assert torch.equal(attend(batch_of_all(), given, scaling=0.5, sliding_window=window), plain)
    asked = len(made.calls)
    assert torch.equal(attend(batch_of_all(), given, scaling=0.5, sliding_window=window), plain)
    assert len(made.calls) == asked
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert said in message
    assert "is not used on cpu (bfloat16, 3 × 16)" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_lack_of_memory_or_a_dead_device_during_the_proof_is_no_verdict(use_kernel, kind):
    use_kernel(FailsAtFirst(kind("CUDA error: something")))
    with pytest.raises(kind):
        proven_options(*BFLOAT16_BY_THE_KERNEL, None)
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None) == {"num_splits": 1}


def test_a_torch_without_the_kernel_goes_by_the_buckets(use_kernel, caplog, monkeypatch):
    use_kernel()
    monkeypatch.delattr(varlen, "varlen_attn")
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None) is None
    assert "ImportError" in caplog.text


# -- the real one ----------------------------------------------------------------------


def test_the_real_kernel_takes_the_arguments_that_it_is_given():
    found = inspect.signature(varlen.varlen_attn).parameters
    ours = dict(list(inspect.signature(StandIn.__call__).parameters.items())[1:])
    for name, parameter in ours.items():
        assert (found[name].kind, found[name].default) == (parameter.kind, parameter.default)
    for name in found.keys() - ours.keys():  # new ones may come, but not be called for
        assert found[name].default is not inspect.Parameter.empty


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("first_only", [False, True])
def test_the_real_kernel_gives_the_shapes_that_are_wanted(window, first_only):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = [
            mode.from_tensor(x.detach()).to("meta").requires_grad_()
            for x in inputs(first_only, torch.bfloat16)
        ]
        at = mode.from_tensor(starts()).to("meta")
        out = varlen_attention(*given, 0.5, at, 40, window, {"num_splits": 1})
        assert (out.shape, out.dtype) == (given[0].shape, torch.bfloat16)
        gradients = torch.autograd.grad(out, given, torch.empty_like(out))
    assert [x.shape for x in gradients] == [x.shape for x in given]


def test_the_real_kernel_fails_the_proof_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr(varlen_proof, "_DEVICES", frozenset({"cpu"}))
    varlen_proof._tried.cache_clear()
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None) is None
    varlen_proof._tried.cache_clear()
    assert "NotImplementedError: Could not run 'aten::_flash_attention_forward'" in caplog.text
