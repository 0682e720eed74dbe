"""Memory of the host that is about to run out, seen before the kernel kills the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasweep.engines.lane_memory import free_bytes
from lorasweep.engines.memory_lack import let_go
from lorasweep.engines.packing import lanes_fit
from lorasweep.model.heap import give_freed_memory_back

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine

# What else a process needs that has no room left: MLflow, Optuna, and the pages of their files.
_RESERVE = 128 << 20


class HostPressure:
    """Watches the host's memory between the steps of a pack that computes on the CPU.

    Linux grants memory that it may not have, and kills whoever then writes to it (so does the
    cgroup of a container or of a batch job): no error comes that halving could answer. An
    accelerator's allocator refuses, so there nothing needs to be foreseen.

    Args:
        engine: Says what a lane takes, where that was measured.
    """

    def __init__(self, engine: PackedEngine) -> None:
        self._engine = engine
        # Lanes whose step the heap has held since memory was last given back. It keeps what a
        # step frees, so the next step of as many finds its memory there.
        self._held = 0

    def too_many(self, lanes: int) -> bool:
        """See whether a step of so many lanes has memory; where it hasn't, let go of what can go.

        Args:
            lanes: Those that are to take the next step.

        Returns:
            Whether fewer of them must go on. One lane never is too many: its trial has no other
            way than to go on with what could be let go of.
        """
        if self._engine.device.type != "cpu" or not lanes:
            return False
        # Without room for one lane more, several are too many; a lane alone needs only its own.
        more = max(lanes - self._held, 1 if lanes > 1 else 0)
        if self._has_room(more):
            self._held = max(self._held, lanes)
            return False
        self.forget()
        give_freed_memory_back()
        if not self._fit(lanes):
            let_go(self._engine)
            if lanes > 1 and not self._fit(lanes):
                return True
        self._held = lanes
        return False

    def forget(self) -> None:
        """Note that memory was given back: all lanes of the next step must find room anew."""
        self._held = 0

    def _has_room(self, more: int) -> bool:
        return free_bytes(self._engine.device) >= max(_RESERVE, more * self._lane)

    def _fit(self, lanes: int) -> bool:
        free = free_bytes(self._engine.device)
        return free >= _RESERVE and lanes_fit(free, self._lane, lanes)

    @property
    def _lane(self) -> int:
        """Bytes that a lane takes; 0 where nobody has measured it."""
        return self._engine.use.bytes_per_lane or 0
