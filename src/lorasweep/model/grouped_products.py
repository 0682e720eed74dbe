"""Products of one long list of rows with one matrix per lane.

A grouped product multiplies each lane's rows with that lane's own matrix in one call, without
padding and without a copy; rows of different lanes never meet in a sum, so a NaN in one lane stays
there. In bfloat16 on a CPU that has it, our own loop does it; else torch's kernel; and where there
is neither, lanes are padded to the longest and multiplied as a batch.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lorasweep.model.kernels import kernels_for
from lorasweep.model.lane_spans import LaneSpans
from lorasweep.model.packed_dropout import Mask
from lorasweep.model.torch_errors import first_line, is_of_the_device, is_out_of_memory

_log = logging.getLogger(__name__)

# CUDA's compute capabilities for which torch has a kernel of its own (its _grouped_mm_cuda).
_WITH_KERNEL = frozenset({(9, 0), (10, 0)})


def grouped_product(
    x: Tensor,
    matrices: Tensor,
    spans: LaneSpans,
    *,
    scaling: Tensor | None = None,
    onto: Tensor | None = None,
    x_mask: Mask | None = None,
    mask: Mask | None = None,
    depths: Tensor | None = None,
    widths: Tensor | None = None,
) -> Tensor:
    """Multiply each lane's rows with its own matrix.

    Args:
        x: ``(rows, in)``, lane after lane.
        matrices: ``(lanes, in, out)``.
        spans: Whose each row is.
        scaling: What each row of the result is multiplied with, ``(rows, 1)``; None for 1.
        onto: What the result is added to, in place, ``(rows, out)``; None for nothing.
        x_mask: Of dropout on ``x``; None for none.
        mask: Of dropout on the product, before it is added to anything; None for none.
        depths: How many first rows of each lane's matrix aren't 0, int32 ``(lanes,)`` on the CPU:
            the others may be left out. None for all.
        widths: The same of columns.

    Returns:
        ``(rows, out)``; ``onto`` where there is one.
    """
    kernels = kernels_for(x)
    if kernels is not None and kernels.multiplies(x, matrices):
        return kernels.product(x, matrices, spans.ends, scaling, onto, x_mask, mask, depths, widths)
    if x_mask is not None:
        x = x_mask.applied(x)
    if _grouped_kernel(x, matrices):
        product = F.grouped_mm(x, matrices, offs=spans.ends)
    else:
        product = _padded_product(x, matrices, spans)
    if scaling is not None:
        product = product.mul_(scaling)
    if mask is not None:
        product = mask.applied(product, in_place=True)
    return product if onto is None else onto.add_(product)


def grouped_outer(
    left: Tensor,
    right: Tensor,
    spans: LaneSpans,
    *,
    right_mask: Mask | None = None,
    left_sizes: Tensor | None = None,
    right_sizes: Tensor | None = None,
) -> Tensor:
    """Sum each lane's outer products: ``left[rows].T @ right[rows]`` for every lane.

    Args:
        left: ``(rows, n)``, lane after lane.
        right: ``(rows, m)``.
        spans: Whose each row is.
        right_mask: Of dropout on ``right``; None for none.
        left_sizes: How many first columns of ``left`` aren't 0 in each lane's rows, int32
            ``(lanes,)`` on the CPU: the others may be left out. None for all.
        right_sizes: The same of ``right``.

    Returns:
        ``(lanes, n, m)``, in the operands' type or float32; zero for a lane without rows.
    """
    kernels = kernels_for(left)
    if kernels is not None and kernels.sums(left, right):
        if left.shape[1] <= right.shape[1]:
            return kernels.outer(left, right, spans.ends, right_mask, left_sizes)
        if right_mask is None:
            return kernels.outer(right, left, spans.ends, None, right_sizes).transpose(1, 2)
    if right_mask is not None:
        right = right_mask.applied(right)
        return grouped_outer(left, right, spans, left_sizes=left_sizes, right_sizes=right_sizes)
    if _grouped_kernel(left, right):
        return F.grouped_mm(left.t(), right, offs=spans.ends)
    return _padded_outer(left, right, spans)


def _grouped_kernel(*operands: Tensor) -> bool:
    """Whether torch multiplies such groups itself.

    It has no float64 kernel, on CUDA none but bfloat16's, and wants every row to start on 16
    bytes, which a head of two labels doesn't; those go through a padded batched product.
    """
    dtype, device = operands[0].dtype, operands[0].device
    if not hasattr(F, "grouped_mm") or not all(_aligned(operand) for operand in operands):
        return False
    if device.type == "cuda":
        return _proven_on(device, dtype) and not any(x.data_ptr() % 16 for x in operands)
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def _aligned(operand: Tensor) -> bool:
    bytes_a_number = operand.element_size()
    return all(
        stride == 1 or (stride > 0 and stride * bytes_a_number % 16 == 0)
        for stride in operand.stride()
    )


@cache
def _proven_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CUDA device has the kernel, and it did the right thing when tried."""
    # Elsewhere torch reads the groups' ends and multiplies one after the other.
    if dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) not in _WITH_KERNEL:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where they are errors, one is no refusal
            why = grouped_differs(device, dtype)
    except Exception as error:
        if is_out_of_memory(error) or is_of_the_device(error):
            raise  # it says nothing about the kernel, and must not be remembered
        why = first_line(error)
    if why:
        _log.warning("torch's grouped products are not used on %s: %s", device, why)
    return not why


