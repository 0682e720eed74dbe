"""AdamW for all lanes at once, each with rates, decay, clipping and step count of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasweep.model.kernels import kernels_for
from lorasweep.model.lane_weights import LaneWeights

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


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


def update(weights: LaneWeights, lanes: Sequence[LaneStep]) -> Tensor:
    """Update all lanes by AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    The same arithmetic as ``torch.optim.AdamW`` after ``clip_grad_norm_``, row by row: no
    number of one lane ever meets one of another.

    Args:
        weights: With collected gradients, which are spent.
        lanes: One entry a lane.

    Returns:
        Each lane's gradient norm before clipping, ``(lanes,)``.
    """
    norms = weights.gradient_norms()
    # Columns: clipping norm, rate and root with their bias corrections, shrinking.
    beta_1, beta_2 = BETAS
    rates = torch.tensor(
        [
            (
                lane.max_grad_norm or torch.inf,
                lane.rate / (1 - beta_1**lane.step),
                (1 - beta_2**lane.step) ** 0.5,
                lane.rate * lane.weight_decay,
            )
            for lane in lanes
        ],
        dtype=weights.dtype,
        device=weights.device,
    )
    kernels = kernels_for(weights.weights) if weights.dtype == torch.float32 else None
    if kernels is None:
        _update(weights, norms, rates)
    else:
        kernels.adamw(
            *(weights.weights, weights.gradients, weights.first, weights.second),
            weights.decays,
            norms,
            rates,
            BETAS,
            EPSILON,
            _CLIP_EPSILON,
        )
    return norms


def _update(weights: LaneWeights, norms: Tensor, rates: Tensor) -> None:
    """Do what the compiled loop does, by torch's operations."""
    gradients, first, second = weights.gradients, weights.first, weights.second
    limit, rate, root, shrink = rates.unsqueeze(2).unbind(1)
    beta_1, beta_2 = BETAS
    gradients.mul_((limit / (norms.unsqueeze(1) + _CLIP_EPSILON)).clamp_(max=1.0))
    weights.weights.mul_(1.0 - shrink * weights.decays)
    first.lerp_(gradients, 1 - beta_1)
    second.mul_(beta_2).addcmul_(gradients, gradients, value=1 - beta_2)
    # The gradients are spent: their memory holds the denominator, then the update.
    torch.sqrt(second, out=gradients).div_(root).add_(EPSILON)
    torch.div(first, gradients, out=gradients).mul_(rate)
    weights.weights.sub_(gradients)
