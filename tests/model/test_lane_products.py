"""Products of each lane's rows in bfloat16: compiled where the processor multiplies bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fenced import at_the_end_of_memory
from torch import Tensor

from lorasweep.model import grouped_products, kernel_build
from lorasweep.model.frozen_linear import FrozenLinear
from lorasweep.model.grouped_products import grouped_outer, grouped_product
from lorasweep.model.kernel_build import built_kernels
from lorasweep.model.kernel_library import Kernels
from lorasweep.model.kernels import loaded_kernels
from lorasweep.model.lane_spans import LaneSpans
from lorasweep.model.packed_dropout import Mask
from lorasweep.model.packed_products import Adapting, adapted_linear

ROWS = (9, 0, 1, 600, 16, 7)  # of each lane: 600 are more than one thread takes at once
BF16 = torch.bfloat16
# Sums in float32 are rounded to bfloat16's 8 bits, by torch once more where they are scaled or
# added to.
ROUNDED, SUMMED = 3 * 2**-8, 1e-5


def spans_of(rows: tuple[int, ...]) -> LaneSpans:
    counts = torch.tensor(rows)
    lane = torch.arange(len(rows)).repeat_interleave(counts)
    return LaneSpans(counts.cumsum(0).int(), lane, max(rows))


SPANS = spans_of(ROWS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def matrices_of(rows: int, columns: int, transposed: bool, lanes: int = len(ROWS)) -> Tensor:
    if transposed:
        return drawn(lanes, columns, rows, seed=1).transpose(1, 2)
    return drawn(lanes, rows, columns, seed=1)


def test_they_are_compiled_where_the_processor_multiplies_bfloat16():
    kernels = loaded_kernels()
    assert kernels is not None
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert kernels.sums(drawn(2, 2)) == ("avx512_bf16" in flags)
    assert not kernels.sums(drawn(2, 2).float())
    assert not kernels.sums(drawn(2, 4).t())
    if kernels.sums(drawn(2, 2)):
        assert kernels.multiplies(drawn(3, 4), drawn(1, 4, 8))
        assert not kernels.multiplies(drawn(3, 5), drawn(1, 5, 8))
        assert not kernels.multiplies(drawn(3, 4), drawn(1, 8, 16)[:, ::2, ::2])
        assert not kernels.multiplies(drawn(3, 4), drawn(1, 4, 8).float())


def test_elsewhere_torch_does_it(monkeypatch):
    flags = (*kernel_build._FLAGS, "-mno-avx512bf16")
    monkeypatch.setattr(kernel_build, "_FLAGS", flags)
    plain = Kernels(built_kernels())
    assert not plain.sums(drawn(2, 2))
    assert not plain.multiplies(drawn(2, 2), drawn(1, 2, 2))
    monkeypatch.setattr(grouped_products, "kernels_for", lambda _: plain)
    called = []
    said = lambda *_, **__: called.append(1) or drawn(633, 32)  # noqa: E731
    monkeypatch.setattr(F, "grouped_mm", said, raising=False)
    grouped_product(drawn(633, 384), matrices_of(384, 32, False), SPANS)
    assert called


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("inner", "columns"),
    [
        (384, 32),
        (32, 384),
        (384, 8),
        (4, 384),
        (50, 18),
        (2, 5),
        (6, 1),
        (100, 33),
        (7, 16),
        (1, 9),
    ],
)
@pytest.mark.parametrize(("scaled", "added"), [(False, False), (True, False), (True, True)])
def test_a_product_is_each_lanes_own(inner, columns, transposed, scaled, added):
    x, matrices = drawn(sum(ROWS), inner), matrices_of(inner, columns, transposed)
    scaling = torch.linspace(0.5, 2, sum(ROWS)).unsqueeze(1) if scaled else None
    onto = drawn(sum(ROWS), columns, seed=2) if added else None
    expected = torch.einsum("ri,rio->ro", x.double(), matrices.double()[SPANS.lane])
    size = torch.einsum("ri,rio->ro", x.double().abs(), matrices.double().abs()[SPANS.lane])
    if scaling is not None:
        expected, size = expected * scaling, size * scaling
    if onto is not None:
        held = onto.double()
        expected = expected + held
    found = grouped_product(x, matrices, SPANS, scaling=scaling, onto=onto)
    assert found.dtype == BF16
    assert (found is onto) == added
    parts = expected.abs() if onto is None else (expected - held).abs() + held.abs()
    apart = (found.double() - expected).abs()
    assert (apart <= ROUNDED * parts + SUMMED * size).all()


@pytest.mark.parametrize(
    ("left", "right"), [(32, 384), (384, 32), (4, 384), (8, 8), (18, 50), (33, 100), (1, 5), (3, 2)]
)
def test_sums_over_rows_are_each_lanes_own(left, right):
    x, y = drawn(sum(ROWS), left), drawn(sum(ROWS), right, seed=1)
    found = grouped_outer(x, y, SPANS)
    assert found.shape == (len(ROWS), left, right)
    assert (found[1] == 0).all()
    for lane in range(len(ROWS)):
        inside = SPANS.lane == lane
        a, b = x[inside].double(), y[inside].double()
        expected = a.T @ b
        allowed = ROUNDED * expected.abs() + SUMMED * (a.abs().T @ b.abs())
        assert ((found[lane].double() - expected).abs() <= allowed).all()


def test_columns_of_a_wider_matrix_are_taken_where_they_lie():
    wide, matrices = drawn(sum(ROWS), 96), matrices_of(32, 48, False)
    inside, apart = wide[:, 20:52], wide[:, 20:52].contiguous()
    assert torch.equal(
        grouped_product(inside, matrices, SPANS), grouped_product(apart, matrices, SPANS)
    )
    assert torch.equal(grouped_outer(inside, apart, SPANS), grouped_outer(apart, inside, SPANS))
    room = drawn(sum(ROWS), 96, seed=3)
    kept = room.clone()
    expected = grouped_product(apart, matrices, SPANS, onto=room[:, 10:58].contiguous())
    grouped_product(apart, matrices, SPANS, onto=room[:, 10:58])
    assert torch.equal(room[:, 10:58], expected)
    assert torch.equal(room[:, :10], kept[:, :10])
    assert torch.equal(room[:, 58:], kept[:, 58:])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [8, 9, 10, 609, 632])
def test_what_is_not_a_number_stays_in_its_row_and_its_lane(row, poison):
    """Also where it is the last of an odd number of rows, or beside another lane's."""
    x, y, matrices = drawn(sum(ROWS), 32), drawn(sum(ROWS), 50, seed=1), matrices_of(32, 50, True)
    clean = grouped_product(x, matrices, SPANS), grouped_outer(x, y, SPANS)
    lane = int(SPANS.lane[row])
    x[row] = poison
    product, outer = grouped_product(x, matrices, SPANS), grouped_outer(x, y, SPANS)
    rows, lanes = torch.arange(sum(ROWS)) != row, torch.arange(len(ROWS)) != lane
    assert not product[row].isfinite().any()
    assert torch.equal(product[rows], clean[0][rows])
    assert not outer[lane].isfinite().any()
    assert torch.equal(outer[lanes], clean[1][lanes])
    matrices[lane] = poison
    spoilt = grouped_product(drawn(sum(ROWS), 32), matrices, SPANS)
    others = SPANS.lane != lane
    assert torch.equal(spoilt[others], clean[0][others])


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_and_threads_change_no_bit(threads, monkeypatch):
    kernels = loaded_kernels()
    # Elsewhere torch does it, and rounds by the sizes of all.
    apart = 0.0 if kernels is not None and kernels.sums(drawn(2, 2)) else 2**-6
    x, y, matrices = drawn(sum(ROWS), 384), drawn(sum(ROWS), 32, seed=1), matrices_of(384, 32, True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    product, outer = grouped_product(x, matrices, SPANS), grouped_outer(y, x, SPANS)
    for lane, rows in enumerate(ROWS):
        inside = SPANS.lane == lane
        alone = spans_of((rows,))
        of_lane = grouped_product(x[inside], matrices[lane : lane + 1], alone)
        sums = grouped_outer(y[inside], x[inside], alone)[0]
        torch.testing.assert_close(product[inside], of_lane, rtol=apart, atol=apart)
        torch.testing.assert_close(outer[lane], sums, rtol=apart, atol=apart)


@pytest.mark.parametrize("columns", [1, 5, 16, 18, 33, 48])
@pytest.mark.parametrize("inner", [2, 34])
def test_nothing_is_touched_behind_the_last_number(columns, inner):
    """A process that does is killed; the lane of seven rows comes last."""
    x, scaling = drawn(sum(ROWS), inner), torch.ones(sum(ROWS), 1)
    y, onto = drawn(sum(ROWS), columns, seed=1), drawn(sum(ROWS), columns, seed=2)
    for transposed in (False, True):
        matrices = matrices_of(inner, columns, transposed)
        expected = grouped_product(x, matrices, SPANS, scaling=scaling, onto=onto.clone())
        stored = matrices.transpose(1, 2) if transposed else matrices
        fenced = at_the_end_of_memory(stored)
        found = grouped_product(
            at_the_end_of_memory(x),
            fenced.transpose(1, 2) if transposed else fenced,
            SPANS,
            scaling=at_the_end_of_memory(scaling),
            onto=at_the_end_of_memory(onto),
        )
        assert torch.equal(found, expected)
    outer = grouped_outer(at_the_end_of_memory(x), at_the_end_of_memory(y), SPANS)
    assert torch.equal(outer, grouped_outer(x, y, SPANS))
    mask = mask_of("of each row")
    fenced_mask = Mask(at_the_end_of_memory(mask.streams), 9, at_the_end_of_memory(mask.rate))
    matrices = matrices_of(inner, columns, False)
    for name in ("x_mask", "mask"):
        expected = grouped_product(x, matrices, SPANS, **{name: mask})
        fenced = at_the_end_of_memory(x), at_the_end_of_memory(matrices)
        assert torch.equal(grouped_product(*fenced, SPANS, **{name: fenced_mask}), expected)
    fenced = at_the_end_of_memory(y), at_the_end_of_memory(x)
    outer = grouped_outer(*fenced, SPANS, right_mask=fenced_mask)
    assert torch.equal(outer, grouped_outer(y, x, SPANS, right_mask=mask))


RATES = torch.tensor([0, 1, 40, 128, 255], dtype=torch.int16)


def mask_of(rate: str) -> Mask:
    rows = sum(ROWS)
    each = RATES[torch.arange(rows) % len(RATES)].unsqueeze(1)
    return Mask(torch.arange(rows) * 7919 - 5, 9, each if rate == "of each row" else 40)


@pytest.mark.parametrize("rate", ["one", "of each row"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("inner", "columns"), [(384, 32), (32, 384), (50, 18), (100, 33), (2, 5), (7, 16)]
)
def test_dropout_inside_a_product_is_that_before_it_or_behind_it(inner, columns, transposed, rate):
    x, matrices = drawn(sum(ROWS), inner), matrices_of(inner, columns, transposed)
    mask, scaling = mask_of(rate), torch.linspace(0.5, 2, sum(ROWS)).unsqueeze(1)
    before = grouped_product(x, matrices, SPANS, scaling=scaling, x_mask=mask)
    assert torch.equal(before, grouped_product(mask.applied(x), matrices, SPANS, scaling=scaling))
    behind = grouped_product(x, matrices, SPANS, scaling=scaling, mask=mask)
    expected = mask.applied(grouped_product(x, matrices, SPANS, scaling=scaling))
    assert torch.equal(behind, expected)
    assert not torch.equal(before, behind)
    # What it is added to is not dropped.
    onto = torch.full_like(behind, 2.0**-100)
    grouped_product(x, matrices, SPANS, scaling=scaling, onto=onto, mask=mask)
    assert torch.equal(onto, torch.where(expected == 0, 2.0**-100, expected))


@pytest.mark.parametrize("rate", ["one", "of each row"])
@pytest.mark.parametrize(("left", "right"), [(32, 384), (384, 32), (18, 50), (33, 100), (1, 5)])
def test_dropout_inside_a_sum_over_rows_is_that_before_it(left, right, rate):
    x, y, mask = drawn(sum(ROWS), left), drawn(sum(ROWS), right, seed=1), mask_of(rate)
    found = grouped_outer(x, y, SPANS, right_mask=mask)
    assert torch.equal(found, grouped_outer(x, mask.applied(y), SPANS))
    assert not torch.equal(found, grouped_outer(x, y, SPANS))


def test_what_is_dropped_may_be_no_number():
    x, matrices, mask = drawn(sum(ROWS), 64), matrices_of(64, 64, False), mask_of("one")
    dropped = mask.applied(torch.ones_like(x)) == 0
    x[dropped] = torch.nan
    assert grouped_product(x, matrices, SPANS, x_mask=mask).isfinite().all()
    assert grouped_outer(drawn(sum(ROWS), 8), x, SPANS, right_mask=mask).isfinite().all()
    product = grouped_product(x, matrices, SPANS, mask=mask)
    assert torch.equal(product.isfinite(), dropped | ~x.isnan().any(1, keepdim=True))


RANKS = torch.tensor([4, 8, 0, 16, 20, 3], dtype=torch.int32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [384, 50, 20, 16, 6])  # some narrower than the highest rank
def test_what_a_lane_leaves_empty_is_not_multiplied(wide, transposed, monkeypatch):
    """LoRA's matrices are as wide as the highest rank of all lanes."""
    kernels = loaded_kernels()
    empty = torch.arange(20) >= RANKS[:, None]
    down, up = matrices_of(wide, 20, transposed), matrices_of(20, wide, transposed)
    down.masked_fill_(empty[:, None, :], 0)
    up.masked_fill_(empty[:, :, None], 0)
    x, mask, held = drawn(sum(ROWS), wide), mask_of("of each row"), drawn(sum(ROWS), wide, seed=3)
    narrow = grouped_product(x, down, SPANS, x_mask=mask)
    y, sums = grouped_product(narrow, up, SPANS), grouped_outer(narrow, x, SPANS, right_mask=mask)
    expected = grouped_product(narrow, up, SPANS, onto=held.clone(), mask=mask)
    if kernels is not None and kernels.sums(x):
        # Nobody looks there, but for the second of a pair: NaNs change nothing.
        empty = torch.arange(20) >= RANKS[:, None] + RANKS[:, None] % 2
        down.masked_fill_(empty[:, None, :], torch.nan)
        up.masked_fill_(empty[:, :, None], torch.nan)
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a: new(*a).fill_(torch.nan))
    assert torch.equal(grouped_product(x, down, SPANS, x_mask=mask, widths=RANKS), narrow)
    assert torch.equal(grouped_product(narrow, up, SPANS, depths=RANKS), y)
    onto = grouped_product(narrow, up, SPANS, depths=RANKS, onto=held.clone(), mask=mask)
    assert torch.equal(onto, expected)
    left = grouped_outer(narrow, x, SPANS, right_mask=mask, left_sizes=RANKS)
    assert torch.equal(left, sums)
    whole = grouped_outer(x, narrow, SPANS)
    assert torch.equal(grouped_outer(x, narrow, SPANS, right_sizes=RANKS), whole)


@pytest.mark.parametrize(("inside", "outside"), [(384, 384), (16, 8), (8, 16), (20, 20)])
def test_an_adapted_layer_is_the_same_in_bfloat16_up_to_its_rounding(inside, outside):
    """Ranks, dropout and scaling together, forth and back, held to float64."""
    empty = torch.arange(20) >= RANKS[:, None]
    x, upstream = drawn(sum(ROWS), inside), drawn(sum(ROWS), outside, seed=5)
    down, up = drawn(len(ROWS), 20, inside, seed=1), drawn(len(ROWS), outside, 20, seed=2)
    down, up = down.masked_fill(empty[:, :, None], 0), up.masked_fill(empty[:, None, :], 0)
    linear = torch.nn.Linear(inside, outside).to(BF16).requires_grad_(False)
    scaling = torch.linspace(0.5, 2, sum(ROWS)).unsqueeze(1)
    found, plain, exact = [], [], []
    for out, dtype, ranks in (
        (found, BF16, RANKS),
        (plain, BF16, None),
        (exact, torch.float64, None),
    ):
        wide = torch.promote_types(dtype, torch.float32)  # adapters are float32
        given = [x.to(dtype), down.to(wide), up.to(wide)]
        given = [each.detach().clone().requires_grad_() for each in given]
        frozen = FrozenLinear(copy.deepcopy(linear).to(dtype))
        frozen.lay_out()
        adapting = Adapting(SPANS, scaling.to(wide), mask_of("of each row"), ranks)
        y = adapted_linear(*given, frozen, adapting)
        out += [y.detach(), *torch.autograd.grad(y, given, upstream.to(dtype))]
    for ours, whole, true in zip(found, plain, exact, strict=True):
        assert torch.equal(ours, whole)
        apart = (ours.double() - true).abs().max()
        assert apart <= 2**-6 * true.abs().max()


def test_sizes_and_streams_that_dont_fit_are_refused():
    kernels = Kernels(built_kernels())
    x, y, matrices, ends = drawn(633, 8), drawn(633, 4), matrices_of(8, 4, False), SPANS.ends
    good = mask_of("of each row")
    few = RANKS.clamp(max=4)
    for sizes in (RANKS, -few, few.long(), few[:2], few.repeat(2)[::2]):
        with pytest.raises(ValueError, match="sizes: expected"):
            kernels.product(x, matrices, ends, widths=sizes)
        with pytest.raises(ValueError, match="sizes: expected"):
            kernels.product(x, matrices, ends, depths=sizes)
        with pytest.raises(ValueError, match="sizes: expected"):
            kernels.outer(y, x, ends, None, sizes)
    for mask in (
        Mask(good.streams[1:], 9, 40),
        Mask(good.streams.int(), 9, 40),
        Mask(good.streams.repeat(2)[::2], 9, 40),
        Mask(good.streams, 9, RATES),
        Mask(good.streams, 9, good.rate.long()),
    ):
        for told in ({"x_mask": mask}, {"mask": mask}):
            with pytest.raises(ValueError, match=r"(streams|rates): expected"):
                kernels.product(x, matrices, ends, **told)
        with pytest.raises(ValueError, match=r"(streams|rates): expected"):
            kernels.outer(y, x, ends, mask)


def test_what_doesnt_fit_together_is_refused():
    kernels = Kernels(built_kernels())
    x, matrices, ends = drawn(633, 8), matrices_of(8, 4, False), SPANS.ends
    for wrong in (
        (x[:, :6], matrices, ends, None, None),
        (x, matrices[:3], ends, None, None),
        (x, matrices, ends.long(), None, None),
        (x[:-1], matrices, ends, None, None),
        (x, matrices, ends.repeat_interleave(2)[::2], None, None),
        (x, matrices, ends, torch.ones(1, 1), None),
        (x, matrices, ends, None, torch.ones(633, 4)),
        (x, matrices, ends, None, drawn(633, 5)),
        (x, matrices, ends, None, drawn(4, 633).t()),
    ):
        with pytest.raises(ValueError, match="expected"):
            kernels.product(*wrong)
    with pytest.raises(ValueError, match="rows: expected 600, got 633"):
        kernels.outer(x, drawn(600, 4), ends)
    with pytest.raises(ValueError, match="lanes' ends"):
        kernels.outer(x, x, ends.long())


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_the_default_is(default):
    x, y = drawn(sum(ROWS), 32), drawn(sum(ROWS), 48, seed=1)
    expected = grouped_outer(x, y, SPANS)
    torch.set_default_dtype(default)
    try:
        found = grouped_outer(x, y, SPANS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_lack_of_memory_is_an_error(monkeypatch):
    kernels = Kernels(built_kernels())
    refusing = SimpleNamespace(lane_product_bf16=lambda *_: 0, lane_outer_bf16=lambda *_: 0)
    monkeypatch.setattr(kernels, "_library", refusing)
    with pytest.raises(MemoryError, match=r"no memory to multiply by \(6, 8, 4\)"):
        kernels.product(drawn(633, 8), matrices_of(8, 4, False), SPANS.ends, None, None)
    with pytest.raises(MemoryError, match="no memory for sums over 633 rows"):
        kernels.outer(drawn(633, 4), drawn(633, 8), SPANS.ends)
