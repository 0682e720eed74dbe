"""AdamW for all lanes at once, each with rates, decay, clipping and step count of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        weights: With collected gradients; they are clipped in place.
        lanes: One entry a lane.

    Returns:
        Each lane's gradient norm before clipping, ``(lanes,)``.
    """
    gradients, first, second = weights.gradients, weights.first, weights.second
    norms = weights.gradient_norms()

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=weights.dtype, device=weights.device).unsqueeze(1)

    limit = column([lane.max_grad_norm or torch.inf for lane in lanes])
    gradients.mul_((limit / (norms.unsqueeze(1) + _CLIP_EPSILON)).clamp_(max=1.0))
    if any(lane.weight_decay for lane in lanes):
        shrink = column([-lane.rate * lane.weight_decay for lane in lanes])
        weights.weights.mul_((shrink * weights.decays).add_(1.0))
    beta_1, beta_2 = BETAS
    first.lerp_(gradients, 1 - beta_1)
    second.mul_(beta_2).addcmul_(gradients, gradients, value=1 - beta_2)
    root = column([(1 - beta_2**lane.step) ** 0.5 for lane in lanes])
    rate = column([-lane.rate / (1 - beta_1**lane.step) for lane in lanes])
    # The gradients are spent: their memory holds the denominator, then the update.
    torch.sqrt(second, out=gradients).div_(root).add_(EPSILON)
    torch.div(first, gradients, out=gradients).mul_(rate)
    weights.weights.add_(gradients)
    return norms
