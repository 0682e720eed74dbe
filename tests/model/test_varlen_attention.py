"""Torch's kernel for rows of unequal length: called rightly, and trusted only after a proof.

It runs on no CPU, so a stand-in takes its place: attention written out row by row, with the
arguments of the real one, and as strict about them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan
from lorasweep.model import packed_attention as attention_module
from lorasweep.model import varlen_proof
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.packed_attention import packed_attention
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.model.row_attention import RowAttention
from lorasweep.model.row_buckets import make_buckets
from lorasweep.model.varlen_attention import varlen_attention
from lorasweep.model.varlen_proof import proven_options

LENGTHS = np.array([7, 1, 26, 12, 2, 40, 17])
TOKENS = int(LENGTHS.sum())
CPU = torch.device("cpu")
BFLOAT16_BY_THE_KERNEL = (CPU, torch.bfloat16, 3, 16)


def flash_row(q: Tensor, k: Tensor, v: Tensor, scale: float, unseen: Tensor) -> Tensor:
    """One row as the real kernel rounds it: sums in float32, what is multiplied next in q's type.

    Args:
        q: ``(queries, heads, width)``.
        k: ``(keys, heads, width)``.
        v: As ``k``.
        scale: Of the scores.
        unseen: bool ``(queries, keys)``.
    """
    return FlashRow.apply(q, k, v, scale, unseen)


class FlashRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, unseen):
        wide = [x.float().transpose(0, 1) for x in (q, k, v)]
        scores = (wide[0] @ wide[1].transpose(1, 2) * scale).masked_fill(unseen, -torch.inf)
        weights = torch.softmax(scores, -1)
        out = (weights.to(q.dtype).float() @ wide[2]).transpose(0, 1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        *given, weights, out = ctx.saved_tensors
        q, k, v = (x.float().transpose(0, 1) for x in given)
        go = grad.float().transpose(0, 1)
        sums = (grad.float() * out.float()).sum(-1).transpose(0, 1).unsqueeze(-1)
        scores = (weights * (go @ v.transpose(1, 2) - sums)).to(grad.dtype).float() * ctx.scale
        rounded = weights.to(grad.dtype).float()
        found = (scores @ k, scores.transpose(1, 2) @ q, rounded.transpose(1, 2) @ go)
        return (*(x.transpose(0, 1).to(grad.dtype) for x in found), None, None)


@dataclass
class StandIn:
    """Does what ``varlen_attn`` does, on a CPU.

    Attributes:
        types: What it takes.
        calls: The arguments of each call, by name.
    """

    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    calls: list[dict] = field(default_factory=list)

    def __call__(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        self.calls.append({k: v for k, v in locals().items() if k != "self"})
        if query.dtype not in self.types:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        for x in (query, key, value):
            assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
            assert x.shape[1:] == query.shape[1:]
            assert x.dtype == query.dtype
        assert query.shape[-1] % 8 == 0
        assert query.shape[-1] <= 256
        assert len(key) == len(value)
        for starts, tokens, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
            assert starts.device == query.device
            assert type(longest) is int
            assert starts[0] == 0
            assert starts[-1] == len(tokens)
            assert starts.diff().max() <= longest
        assert len(cu_seq_q) == len(cu_seq_k)
        assert type(window_size) is tuple
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        rows = []
        for row in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[row] : cu_seq_q[row + 1]]
            k, v = (x[cu_seq_k[row] : cu_seq_k[row + 1]] for x in (key, value))
            rows.append(flash_row(q, k, v, scale, self.unseen(len(q), len(k), window)))
        return torch.cat(rows)

    def unseen(self, queries: int, keys: int, window: tuple[int, int]) -> Tensor:
        """Counted from the row's end, where queries and keys are not as many."""
        ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
        left, right = window
        unseen = torch.zeros(queries, keys, dtype=torch.bool)
        if left >= 0:
            unseen |= ahead < -left
        if right >= 0:
            unseen |= ahead > right
        return unseen


@pytest.fixture
def use(monkeypatch) -> Callable[..., StandIn]:
    """Let a stand-in serve the CPU, instead of compiled attention."""

    def make(kernel=None, types=(torch.bfloat16, torch.float16)):
        kernel = StandIn(types) if kernel is None else kernel
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        monkeypatch.setattr(varlen_proof, "_DEVICES", frozenset({"cpu"}))
        monkeypatch.setattr(varlen_proof, "_TYPES", frozenset(types))
        if torch.float32 in types:  # then the buckets that it is held to round as much as it
            monkeypatch.setattr(varlen_proof, "_TOLERANCE", 100)
        monkeypatch.setattr(attention_module, "kernels_for", lambda _: None)
        varlen_proof._tried.cache_clear()
        return kernel

    yield make
    varlen_proof._tried.cache_clear()


