"""Memory that ran out: noticed, said, and let go of."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lorasweep.core.plans import TrialPlan
from lorasweep.model.heap import give_freed_memory_back
from lorasweep.model.torch_errors import is_of_onednns_code, is_out_of_memory

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine

_log = logging.getLogger(__name__)


def lack_in(act: Callable[[], None]) -> str | None:
    """Do something, and return the traceback where memory ran out; None where it didn't.

    The error holds the frames it went through, and they hold all that was computed in them:
    only when it is gone there is memory to go on with.
    """
    try:
        act()
        return None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if is_of_onednns_code(error):
            _do_without_onednn()
        trace = "".join(traceback.format_exception(error))
        traceback.clear_frames(error.__traceback__)
    return trace


def let_go(engine: PackedEngine) -> None:
    """Let go of what a pass left, of what can be computed again, and of what is kept for later.

    Lower layers are computed in every pass from now on: a trial is worth more than time.
    """
    engine.model.weights.drop_gradients()
    engine.model.shared.most_bytes = 0
    engine.model.shared.forget()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_freed_memory_back()


def _do_without_onednn() -> None:
    """Let torch compute by itself what oneDNN would compile code for.

    Once it has found no room for code, oneDNN was seen to refuse all that it had yet to compile,
    with half a GiB to spare: every later step would fail.
    """
    torch.backends.mkldnn.set_flags(False)
    _log.warning(
        "oneDNN found no memory for its code and compiles none after that: "
        "going on without it, slower"
    )


def needs_too_much(plan: TrialPlan) -> str:
    """Say that memory ran out for a trial alone, and what would need less."""
    return (
        f"out of memory at batch size {plan.batch_size} and rank {plan.adapter.rank}; "
        "a smaller batch_size or model.max_length needs less"
    )
