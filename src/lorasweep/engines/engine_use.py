"""What an engine did, whichever it is, as a record that others can keep and show."""

from __future__ import annotations

from lorasweep.core.engine_use import EngineUse
from lorasweep.core.protocols import Engine
from lorasweep.engines.packed import PackedEngine


def use_of(engine: Engine, why: str, trials: int) -> EngineUse:
    """Describe what an engine did so far.

    Args:
        engine: The engine.
        why: Which it is and why, as people were told.
        trials: Trials that were begun with it.
    """
    if not isinstance(engine, PackedEngine):
        return EngineUse(engine=why, trials=trials, lanes=engine.capacity)
    use = engine.use
    return EngineUse(
        engine=why,
        trials=trials,
        lanes=engine.capacity,
        halvings=use.halved,
        bytes_per_lane=use.bytes_per_lane,
        pack_steps=use.steps,
        lane_steps=use.lane_steps,
        empty_places=use.idle_places,
        tokens=use.tokens,
        computed_tokens=use.attended,
        seconds=use.seconds,
        # An accelerator goes on with its steps while the host does something else.
        step_seconds=use.step_seconds if engine.lag == 0 else None,
    )
