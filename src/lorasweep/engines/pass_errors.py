"""An error in a pass of many lanes: whose it is, so that no other trial fails by it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from lorasweep.core.outcomes import TrialState
from lorasweep.engines.lane import Lane
from lorasweep.model.torch_errors import is_out_of_memory


def fail_culprits(lanes: Sequence[Lane], alone: Callable[[Lane], object], error: Exception) -> None:
    """End the lanes whose own pass fails, as a ``Trainer`` of their own would have failed.

    Gradients that passes have left are dropped when a lane leaves: they count for nothing.

    Args:
        lanes: Those that had rows in the pass.
        alone: Takes the rows of one of them through the base, with nobody else's.
        error: What the pass of all of them raised.

    Raises:
        Exception: ``error``, where every lane fails, or none does: it isn't one trial's own, and
            would spend all trials that are still to come. Or the lack of memory that a pass met.
    """
    traceback.clear_frames(error.__traceback__)  # what they hold is wanted back
    found = {}
    if len(lanes) == 1:
        found[lanes[0]] = error
    else:
        for lane in lanes:
            if (own := _error_in(lane, alone)) is not None:
                found[lane] = own
        if len(found) in (0, len(lanes)):
            raise error
    for lane, own in found.items():
        trace = "".join(traceback.format_exception(own))
        lane.end(TrialState.FAILED, f"{type(own).__name__}: {own}", trace)


def _error_in(lane: Lane, alone: Callable[[Lane], object]) -> Exception | None:
    try:
        alone(lane)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return error
    return None
