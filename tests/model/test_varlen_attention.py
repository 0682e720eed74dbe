"""Torch's kernel for rows of unequal length is called rightly, and only for what it can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from varlen_kernel import CPU, LENGTHS, TOKENS, StandIn, attend, batch_of_all, inputs

from lorasweep.core.plans import AdapterPlan
from lorasweep.model import packed_attention as attention_module
from lorasweep.model import varlen_proof
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.model.row_attention import RowAttention
from lorasweep.model.row_buckets import make_buckets

# -- what it computes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_only", "window"), [(False, None), (False, 3), (False, 18), (True, None)]
)
def test_output_and_gradients_are_those_of_the_buckets(use_kernel, first_only, window):
    kernel = use_kernel(types=(torch.float32,))
    given = inputs(first_only, torch.float32)
    plain = RowAttention.apply(*given, 0.5, make_buckets(LENGTHS, CPU), None, window)
    found = attend(batch_of_all(), given, scaling=0.5, sliding_window=window)
    last = kernel.calls[-1]
    assert last["max_k"] == 40
    assert last["max_q"] == (1 if first_only else 40)
    assert last["num_splits"] == 1
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    for expected, one in zip(
        (plain, *torch.autograd.grad(plain, given, upstream)),
        (found, *torch.autograd.grad(found, given, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_one_query_a_row_with_a_window_goes_by_the_buckets(use_kernel):
    kernel = use_kernel(types=(torch.float32,))
    given = inputs(True, torch.float32)
    plain = RowAttention.apply(*given, 0.5, make_buckets(LENGTHS, CPU), None, 5)
    found = attend(batch_of_all(), given, scaling=0.5, sliding_window=5)
    assert torch.equal(found, plain)
    assert not kernel.calls


def test_strides_that_the_kernel_refuses_are_straightened(use_kernel):
    use_kernel(types=(torch.float32,))
    given = inputs(False, torch.float32)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    assert turned[0].stride(-1) != 1
    expected = attend(batch_of_all(), given, scaling=0.5)
    torch.testing.assert_close(attend(batch_of_all(), turned, scaling=0.5), expected)


def test_gradients_are_summed_in_one_order_and_torch_is_left_as_it_was(use_kernel):
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(
                (
                    torch.get_deterministic_debug_mode(),
                    torch.utils.deterministic.fill_uninitialized_memory,
                )
            )
            return grad

    class Watching(StandIn):
        def attend(self, *given):
            return Watched.apply(super().attend(*given))

    seen: list[tuple[int, bool]] = []
    use_kernel(Watching())
    given = inputs(False, torch.bfloat16)
    out = attend(batch_of_all(), given, scaling=0.5)
    seen.clear()
    before = (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    out.sum().backward()
    assert seen == [(2, False)]
    assert before == (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_without_gradients_nothing_is_kept(use_kernel):
    use_kernel()
    with torch.no_grad():
        found = attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5)
    assert found.grad_fn is None


# -- where it is used ------------------------------------------------------------------


def test_what_it_cannot_do_goes_the_old_way(use_kernel):
    kernel = use_kernel()
    low = inputs(False, torch.bfloat16)
    attend(batch_of_all(), low, scaling=0.5)
    tried = len(kernel.calls)
    attend(batch_of_all(), low, scaling=0.5)
    assert len(kernel.calls) == tried + 1  # proven once
    training = batch_of_all(training=True)
    attend(training, low, scaling=0.5)
    assert len(kernel.calls) == tried + 2
    assert training._buckets is None
    for given, batch, how in (
        (low, training, {"dropout": 0.1}),
        (inputs(False, torch.float32), batch_of_all(), {}),
        (inputs(False, torch.bfloat16, width=12), batch_of_all(), {}),
        (inputs(False, torch.bfloat16, width=264), batch_of_all(), {}),
    ):
        attend(batch, given, scaling=0.5, **how)
        assert batch._buckets is not None
    assert len(kernel.calls) == tried + 2


def test_a_batch_with_filling_tokens_is_not_for_it(use_kernel, monkeypatch):
    kernel = use_kernel()
    asked = []
    buckets = SimpleNamespace(apply=lambda query, *_: asked.append(len(query)) or query)
    monkeypatch.setattr(attention_module, "RowAttention", buckets)
    batch = batch_of_all(filled=True)
    filling = batch.ids.shape[1] - TOKENS
    assert filling > 0
    given = [torch.cat([x, x[:filling]]) for x in inputs(False, torch.bfloat16)]
    attend(batch, given, scaling=0.5)
    assert asked == [TOKENS + filling]
    assert not kernel.calls


def test_dropout_that_is_off_outside_training_is_no_hindrance(use_kernel):
    kernel = use_kernel()
    attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5, dropout=0.1)
    assert kernel.calls[-1]["max_q"] == 40


def test_a_cpu_is_not_even_tried(monkeypatch):
    kernel = StandIn()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5)
    monkeypatch.setattr(attention_module, "kernels_for", lambda _: None)
    attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5)
    assert not kernel.calls


# -- the proof -------------------------------------------------------------------------


# -- whole models ----------------------------------------------------------------------


def logits_and_gradient(pack: PackedModel) -> tuple[Tensor, Tensor]:
    logits = pack.forward(batch_of_all(training=True), training=True)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(LENGTHS)) % 2).backward()
    pack.weights.collect_gradients()
    return logits.detach(), pack.weights.gradients.clone()


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_a_whole_model_computes_the_same(use_kernel, open_tiny, architecture, monkeypatch):
    base: Base = open_tiny(architecture, base_dropout=0.0)
    pack = PackedModel(fresh_classifier(base, 0), CPU)
    for seed in (1, 2):
        plan = AdapterPlan(rank=4, alpha=8.0, targets=("all-linear",))
        adapter = attach(fresh_classifier(base, seed), plan, seed)
        pack.add_lane(adapter, LaneSettings(2.0, 0.0))
    with torch.no_grad():
        pack.weights.weights.add_(0.05)  # B starts at zero, and A would have no gradient
    kernel = use_kernel(types=(torch.float32,))
    found = logits_and_gradient(pack)
    assert (kernel.calls[-1]["max_q"] == 1) == (architecture != "modernbert")  # the last layer
    windows = {call["window_size"] for call in kernel.calls}
    assert (len(windows) == 2) == (architecture == "modernbert")
    monkeypatch.setattr(varlen_proof, "_DEVICES", frozenset())
    kernel.calls.clear()
    expected = logits_and_gradient(pack)
    assert not kernel.calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert float(expected[1].abs().max()) > 1e-3
