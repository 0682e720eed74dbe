"""Nine rows of four lanes, and numbers for them."""

from __future__ import annotations

import torch

from lorasweep.model.lane_spans import LaneSpans
from lorasweep.model.lane_weights import LaneWeights

SPANS = LaneSpans(  # the second lane has no rows
    torch.tensor([3, 3, 8, 9], dtype=torch.int32), torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3]), 5
)
LANES = [range(3), range(3, 3), range(3, 8), range(8, 9)]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def leaf_of(weights: LaneWeights, name: str) -> torch.Tensor:
    """A parameter of all lanes, ``(lanes, *shape)``, where a whole pass leaves its gradient."""
    return weights.part(range(weights.lanes))[name]