def starts() -> Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(LENGTHS)).astype(np.int32))


def inputs(first_only: bool, dtype: torch.dtype, width: int = 16) -> list[Tensor]:
    """Query, key and value, ``(tokens, 3, width)`` as views of one wide product."""
    made = torch.randn(TOKENS, 3, 3, width, generator=torch.Generator().manual_seed(1))
    query, key, value = made.to(dtype).unbind(1)
    if first_only:
        query = query[starts()[:-1]]
    return [x.detach().requires_grad_() for x in (query, key, value)]


def split() -> EncodedSplit:
    rng = np.random.default_rng(3)
    return EncodedSplit(
        name="some",
        tokens=rng.integers(5, 90, TOKENS).astype(np.int32),
        offsets=np.append(0, np.cumsum(LENGTHS)).astype(np.int64),
        labels=np.arange(len(LENGTHS), dtype=np.int64) % 2,
    )


def batch_of_all(*, training: bool = False, filled: bool = False) -> PackedBatch:
    rows = [LaneRows(np.arange(4)), LaneRows(np.arange(4, 7))]
    return lay_out(split(), rows, CPU, training=training, filled=filled)


def attend(batch: PackedBatch, given: list[Tensor], **how: object) -> Tensor:
    """Attend as transformers asks for it."""
    module = SimpleNamespace(pack=SimpleNamespace(batch=batch), pack_key=77)
    laid = [x.transpose(0, 1).unsqueeze(0) for x in given]
    found, weights = packed_attention(module, *laid, None, **how)
    assert weights is None
    return found.squeeze(0)


# -- what it computes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_only", "window"), [(False, None), (False, 3), (False, 18), (True, None)]
)
def test_output_and_gradients_are_those_of_the_buckets(use, first_only, window):
    kernel = use(types=(torch.float32,))
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


def test_one_query_a_row_with_a_window_goes_by_the_buckets(use):
    kernel = use(types=(torch.float32,))
    given = inputs(True, torch.float32)
    plain = RowAttention.apply(*given, 0.5, make_buckets(LENGTHS, CPU), None, 5)
    found = attend(batch_of_all(), given, scaling=0.5, sliding_window=5)
    assert torch.equal(found, plain)
    assert not kernel.calls


def test_strides_that_the_kernel_refuses_are_straightened(use):
    use(types=(torch.float32,))
    given = inputs(False, torch.float32)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    assert turned[0].stride(-1) != 1
    expected = attend(batch_of_all(), given, scaling=0.5)
    torch.testing.assert_close(attend(batch_of_all(), turned, scaling=0.5), expected)


def test_gradients_are_summed_in_one_order_and_torch_is_left_as_it_was(use):
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
    use(Watching())
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


def test_without_gradients_nothing_is_kept(use):
    use()
    with torch.no_grad():
        found = attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5)
    assert found.grad_fn is None


# -- where it is used ------------------------------------------------------------------


def test_what_it_cannot_do_goes_the_old_way(use):
    kernel = use()
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


def test_a_batch_with_filling_tokens_is_not_for_it(use, monkeypatch):
    kernel = use()
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


def test_dropout_that_is_off_outside_training_is_no_hindrance(use):
    kernel = use()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width", "window"), [(2, 16, None), (3, 64, 17), (1, 256, 160)])
def test_a_kernel_that_rounds_as_it_must_is_proven(use, caplog, dtype, heads, width, window):
    kernel = use()
    caplog.set_level(logging.INFO, varlen_proof.__name__)
    assert proven_options(CPU, dtype, heads, width, window) == {"num_splits": 1}
    assert not caplog.records
    longest = 320 if window == 160 else 261  # a window must have something to hide
    assert {call["max_k"] for call in kernel.calls} == {longest}
    assert {call["max_q"] for call in kernel.calls} == ({1, 261} if window is None else {longest})


def test_the_proof_leaves_torchs_random_numbers_alone(use):
    use()
    before = torch.get_rng_state()
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_proof_works_where_gradients_are_off(use):
    use()
    with torch.no_grad():
        assert proven_options(*BFLOAT16_BY_THE_KERNEL, None)


class RefusesSplits(StandIn):
    def __call__(self, *given, **how):
        if "num_splits" in how:
            raise RuntimeError("num_splits is not supported on ROCm\nsecond line")
        return super().__call__(*given, **how)


def test_a_build_that_refuses_to_be_told_of_splits_is_not_told(use):
    use(RefusesSplits())
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None) == {}
    assert attend(batch_of_all(), inputs(False, torch.bfloat16), scaling=0.5).isfinite().all()


class IgnoresKeyRows(StandIn):
    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        nothing = torch.zeros(len(query), len(key), dtype=torch.bool)
        return flash_row(query, key, value, scale, nothing)


