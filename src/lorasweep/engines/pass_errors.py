"""An error in a pass of many lanes: whose it is, so that no other trial fails by it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

from lorasweep.core.outcomes import TrialState
from lorasweep.engines.lane import Lane
from lorasweep.model.torch_errors import first_line, is_of_the_device, is_out_of_memory


def fail_culprits(
    lanes: Sequence[Lane],
    others: Sequence[Lane],
    alone: Callable[[Lane], object],
    error: Exception,
) -> None:
    """End the lanes whose own pass fails, as a ``Trainer`` of their own would have failed.

    To be called when ``error`` isn't being handled any more, or it would stand in the traceback
    of every error that is met here.

    Gradients that passes have left are dropped when a lane leaves: they count for nothing.

    Args:
        lanes: Those that had rows in the pass.
        others: Those that had none; where all of ``lanes`` fail, one of them shows whether any
            lane would.
        alone: Takes the rows of one lane through the base, with nobody else's.
        error: What the pass of all of them raised.

    Raises:
        Exception: ``error``, where every lane fails or none does, or where it is the device's: it
            isn't one trial's own, and would spend all trials that are still to come. Or the lack
            of memory that a pass met.
    """
    traceback.clear_frames(error.__traceback__)  # what they hold is wanted back
    if is_of_the_device(error):
        raise error
    found = {lanes[0]: error} if len(lanes) == 1 else _found(lanes, alone)
    if not found:
        raise error
    if len(found) == len(lanes):
        if others and _found(others[:1], alone):
            raise error
        if not others and len(lanes) > 1:
            raise error
    for lane, own in found.items():
        trace = "".join(traceback.format_exception(own))
        lane.end(TrialState.FAILED, first_line(own), trace)


def _found(lanes: Sequence[Lane], alone: Callable[[Lane], object]) -> dict[Lane, Exception]:
    """Return the errors of those that fail alone."""
    found: dict[Lane, Exception] = {}
    for lane in lanes:
        try:
            alone(lane)
        except Exception as error:
            if is_out_of_memory(error) or is_of_the_device(error):
                raise
            traceback.clear_frames(error.__traceback__)
            found[lane] = error
    return found
