"""From a plan to a lane, or to how its trial failed before the first step."""

from __future__ import annotations

import time
import traceback
from typing import TYPE_CHECKING

from lorasweep.core.errors import StorageError
from lorasweep.core.outcomes import Outcome, TrialState
from lorasweep.core.plans import TrialPlan
from lorasweep.engines.lane import Lane
from lorasweep.engines.memory_lack import needs_too_much
from lorasweep.model.torch_errors import is_out_of_memory

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine


def build_lane(
    engine: PackedEngine, plan: TrialPlan, clock: int, *, last_try: bool
) -> Lane | Outcome | None:
    """Build a plan's lane.

    Args:
        engine: Builds it.
        plan: The trial.
        clock: The pack's.
        last_try: There is no memory left that could be freed for it.

    Returns:
        The lane; or the outcome of a trial that can't be built; None where memory ran out and
        may be there later.

    Raises:
        StorageError: The disk concerns all trials.
    """
    began = time.perf_counter()
    try:
        return engine.build(plan)
    except StorageError:
        raise
    except Exception as error:
        lacking = is_out_of_memory(error)
        reason = needs_too_much(plan) if lacking else f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)  # what they hold is wanted back
    if lacking and not last_try:
        return None
    return Outcome(
        plan.number,
        TrialState.FAILED,
        0,
        time.perf_counter() - began,
        reason,
        trace,
        max(plan.begins, clock),
    )
