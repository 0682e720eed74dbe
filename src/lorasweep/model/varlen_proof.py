"""Whether torch's kernel for rows of unequal length does on this device what it should.

Before its first use it attends over a few rows, forward and backward, and must agree with
:class:`RowAttention`. Where it doesn't, or can't run, the log says why, once, and the buckets
stay in use. The host waits for the device here, and never again.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorasweep.model.row_attention import RowAttention
from lorasweep.model.row_buckets import make_buckets
from lorasweep.model.torch_errors import first_line, is_of_the_device, is_out_of_memory
from lorasweep.model.varlen_attention import varlen_attention

_log = logging.getLogger(__name__)

_DEVICES = frozenset({"cuda"})
_TYPES = frozenset({torch.bfloat16, torch.float16})
_MOST_WIDTH = 256
# Unsplit, a row's output doesn't depend on its neighbours. Builds that refuse the argument don't
# split where keys have as many heads as queries. (Gradients may be summed in another order among
# another number of rows; that is rounding.)
_OPTIONS: tuple[Mapping[str, Any], ...] = ({"num_splits": 1}, {})
# One token alone, and rows that end before, at and behind the edges of the kernel's blocks of 64
# and 128. Rows of two or three have gradients that nearly cancel, so that rounding is all of them.
_LENGTHS = (9, 1, 130, 64, 17, 261)
_POISONED = 2
# In the type's eps, as a share of a row's largest value. The kernel sums in float32 and rounds
# weights, scores' gradients and results, by half an eps each. Done so on a CPU, over 30 draws and
# three sizes of heads, that comes to 1.0 at most; a window that is off by one token to 12 at least.
_TOLERANCE = 4


class _DiffersError(Exception):
    """The kernel ran, and gave something else."""


def proven_options(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, window: int | None
) -> Mapping[str, Any] | None:
    """Tell how the kernel is to be called, tried out the first time and then remembered.

    Args:
        device: Where the tokens lie.
        dtype: Of query, key and value.
        heads: How many.
        width: Of each head.
        window: One more than how far a token sees in either direction; None for all, which
            includes one query a row.

    Returns:
        What :func:`varlen_attention` wants as its options; None where it may not be used.
    """
    if device.type not in _DEVICES or dtype not in _TYPES or width % 8 or width > _MOST_WIDTH:
        return None
    return _tried(device, dtype, heads, width, window)


@cache
def _tried(
    device: torch.device, dtype: torch.dtype, heads: int, width: int, window: int | None
) -> Mapping[str, Any] | None:
    why = ""
    for options in _OPTIONS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where they are errors, one is no refusal
                for first_only in (False, True) if window is None else (False,):
                    _try(device, dtype, heads, width, window, first_only, options)
        except _DiffersError as error:
            why = str(error)
        except Exception as error:  # a build may lack it in ways that nobody can foresee
            if is_out_of_memory(error) or is_of_the_device(error):
                raise  # it says nothing about the kernel, and must not be remembered
            why = why or first_line(error)
        else:
            return options
    text = "torch's attention for rows of unequal length is not used on %s (%s, %d × %d): %s"
    _log.warning(text, device, str(dtype).removeprefix("torch."), heads, width, why)
    return None


def _try(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    width: int,
    window: int | None,
    first_only: bool,
    options: Mapping[str, Any],
) -> None:
    """Compare the kernel with the buckets, and with itself where one row holds a NaN.

    Raises:
        _DiffersError: It gives something else.
        Exception: Whatever torch raises where it can't run.
    """
    lengths = np.array([*_LENGTHS[:-1], max(_LENGTHS[-1], 2 * (window or 0))], dtype=np.int64)
    starts = np.append(0, np.cumsum(lengths))
    places = torch.from_numpy(starts.astype(np.int32)).to(device)
    buckets = make_buckets(lengths, device)
    # Not the kernel's own default, so that it must take what it is given; and small, so that no
    # token's weight comes near 1, where gradients cancel.
    scaling = 0.5 * width**-0.5

    def results(values: Tensor, kernel: bool) -> list[Tensor]:
        """Return the output, and the gradients of query, key and value."""
        q, k, v, upstream = values.unbind(1)
        if first_only:
            q, upstream = (x.index_select(0, places[:-1]) for x in (q, upstream))
        q, k, v = given = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            if kernel:
                longest = int(lengths.max())
                out = varlen_attention(q, k, v, scaling, places, longest, window, options)
            else:
                out = RowAttention.apply(q, k, v, scaling, buckets, None, window)
        return [out.detach(), *torch.autograd.grad(out, given, upstream)]

    generator = torch.Generator().manual_seed(0)  # torch's own is left alone
    drawn = torch.randn(int(starts[-1]), 4, heads, width, generator=generator)
    values = drawn.to(device, dtype)  # side by side, as a model's projection may leave them
    found, exact = results(values, True), results(values.float(), False)
    values[starts[_POISONED] : starts[_POISONED + 1]] = torch.nan
    poisoned = results(values, True)
    asking = [1] * len(lengths) if first_only else lengths.tolist()
    cuts = (asking, asking, lengths.tolist(), lengths.tolist())
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, rows, *three in zip(names, cuts, found, exact, poisoned, strict=True):
        one, other, again = (x.split(rows) for x in three)
        apart = _apart(one, other) / torch.finfo(dtype).eps
        if not apart <= _TOLERANCE:
            raise _DiffersError(f"its {name} is off by {apart:.2g} times the type's precision")
        same = [torch.equal(*pair) for pair in zip(one, again, strict=True)]
        if not all(same[:_POISONED] + same[_POISONED + 1 :]):
            raise _DiffersError(f"its {name} changes from call to call, or with another row")


def _apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference in any row, as a share of the row's largest value."""
    sizes = torch.stack([row.abs().max() for row in expected])
    off = [(one.float() - other).abs().max() for one, other in zip(found, expected, strict=True)]
    # A token alone has no gradient that it could be a share of. Torch's maximum keeps a NaN.
    return float((torch.stack(off) / sizes.clamp(min=sizes.max() / 10)).max())
