"""The compiled loops do what torch's operations do, and their absence is no failure."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from fenced import at_the_end_of_memory

from lorasweep.model import kernel_build, kernels, packed_attention
from lorasweep.model.kernel_build import KernelBuildError, built_kernels
from lorasweep.model.kernel_library import Attending, Kernels, RowPlaces
from lorasweep.model.kernels import kernels_for, loaded_kernels, why_no_kernels
from lorasweep.model.packed_attention import CompiledAttention
from lorasweep.model.packed_dropout import Mask, kept_bits, masked
from lorasweep.model.row_attention import AttentionDropout, RowAttention
from lorasweep.model.row_buckets import make_buckets

# One takes more than two blocks of 64.
LENGTHS = np.array([7, 1, 26, 12, 2, 40, 131, 17])
TOKENS = int(LENGTHS.sum())
# bfloat16 keeps 8 bits: the plain path rounds scores and weights to it, the compiled one weights.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def test_this_machine_has_compiled_kernels():
    assert loaded_kernels() is not None
    assert why_no_kernels() is None
    assert kernels_for(torch.zeros(1)) is loaded_kernels()
    assert kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    assert kernels_for(torch.zeros(1, device="meta")) is None


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [5, 8, 37, 384])
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_drop_keeps_bit_by_bit_what_the_definition_keeps(dtype, width, scale):
    x = torch.randn(50, width).to(dtype)
    x[3] = torch.nan
    streams = torch.arange(50) * 7919 - 5
    rates = torch.arange(50, dtype=torch.int16).unsqueeze(1) * 5
    for rate in (40, rates):
        expected = masked(x, kept_bits(streams, 9, width, rate, dtype)).mul_(scale)
        mask = Mask(streams, 9, rate)
        found = mask.applied(x, scale)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        spent = x.clone()
        assert mask.applied(spent, scale, in_place=True) is spent
        torch.testing.assert_close(spent, expected, rtol=0, atol=0, equal_nan=True)


def places(first_only: bool) -> RowPlaces:
    first, length = torch.from_numpy(np.cumsum(LENGTHS) - LENGTHS), torch.from_numpy(LENGTHS)
    if first_only:
        return RowPlaces(first, length, torch.arange(len(LENGTHS)), torch.ones_like(length))
    return RowPlaces(first, length, first, length)


def inputs(first_only: bool, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value, ``(tokens, 3, width)`` as views of one wide product."""
    made = torch.randn(TOKENS, 3, 3, width, generator=torch.Generator().manual_seed(1))
    query, key, value = made.to(dtype).unbind(1)
    if first_only:
        query = query[places(True).first]
    return [x.detach().requires_grad_() for x in (query, key, value)]


LESS = {"no pairs": "-mno-avx512bf16", "eight numbers wide": "-mno-avx512f"}


def kernels_with_less(monkeypatch: pytest.MonkeyPatch, less: str) -> Kernels:
    monkeypatch.setattr(kernel_build, "_FLAGS", (*kernel_build._FLAGS, LESS[less]))
    return Kernels(built_kernels())


@pytest.fixture(params=["as this machine has them", *LESS])
def vectors(request, monkeypatch):
    """Attention as any processor does it: vectors of sixteen, and pairs, take AVX-512."""
    if request.param in LESS:
        less = kernels_with_less(monkeypatch, request.param)
        monkeypatch.setattr(packed_attention, "kernels_for", lambda _: less)


@pytest.mark.parametrize("width", [8, 5])
def test_pairs_are_multiplied_where_the_processor_can_and_the_width_is_even(width, monkeypatch):
    query, key, value = (x.detach() for x in inputs(False, width, torch.bfloat16))
    how = Attending(0.5)
    here, _ = Kernels(built_kernels()).attend(query, key, value, places(False), how)
    less = kernels_with_less(monkeypatch, "no pairs")
    without, _ = less.attend(query, key, value, places(False), how)
    can = "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert torch.equal(here, without) == (width == 5 or not can)


