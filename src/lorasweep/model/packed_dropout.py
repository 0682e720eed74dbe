"""Dropout whose masks are a function of trial, step, module and row, and of nothing else.

Random numbers are not drawn one after another but computed from a counter, as Philox does
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a stream per token, its
state advanced by Weyl's constant, each state scrambled by SplitMix64's finaliser (Steele et
al. 2014). One 64-bit word gives the masks of eight elements, a byte each. So a trial's masks
don't change with its neighbours, its lane or the pack's size, and a mask costs a tenth of
what ``nn.Dropout`` takes on a CPU.

A byte has 256 values: rates are rounded to the nearest 1/256 (never to 0), and what is kept is
scaled by the rounded rate, so the expectation is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasweep.core.seeding import derive_seed
from lorasweep.model.kernel_library import Dropping
from lorasweep.model.kernels import kernels_for

_WEYL = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit number
_MIX_1 = -4658895280553007687  # SplitMix64's multipliers
_MIX_2 = -7723592293110705685
_WHOLE = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def lane_key(seed: int) -> int:
    """Return a trial's 62-bit key for its dropout streams."""
    return derive_seed(seed, "dropout", 0) << 31 | derive_seed(seed, "dropout", 1)


def module_key(name: str) -> int:
    """Return the 62-bit key of a module, by its full name in the base."""
    return derive_seed(0, "module", name, 0) << 31 | derive_seed(0, "module", name, 1)


def token_keys(
    lane_keys: NDArray[np.int64],
    steps: NDArray[np.int64],
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the stream of every token at one step; all arrays are ``(tokens,)``.

    Args:
        lane_keys: From :func:`lane_key`, of the token's trial.
        steps: The trial's own step.
        rows: The row's index in the split.
        positions: The token's place in its row.
    """
    key = _scrambled(lane_keys + steps * np.int64(_WEYL))
    key = _scrambled(key + rows * np.int64(_WEYL))
    return _scrambled(key + positions * np.int64(_WEYL))


def rate_byte(rate: float) -> int:
    """Return how many of 256 byte values drop an element at this rate."""
    return 0 if rate <= 0 else min(255, max(1, round(rate * 256)))


def kept_scale(rate: float) -> float:
    """Return what kept elements are multiplied by, ``1 / (1 - rate)`` of the rounded rate."""
    return 256 / (256 - rate_byte(rate))


def random_bytes(streams: Tensor, key: int, width: int) -> Tensor:
    """Return ``width`` random bytes for each stream.

    Args:
        streams: int64, any shape; from :func:`token_keys`.
        key: From :func:`module_key`.
        width: Bytes wanted of each stream. The first ones don't depend on how many.

    Returns:
        uint8, ``(*streams.shape, width)``.
    """
    words = -(-width // 8)
    counter = torch.arange(1, words + 1, device=streams.device, dtype=torch.int64).mul_(_WEYL)
    state = scrambled(streams ^ key).unsqueeze(-1) + counter
    found = scrambled(state, in_place=True).view(torch.uint8)
    return found[..., :width]


def kept_bits(
    streams: Tensor, key: int, width: int, rate: int | Tensor, dtype: torch.dtype
) -> Tensor:
    """Return which elements dropout keeps: all bits set where kept, none where dropped.

    Such a mask is applied by a bitwise *and*: comparisons and products with a bool mask take
    torch several times as long on a CPU.

    Args:
        streams: int64, of each token.
        key: From :func:`module_key`.
        width: Elements a token.
        rate: From :func:`rate_byte`: one number, or int16 that broadcasts over the result.
        dtype: Of what the mask is for.

    Returns:
        A whole number type as wide as ``dtype``, ``(*streams.shape, width)``.
    """
    drawn = random_bytes(streams, key, width).to(torch.int16)
    # Negative, so all ones after the shift, exactly where the byte is rate or more.
    bits = torch.rsub(drawn, rate - 1)
    bits = bits.bitwise_right_shift_(15)
    return bits if _WHOLE[dtype] is torch.int16 else bits.to(_WHOLE[dtype])


def masked(x: Tensor, bits: Tensor) -> Tensor:
    """Set what ``bits`` drops to zero, and keep the rest as it is; no gradient."""
    return (x.view(bits.dtype) & bits).view(x.dtype)


@dataclass(slots=True)
class Mask(Dropping):
    """What dropout keeps of ``(entries, width)``, worked out when it is applied.

    Attributes:
        key: From :func:`module_key`.
        rate: From :func:`rate_byte`.
    """

    _bits: Tensor | None = None

    def applied(self, x: Tensor, scale: float = 1.0, *, in_place: bool = False) -> Tensor:
        """Return ``x`` where kept, times ``scale``, and 0 where dropped; no gradient.

        Args:
            x: ``(entries, width)``, or anything of as many entries of that width.
            scale: Of what is kept.
            in_place: Spend ``x`` for the result.
        """
        x = x.contiguous()
        compiled = kernels_for(x)
        if compiled is not None:
            # The mask never exists: drawing it again on the way back costs less than memory.
            out = x if in_place else torch.empty_like(x)
            compiled.drop(x, self, scale, out)
            return out
        width = x.numel() // max(1, self.streams.numel())
        if self._bits is None:
            self._bits = kept_bits(self.streams, self.key, width, self.rate, x.dtype)
        found = masked(x, self._bits.view(x.shape))
        return found if scale == 1.0 else found.mul_(scale)


class Dropout(torch.autograd.Function):
    """``x`` where kept, times the scale; the same for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask, scale: float) -> Tensor:
        """Return a tensor like ``x``."""
        ctx.dropping = mask, scale
        return mask.applied(x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Drop the same elements of the gradient."""
        mask, scale = ctx.dropping
        return mask.applied(grads[0], scale), None, None


def scrambled(state: Tensor, in_place: bool = False) -> Tensor:
    """Scramble 64-bit states by SplitMix64's finaliser; int64 in, int64 out."""
    state = state if in_place else state.clone()
    state.bitwise_xor_(_shifted(state, 30)).mul_(_MIX_1)
    state.bitwise_xor_(_shifted(state, 27)).mul_(_MIX_2)
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(state: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's own shift repeats the sign."""
    return (state >> places).bitwise_and_((1 << (64 - places)) - 1)


def _scrambled(state: NDArray[np.int64]) -> NDArray[np.int64]:
    found = state.view(np.uint64)
    found = (found ^ (found >> np.uint64(30))) * np.int64(_MIX_1).view(np.uint64)
    found = (found ^ (found >> np.uint64(27))) * np.int64(_MIX_2).view(np.uint64)
    return (found ^ (found >> np.uint64(31))).view(np.int64)
