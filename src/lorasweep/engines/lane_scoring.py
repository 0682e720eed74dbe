"""The validation rows, scored with many lanes at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorasweep.engines.lane import Lane, PackUse
from lorasweep.engines.packing import length_batches
from lorasweep.model.packed_batch import LaneRows, PackedBatch
from lorasweep.model.packed_lora import PackedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasweep.engines.packed import PackedEngine

# Rows to score for each row to train on, at most: what that takes is measured beside a step.
SCORED_ROWS = 4


def validation_logits(
    engine: PackedEngine, lanes: Sequence[Lane], due: Sequence[Lane]
) -> list[NDArray[np.float32]]:
    """Score every validation row with some of the lanes.

    Args:
        engine: Model, rows, and where tokens are counted.
        lanes: All lanes of the pack, in the order of their weights.
        due: Those to score with.

    Returns:
        For each lane of ``due`` its logits, ``(validation rows, labels)``, in row order.
    """
    split = engine.validation
    batches = length_batches(split, _rows_at_once(due, engine.settings.eval_batch_size))
    nothing, found, use = np.zeros(0, dtype=np.int64), [], PackUse()
    for rows in batches:
        entries = [LaneRows(rows if lane in due else nothing) for lane in lanes]
        parts = engine.passes.lay_out(split, entries, training=False)
        found += engine.passes.each(partial(_score, engine.model), parts)
        use.count_tokens(parts)
    engine.use.add_tokens(use)  # only now: what fails is done again
    logits: Any = torch.cat(found).cpu().numpy()  # one wait for an accelerator, at the end
    scored = [np.zeros((len(split), logits.shape[1]), dtype=np.float32) for _ in due]
    at = 0
    for rows in batches:
        for result in scored:
            result[rows] = logits[at : at + len(rows)]
            at += len(rows)
    return scored


def _rows_at_once(due: Sequence[Lane], most: int) -> int:
    """Rows of each lane in a pass, at most what the memory was measured for that lanes need."""
    of_a_step = sum(lane.plan.batch_size for lane in due)
    return min(most, SCORED_ROWS * of_a_step // len(due))


@torch.no_grad()
def _score(model: PackedModel, batch: PackedBatch) -> torch.Tensor:
    return model.forward(batch, training=False).float()
