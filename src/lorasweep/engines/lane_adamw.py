"""AdamW for all lanes at once, each with rates, decay, clipping and step count of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorasweep.model.lane_weights import LaneWeights
from lorasweep.model.torch_errors import first_line, is_of_the_compiler, is_of_the_device
from lorasweep.model.transfer import on_device

_log = logging.getLogger(__name__)

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it
_TRIED = 40_000
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

_PLAIN = "AdamW takes several kernels a step instead of one: %s"

Arithmetic = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class LaneStep:
    """One lane's part in an optimizer step.

    Attributes:
        rate: Learning rate.
        weight_decay: Decoupled decay.
        max_grad_norm: Clip the lane's gradient to this norm; 0 for no clipping.
        step: The lane's own count with this step, ≥ 1.
    """

    rate: float
    weight_decay: float
    max_grad_norm: float
    step: int


class LaneAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) for the lanes of a pack.

    The same arithmetic as ``torch.optim.AdamW`` after ``clip_grad_norm_``, row by row: no
    number of one lane ever meets one of another. On CUDA it is compiled, which as a rule makes
    one kernel of it, where that has shown on this very device that it does the same.

    Args:
        device: Where the lanes' weights lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._arithmetic: Arithmetic = adamw
        if device.type == "cuda":
            self._arithmetic = proven(_compiled, device)

    def update(self, weights: LaneWeights, lanes: Sequence[LaneStep]) -> Tensor:
        """Update all lanes. Memory can run out only before weights or moments have changed.

        Args:
            weights: With collected gradients; they are spent.
            lanes: One entry a lane.

        Returns:
            Each lane's gradient norm before clipping, ``(lanes,)``.
        """
        norms = weights.gradient_norms()
        beta_1, beta_2 = BETAS
        numbers = [
            [lane.max_grad_norm or np.inf for lane in lanes],
            [-lane.rate * lane.weight_decay for lane in lanes],
            [(1 - beta_2**lane.step) ** 0.5 for lane in lanes],
            [-lane.rate / (1 - beta_1**lane.step) for lane in lanes],
        ]
        (columns,) = on_device([np.array(numbers, dtype=_DTYPES[weights.dtype])], weights.device)
        inputs = (
            weights.weights,
            weights.gradients,
            weights.first,
            weights.second,
            weights.decays,
            norms,
            columns.unsqueeze(2),
        )
        try:
            self._arithmetic(*inputs)
        except Exception as error:
            # Other shapes may be compiled anew; what can't be compiled has changed nothing yet.
            if self._arithmetic is adamw or not is_of_the_compiler(error):
                raise
            self._arithmetic = adamw
            _log.warning(_PLAIN, first_line(error))
            adamw(*inputs)
        return norms


def adamw(
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    decays: Tensor,
    norms: Tensor,
    columns: Tensor,
) -> None:
    """Do the arithmetic of :class:`LaneAdamW`, in place.

    Args:
        weights: As in ``LaneWeights``, like all of these.
        gradients: They are spent.
        first: Moments.
        second: Moments of the squares.
        decays: 1 where weight decay applies, ``(numbers a lane,)``.
        norms: Of the gradients, ``(lanes,)``.
        columns: Clipping norm, minus rate times decay, the root of the second moment's bias
            correction, and minus the rate over the first one's: ``(4, lanes, 1)``.
    """
    limit, shrink, root, rate = columns.unbind()
    beta_1, beta_2 = BETAS
    gradients.mul_((limit / (norms.unsqueeze(1) + _CLIP_EPSILON)).clamp_(max=1.0))
    weights.mul_((shrink * decays).add_(1.0))
    first.lerp_(gradients, 1 - beta_1)
    second.mul_(beta_2).addcmul_(gradients, gradients, value=1 - beta_2)
    # The gradients are spent: their memory holds the denominator, then the update.
    torch.sqrt(second, out=gradients).div_(root).add_(EPSILON)
    torch.div(first, gradients, out=gradients).mul_(rate)
    weights.add_(gradients)


def proven(make: Callable[[], Arithmetic], device: torch.device) -> Arithmetic:
    """Return another way to do :func:`adamw` if it does the same; else that, and log why.

    Args:
        make: Makes it. There may be no compiler, or one that gets it wrong.
        device: Where it shall serve.
    """
    draw = torch.Generator().manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch's compiler says of torch's own code
            fused = make()
            for lanes in (3, 1):  # a single lane is compiled by itself
                # As many numbers as an adapter has: the compiler lays its blocks out for them.
                shapes = [(lanes, _TRIED)] * 4 + [(_TRIED,), (lanes,), (4, lanes, 1)]
                inputs = [torch.rand(shape, generator=draw).to(device) for shape in shapes]
                expected = [tensor.clone() for tensor in inputs]
                adamw(*expected)
                fused(*inputs)
                torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-6)
    except Exception as error:
        if is_of_the_device(error):
            raise  # whatever is done there from now on fails, and this is why
        _log.warning(_PLAIN, first_line(error))
        return adamw
    return fused


def _compiled() -> Arithmetic:
    found: Arithmetic = torch.compile(adamw, dynamic=True, fullgraph=True)
    return found
