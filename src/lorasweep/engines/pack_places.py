"""The places of a pack: who trains, who waits outside, and what time it is.

Who ends first decides what a sampler knows when it is asked, and a kill leaves every lane at a
checkpoint of another moment. So a pack has a clock: it counts steps over the whole sweep, and
stands in every checkpoint and outcome. A pack that goes on starts at the earliest time that any
of its lanes is at, and lanes that were further wait outside until it comes to theirs. Then all
end, and are asked for, in the order in which they would have ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorasweep.core.plans import Resumption, TrialPlan
from lorasweep.engines.lane import Lane
from lorasweep.model.lane_weights import LaneState

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine


class PackPlaces:
    """The lanes of one run.

    Args:
        engine: Has the model, and says how many places there are.
        resumption: Where earlier commands left the clock.

    Attributes:
        lanes: Those in the pack, in the order in which their plans came.
        parked: Those outside: memory ran out, or their time has not come.
        clock: Steps of the pack over the whole sweep.
        held: A plan whose lane found no memory, with its turn: the next one to be built.
        exhausted: No plan is left.
        whole: No lane is half-way from one state to the next.
    """

    def __init__(self, engine: PackedEngine, resumption: Resumption) -> None:
        self.lanes: list[Lane] = []
        self.parked: list[Lane] = []
        self.clock = 0
        self.held: tuple[TrialPlan, int] | None = None
        self.exhausted = False
        self.whole = True
        self._engine = engine
        self._resumption = resumption
        self._turns = 0

    @property
    def everyone(self) -> list[Lane]:
        """All lanes under way."""
        return [*self.lanes, *self.parked]

    @property
    def due(self) -> list[Lane]:
        """Lanes whose epoch is to be evaluated."""
        return [lane for lane in self.lanes if lane.due]

    @property
    def ended(self) -> list[Lane]:
        """Lanes whose outcome is to be given out."""
        return [lane for lane in self.lanes if lane.outcome is not None]

    @property
    def going(self) -> list[Lane]:
        """Lanes in the pack that have not ended."""
        return [lane for lane in self.lanes if lane.outcome is None]

    @property
    def idle(self) -> int:
        """Places without a lane while plans remain."""
        return 0 if self.exhausted else max(0, self._engine.capacity - len(self.lanes))

    @property
    def wants_plan(self) -> bool:
        """Whether the next plan is to be asked for now.

        Trials that were cut off are, at once: only their checkpoints say what time it is. A new
        point is only when all that ended up to now was told, also what will be told once more.
        """
        if self.exhausted or len(self.everyone) >= self._engine.capacity:
            return False
        if self.held is not None:
            return True  # it was asked for when it was its time
        if self._turns < self._resumption.trials or not self.everyone:
            return True
        return self.clock >= self._resumption.clock and not self.due and not self.ended

    def take_turn(self) -> int:
        """Number the plan that was just taken."""
        self._turns += 1
        return self._turns - 1

    def admit(self, lane: Lane) -> None:
        """Give a lane that was just built its number, and let it wait for its time."""
        taken = {other.place for other in self.everyone}
        lane.place = min(set(range(len(taken) + 1)) - taken)
        self.parked.append(lane)

    def enter(self) -> None:
        """Let in everyone whose time has come, as far as there is room.

        Where memory runs out, whoever isn't in yet is still outside as before.
        """
        if not self.lanes and self.parked:
            self.clock = max(self.clock, self._first_time())
        for lane in self._at_the_door:
            if len(self.lanes) < self._engine.capacity:
                self._enter(lane)
        in_order = sorted(self.lanes, key=lambda lane: lane.turn)
        if in_order != self.lanes:
            self.keep(in_order)

    def turn_away(self) -> Lane:
        """Take out for good whoever is the next to be let in."""
        lane = self._at_the_door[0]
        self.parked.remove(lane)
        return lane

    @property
    def _at_the_door(self) -> list[Lane]:
        """Lanes outside whose time has come."""
        return [lane for lane in self.parked if lane.clock <= self.clock]

    def _first_time(self) -> int:
        """When the pack goes on."""
        times = [lane.clock for lane in self.parked]
        if all(lane.places in (None, self._engine.capacity) for lane in self.parked):
            return min(times)
        # Among more or fewer lanes the order is another one anyway: nobody needs to wait.
        return max(*times, self._resumption.clock)

    def _enter(self, lane: Lane) -> None:
        model = self._engine.model
        with self.changing():
            # Nothing else changes before there was memory for it.
            if lane.parked is None:
                model.add_lane(lane.adapter, lane.settings)
            else:
                model.restore_lane(lane.adapter, lane.settings, lane.parked)
                lane.parked = None
            self.parked.remove(lane)
            self.lanes.append(lane)

    def keep(self, kept: list[Lane]) -> None:
        """Keep only these lanes in the pack, in this order.

        Memory can run out only where the order is another one; then nothing has changed.
        """
        with self.changing():
            self._engine.model.keep_lanes([self.lanes.index(lane) for lane in kept])
            self.lanes = kept

    def park_half(self) -> None:
        """Take the later half of the lanes that go on out as they are."""
        self.park_all_but(max(1, len(self.going) // 2))

    def park_all_but(self, stay: int) -> None:
        """Take the lanes that go on out as they are, but for so many; or nobody without memory."""
        later = self.going[stay:]
        states = [self.state_of(lane) for lane in later]
        with self.changing():
            for lane, state in zip(later, states, strict=True):
                lane.parked = state
            self.parked += later
            self.keep([lane for lane in self.lanes if lane not in later])

    def tick(self) -> None:
        """Count a step of all lanes in the pack."""
        self.clock += 1
        for lane in self.lanes:
            lane.clock, lane.places = self.clock, self._engine.capacity

    def state_of(self, lane: Lane) -> LaneState:
        """A lane's weights and moments now."""
        if lane.parked is not None:
            return lane.parked
        return self._engine.model.lane_state(self.lanes.index(lane), lane.adapter)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark lanes that are half-way from one state to the next: none of them may be saved."""
        self.whole = False
        yield
        self.whole = True