def grouped_differs(device: torch.device, dtype: torch.dtype) -> str:
    """Say in what torch's grouped products differ from padded ones, if in anything.

    Tried are the layouts that LoRA needs, with a lane that has no rows and one that holds a NaN,
    which must stay there.
    """
    counts = torch.tensor([40, 0, 300, 7])
    lane = torch.arange(4).repeat_interleave(counts)
    spans = LaneSpans(counts.cumsum(0).to(device, torch.int32), lane.to(device), 300)
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    wide, narrow, down, up = drawn(347, 64), drawn(347, 16), drawn(4, 16, 64), drawn(4, 64, 16)
    wide[45] = torch.nan
    others = (lane != 2).to(device)
    for x, matrices in (
        (wide, down.transpose(1, 2)),
        (wide, up),
        (narrow, down),
        (narrow, up.transpose(1, 2)),
    ):
        found = F.grouped_mm(x, matrices, offs=spans.ends)
        if not _alike(found[others], _padded_product(x, matrices, spans)[others]):
            return f"a product of {tuple(x.shape)} by {tuple(matrices.shape)}"
    for left, right in ((wide, narrow), (narrow, wide)):
        found = F.grouped_mm(left.t(), right, offs=spans.ends)
        expected = _padded_outer(left, right, spans)
        if not _alike(found[[0, 1, 3]], expected[[0, 1, 3]]):
            return f"outer products of {tuple(left.shape)} and {tuple(right.shape)}"
    return ""


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two results agree up to the rounding of their sums; never where a NaN is."""
    apart = (found.float() - expected.float()).abs().max()
    return bool(apart <= 4 * torch.finfo(found.dtype).eps * expected.float().abs().max())


def _padded_product(x: Tensor, matrices: Tensor, spans: LaneSpans) -> Tensor:
    padded = torch.bmm(_spread(x, spans), matrices)
    return padded.reshape(-1, padded.shape[-1]).index_select(0, spans.place)


def _padded_outer(left: Tensor, right: Tensor, spans: LaneSpans) -> Tensor:
    return torch.bmm(_spread(left, spans).transpose(1, 2), _spread(right, spans))


def _spread(x: Tensor, spans: LaneSpans) -> Tensor:
    """Lay the rows of a flat matrix into a zero-padded grid, ``(lanes, longest, width)``."""
    grid = x.new_zeros(spans.lanes * spans.longest, x.shape[1])
    grid.index_copy_(0, spans.place, x)
    return grid.view(spans.lanes, spans.longest, x.shape[1])
