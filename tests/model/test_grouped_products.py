"""Grouped products are each lane's own, and torch's kernel for them is trusted after a proof."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lane_numbers import LANES, SPANS, numbers

from lorasweep.model import grouped_products
from lorasweep.model.grouped_products import grouped_differs, grouped_outer, grouped_product
from lorasweep.model.lane_spans import lane_sums

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_what_was_proven() -> Iterator[None]:
    grouped_products._proven_on.cache_clear()
    yield
    grouped_products._proven_on.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("wide", "narrow"), [(16, 8), (6, 2)])
def test_grouped_products_are_those_of_each_lane(dtype, wide, narrow):
    # 16 and 8 go through torch's own kernel in float32, the others through the padded product.
    x, y = numbers(9, wide, dtype=dtype), numbers(9, narrow, seed=1, dtype=dtype)
    matrices = numbers(4, wide, narrow, seed=2, dtype=dtype)
    product, outer = grouped_product(x, matrices, SPANS), grouped_outer(x, y, SPANS)
    sums = lane_sums(x, SPANS)
    for lane, rows in enumerate(LANES):
        inside = list(rows)
        torch.testing.assert_close(product[inside], x[inside] @ matrices[lane])
        torch.testing.assert_close(outer[lane], x[inside].T @ y[inside])
        torch.testing.assert_close(sums[lane], x[inside].sum(0))


def test_a_nan_stays_in_its_lane():
    x, matrices = numbers(9, 16, dtype=torch.float32), numbers(4, 16, 8, dtype=torch.float32)
    clean = grouped_product(x, matrices, SPANS), grouped_outer(x, x, SPANS), lane_sums(x, SPANS)
    x[4] = torch.nan
    dirty = grouped_product(x, matrices, SPANS), grouped_outer(x, x, SPANS), lane_sums(x, SPANS)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(clean[0][others], dirty[0][others])
    for before, after in zip(clean[1:], dirty[1:], strict=True):
        assert torch.isnan(after[2]).all()
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])


def test_the_grouped_kernel_passes_its_proof():
    assert grouped_differs(CPU, torch.bfloat16) == ""
    assert grouped_differs(CPU, torch.float32) == ""


def swapped(left: torch.Tensor, right: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """Give lane 0 what is lane 3's."""
    if right.dim() == 2:
        return F.grouped_mm(left, right, offs=offs)
    return F.grouped_mm(left, right[[3, 1, 2, 0]].contiguous(), offs=offs)


def swapped_outer(left: torch.Tensor, right: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    found = F.grouped_mm(left, right, offs=offs)
    return found[[3, 1, 2, 0]] if right.dim() == 2 else found


def leaking(left: torch.Tensor, right: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """Let a NaN out of its lane."""
    return F.grouped_mm(left, right, offs=offs) + 0 * left.sum()


def refusing(left: torch.Tensor, right: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (swapped, "a product of"),
        (swapped_outer, "outer products of"),
        (leaking, "a product of"),
        (refusing, "RuntimeError: no such"),
    ],
)
def test_a_grouped_kernel_that_fails_its_proof_is_not_used(kernel, said, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(grouped_products, "F", SimpleNamespace(grouped_mm=kernel))
    assert not grouped_products._proven_on(CPU, torch.bfloat16)
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_lack_of_memory_or_a_dead_device_during_the_proof_is_no_verdict(kind, monkeypatch):
    def full(*_: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        raise kind("CUDA error: something")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with monkeypatch.context() as patch:
        patch.setattr(grouped_products, "F", SimpleNamespace(grouped_mm=full))
        with pytest.raises(kind):
            grouped_products._proven_on(CPU, torch.bfloat16)
    assert grouped_products._proven_on(CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype", "used"),
    [
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        # There torch reads the groups' ends on the host, in every product.
        ((8, 0), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_grouped_products_are_for_gpus_that_have_the_kernel(capability, dtype, used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert grouped_products._proven_on(CPU, dtype) is used