def test_a_row_that_nobody_asks_leaves_no_gradient():
    query, key, value = (x.detach() for x in inputs(False, 8, torch.bfloat16))
    laid = places(False)
    counts = laid.query_count.clone()
    counts[2] = 0
    laid = dataclasses.replace(laid, query_count=counts)
    kernels, how = Kernels(built_kernels()), Attending(0.5)
    _, sums = kernels.attend(query, key, value, laid, how)
    found = kernels.attend_backward(query, sums, query, key, value, laid, how, key_wanted=True)
    for gradient in found[1:]:
        assert (gradient[8:34] == 0).all()
        assert not (gradient[:8] == 0).all()


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize(("width", "rate"), [(8, 0.0), (32, 0.3), (20, 0.1), (5, 0.1), (66, 0.1)])
def test_attention_and_its_gradients_are_those_of_torch(dtype, first_only, window, width, rate):
    dropout = AttentionDropout(torch.arange(TOKENS) * 7919 + 5, 77, rate) if rate else None
    given = inputs(first_only, width, dtype)
    buckets = make_buckets(LENGTHS, torch.device("cpu"))
    plain = RowAttention.apply(*given, width**-0.5, buckets, dropout, window)
    compiled = CompiledAttention.apply(*given, width**-0.5, places(first_only), dropout, window)
    upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for expected, found in zip(
        (plain, *torch.autograd.grad(plain, given, upstream)),
        (compiled, *torch.autograd.grad(compiled, given, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("width", [32, 20])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_bfloat16_is_about_as_exact_as_with_torchs_operations(rate, width):
    dropout = AttentionDropout(torch.arange(TOKENS) * 7919 + 5, 77, rate) if rate else None
    given = inputs(False, width, torch.bfloat16)
    upstream = torch.randn(TOKENS, 3, width, generator=torch.Generator().manual_seed(2))
    upstream = upstream.bfloat16()
    buckets = make_buckets(LENGTHS, torch.device("cpu"))

    def found(apply, given, laid) -> list[torch.Tensor]:
        out = apply(*given, width**-0.5, laid, dropout, None)
        gradients = torch.autograd.grad(out, given, upstream.to(out.dtype))
        return [x.double() for x in (out.detach(), *gradients)]

    exact = [x.detach().double().requires_grad_() for x in given]
    true = found(RowAttention.apply, exact, buckets)
    plain, compiled = (
        found(RowAttention.apply, given, buckets),
        found(CompiledAttention.apply, given, places(False)),
    )
    for right, theirs, ours in zip(true, plain, compiled, strict=True):
        assert (ours - right).pow(2).mean() <= 1.05 * (theirs - right).pow(2).mean()
        assert 0 < (ours - right).abs().max() <= 1.5 * (theirs - right).abs().max()


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rate", "window"), [(0.0, None), (0.3, 3)])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("width", [5, 8, 20, 32, 40, 66])
def test_nothing_is_touched_behind_the_last_number(
    width, first_only, rate, window, dtype, monkeypatch
):
    """A process that does is killed."""
    given, empty = inputs(first_only, width, dtype), torch.empty
    fenced = [at_the_end_of_memory(x.detach().contiguous()).requires_grad_() for x in given]
    streams = torch.arange(TOKENS) * 7919 + 5
    found = []
    for arrays, of in ((given, streams), (fenced, at_the_end_of_memory(streams))):
        dropout = AttentionDropout(of, 77, rate) if rate else None
        upstream = torch.linspace(-1, 1, given[0].numel()).to(dtype).view(given[0].shape)
        with monkeypatch.context() as patched:
            if arrays is fenced:
                upstream = at_the_end_of_memory(upstream)
                made = lambda *a, **k: at_the_end_of_memory(empty(*a, **k))  # noqa: E731
                patched.setattr(torch, "empty", made)
            out = CompiledAttention.apply(*arrays, 0.5, places(first_only), dropout, window)
            found.append((out.detach(), *torch.autograd.grad(out, arrays, upstream)))
    for free, behind_a_fence in zip(*found, strict=True):
        assert torch.equal(free, behind_a_fence)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "upstream"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [2, 6])
def test_a_nan_stays_in_its_row(row, poison, poisoned, rate, window, dtype, monkeypatch):
    # One thread uses the same scratch memory for all rows; shorter ones follow the poisoned one.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    inside = slice(*(int(LENGTHS[:to].sum()) for to in (row, row + 1)))
    dropout = AttentionDropout(torch.arange(TOKENS) * 7919 + 5, 77, rate) if rate else None
    upstream = torch.randn(TOKENS, 3, 8, generator=torch.Generator().manual_seed(3)).to(dtype)

    def found(*, clean: bool) -> list[torch.Tensor]:
        query, key, value = inputs(False, 8, dtype)
        arrays = {"query": query, "key": key, "value": value, "upstream": upstream.clone()}
        if not clean:
            with torch.no_grad():
                arrays[poisoned][inside] = poison
        given = (query, key, value)
        out = CompiledAttention.apply(*given, 0.5, places(False), dropout, window)
        return [out, *torch.autograd.grad(out, given, arrays["upstream"])]

    outside = torch.ones(TOKENS, dtype=torch.bool)
    outside[inside] = False
    spoiled = found(clean=False)
    for with_it, without in zip(spoiled, found(clean=True), strict=True):
        assert torch.equal(with_it[outside], without[outside])
    assert not all(each[inside].isfinite().all() for each in spoiled)


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("window", [None, 3, 2**40])
def test_scores_that_differ_by_hundreds_are_weighed_as_torch_weighs_them(window):
    given = inputs(False, 8, torch.float32)
    with torch.no_grad():
        given[0][::3] *= 100.0
        given[1][::5] *= 10.0  # keys that tower over all others, inside a window or outside
    buckets = make_buckets(LENGTHS, torch.device("cpu"))
    plain = RowAttention.apply(*given, 0.5, buckets, None, window)
    compiled = CompiledAttention.apply(*given, 0.5, places(False), None, window)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    upstream = torch.ones_like(plain)
    for expected, found in zip(
        torch.autograd.grad(plain, given, upstream),
        torch.autograd.grad(compiled, given, upstream),
        strict=True,
    ):
        few = slice(0, int(LENGTHS[:6].sum()))
        torch.testing.assert_close(found[few], expected[few], rtol=1e-3, atol=1e-2)
        # Among many keys some nearly tie: their weights are good to 1e-3, with scores of thousands.
        apart = 5e-3 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=apart)


@pytest.mark.usefixtures("vectors")
def test_large_scores_are_weighed_in_bfloat16_too():
    given = inputs(False, 8, torch.bfloat16)
    with torch.no_grad():
        given[0][::3] *= 64.0
        given[1][::5] *= 8.0
    exact = [x.detach().double() for x in given]
    buckets = make_buckets(LENGTHS, torch.device("cpu"))
    expected = RowAttention.apply(*exact, 0.5, buckets, None, None)
    found = CompiledAttention.apply(*given, 0.5, places(False), None, None)
    apart = (found.detach().double() - expected).abs()
    assert (apart <= 2**-6 * expected.abs() + 2e-2).all()


def test_few_rows_are_shared_out_by_heads(monkeypatch):
    given = inputs(False, 8, torch.float32)
    found = []
    for threads in (1, 64):  # with 64, fewer rows than threads
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(CompiledAttention.apply(*given, 0.5, places(False), None, None))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("rows", [len(LENGTHS), 1])
def test_more_threads_give_the_same_numbers(rows, first_only, rate, window, dtype, monkeypatch):
    """Also where there are fewer rows than threads, and heads are shared out."""
    tokens = int(LENGTHS[:rows].sum())
    laid = places(first_only)
    laid = dataclasses.replace(
        laid,
        **{
            name: getattr(laid, name)[:rows]
            for name in ("first", "length", "query_first", "query_count")
        },
    )
    made = inputs(first_only, 20, dtype)
    given = [made[0][: rows if first_only else tokens], made[1][:tokens], made[2][:tokens]]
    given = [x.detach().requires_grad_() for x in given]
    dropout = AttentionDropout(torch.arange(tokens) * 7919 + 5, 77, rate) if rate else None
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = torch.randn(300, 37, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask = Mask(
        torch.arange(300) * 7919 - 5, 9, torch.arange(300, dtype=torch.int16)[:, None] % 200
    )
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for _ in range(5):  # a race shows seldom
            out = CompiledAttention.apply(*given, 0.5, laid, dropout, window)
            gradients = torch.autograd.grad(out, given, upstream)
            found.append((out.detach(), *gradients, mask.applied(x, 1.25)))
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("first_only", [False, True])
def test_tokens_of_no_row_get_zeros_whatever_lay_in_memory(first_only, monkeypatch):
    def spoiled(*shape, **options):
        return empty(*shape, **options).fill_(torch.nan)

    gaps = torch.arange(TOKENS, TOKENS + 5)
    rows = places(first_only)
    rows = dataclasses.replace(rows, gaps=gaps, query_gaps=None if first_only else gaps)
    query, key, value = inputs(first_only, 8, torch.float32)
    longer = [torch.cat([x, x[:5]]).detach() for x in (key, value)]
    asking = query.detach() if first_only else torch.cat([query, query[:5]]).detach()
    given = [x.requires_grad_() for x in (asking, *longer)]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", spoiled)
    out = CompiledAttention.apply(*given, 0.5, rows, None, None)
    gradients = torch.autograd.grad(out, given, torch.ones_like(out))
    monkeypatch.undo()
    plain = CompiledAttention.apply(query, key, value, 0.5, places(first_only), None, None)
    expected = (plain, *torch.autograd.grad(plain, (query, key, value), torch.ones_like(plain)))
    for whole, part in zip((out, *gradients), expected, strict=True):
        assert torch.equal(whole[: len(part)], part)
        assert (whole[len(part) :] == 0).all()


def test_the_gradient_of_keys_is_left_out_where_nobody_asks():
    query, key, value = inputs(False, 8, torch.float32)
    out = CompiledAttention.apply(query, key.detach(), value, 0.5, places(False), None, None)
    found = torch.autograd.grad(out.sum(), (query, value))
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_second_build_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = built_kernels()
    assert first.parent == tmp_path / "lorasweep"
    before = first.stat().st_mtime_ns
    assert built_kernels() == first
    assert first.stat().st_mtime_ns == before
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LORASWEEP_KERNELS": "0"}, "LORASWEEP_KERNELS=0 switches them off"),
        ({"CC": "", "PATH": ""}, "no C compiler"),
        ({"CC": "/nowhere/cc"}, "could not be run"),
        ({"CC": "false"}, "failed"),
    ],
)
def test_without_a_compiler_there_is_a_reason_and_torch_goes_on(
    environment, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KernelBuildError, match=said):
        built_kernels()
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        assert said in kernels._loaded.__wrapped__()
    assert said in caplog.text


def test_a_compiler_that_fails_is_quoted_with_its_error(tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit\n"
        "printf 'x.h:1: note: here\\nx.h:2: error: no such word\\n   ^~~~\\n' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"failed and said: x\.h:2: error: no such word$"):
        built_kernels()


def test_other_processors_are_not_tried(monkeypatch):
    monkeypatch.setattr(kernel_build.platform, "machine", lambda: "riscv64")
    with pytest.raises(KernelBuildError, match="not tried on Linux riscv64"):
        built_kernels()


def test_a_second_openmp_is_refused(monkeypatch, caplog):
    found = iter([{"/torch/libgomp.so.1"}, {"/torch/libgomp.so.1", "/usr/lib/libgomp.so.1"}])
    monkeypatch.setattr(kernels, "_openmp_libraries", lambda: next(found))
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        assert "a second OpenMP, /usr/lib/libgomp.so.1" in kernels._loaded.__wrapped__()
    assert "uses torch's operations" in caplog.text