class DefaultScale(StandIn):
    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        scale = query.shape[-1] ** -0.5
        return super().attend(query, key, value, cu_seq_q, cu_seq_k, scale, window)


class WiderWindow(StandIn):
    def unseen(self, queries, keys, window):
        left, right = window
        return super().unseen(queries, keys, (left, right + 1 if right >= 0 else right))


class NoWindow(StandIn):
    def unseen(self, queries, keys, window):
        return super().unseen(queries, keys, (-1, -1))


class KeyWithoutGradient(StandIn):
    def attend(self, query, key, *others):
        return super().attend(query, key.detach(), *others)


class WrongKeyGradient(StandIn):
    def attend(self, query, key, *others):
        return super().attend(query, 2 * key - key.detach(), *others)


class NotANumber(StandIn):
    def attend(self, *given):
        found = super().attend(*given)
        return found + torch.where(torch.arange(len(found)) == 3, torch.nan, 0.0)[:, None, None]


class NeighbourLeaks(StandIn):
    """Multiplies what lies behind a row by zero, instead of leaving it alone."""

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        found = super().attend(query, key, value, cu_seq_q, cu_seq_k, scale, window)
        return found + 0 * value.roll(-1, 0).sum() if len(found) == len(value) else found


class Unsteady(StandIn):
    def attend(self, *given):
        found = super().attend(*given)
        return found * (1 + 0.004 * (len(self.calls) % 2))


class Raises(StandIn):
    def attend(self, *_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore of it")


class OldArguments(StandIn):
    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return super().__call__(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.mark.parametrize(
    ("kernel", "window", "level", "said"),
    [
        (IgnoresKeyRows, None, "WARNING", "its output is off by"),
        (DefaultScale, None, "WARNING", "its output is off by"),
        (WiderWindow, 65, "WARNING", "its output is off by"),
        (NoWindow, 150, "WARNING", "its output is off by"),
        (WrongKeyGradient, None, "WARNING", "its gradient of keys is off by"),
        (NotANumber, None, "WARNING", "its output is off by nan"),
        (NeighbourLeaks, None, "WARNING", "changes from call to call, or with another row"),
        (Unsteady, None, "WARNING", "changes from call to call, or with another row"),
        (KeyWithoutGradient, None, "INFO", "not have been used in the graph"),
        (Raises, None, "INFO", "RuntimeError: FlashAttention only supports Ampere"),
        (OldArguments, None, "INFO", "TypeError: "),
    ],
)
def test_a_kernel_that_fails_the_proof_is_not_used(use, caplog, kernel, window, level, said):
    made = use(kernel())
    caplog.set_level(logging.INFO, varlen_proof.__name__)
    given = inputs(False, torch.bfloat16)
    plain = RowAttention.apply(*given, 0.5, make_buckets(LENGTHS, CPU), None, window)
    assert torch.equal(attend(batch_of_all(), given, scaling=0.5, sliding_window=window), plain)
    asked = len(made.calls)
    assert torch.equal(attend(batch_of_all(), given, scaling=0.5, sliding_window=window), plain)
    assert len(made.calls) == asked
    (record,) = caplog.records
    assert record.levelname == level
    message = record.getMessage()
    assert said in message
    assert "is not used on cpu (bfloat16, 3 × 16)" in message
    assert "\n" not in message


def test_a_torch_without_the_kernel_goes_by_the_buckets(use, caplog, monkeypatch):
    use()
    monkeypatch.delattr(varlen, "varlen_attn")
    caplog.set_level(logging.INFO, varlen_proof.__name__)
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
    caplog.set_level(logging.INFO, varlen_proof.__name__)
    assert proven_options(*BFLOAT16_BY_THE_KERNEL, None) is None
    varlen_proof._tried.cache_clear()
    assert "NotImplementedError: Could not run 'aten::_flash_attention_forward'" in caplog.text


# -- whole models ----------------------------------------------------------------------


def logits_and_gradient(pack: PackedModel) -> tuple[Tensor, Tensor]:
    logits = pack.forward(batch_of_all(training=True), training=True)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(LENGTHS)) % 2).backward()
    pack.weights.collect_gradients()
    return logits.detach(), pack.weights.gradients.clone()


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_a_whole_model_computes_the_same(use, open_tiny, architecture, monkeypatch):
    base: Base = open_tiny(architecture, base_dropout=0.0)
    pack = PackedModel(fresh_classifier(base, 0), CPU)
    for seed in (1, 2):
        plan = AdapterPlan(rank=4, alpha=8.0, targets=("all-linear",))
        adapter = attach(fresh_classifier(base, seed), plan, seed)
        pack.add_lane(adapter, LaneSettings(2.0, 0.0))
    with torch.no_grad():
        pack.weights.weights.add_(0.05)  # B starts at zero, and A would have no gradient
    kernel = use(types=(torch.float32,))
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
