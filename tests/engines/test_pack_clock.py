"""After a kill, lanes at different moments end in the order in which they would have ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from lorasweep.core.outcomes import (
    EpochEvaluation,
    Outcome,
    StepReport,
    TrialFacts,
    TrialState,
    Verdict,
)
from lorasweep.core.plans import EngineSettings, Resumption, TrialPlan
from lorasweep.engines.lane_checkpoint import LaneCheckpoints
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.pack_run import PackRun
from lorasweep.engines.packed import PackedEngine


@dataclass
class Sweep:
    """What a worker is to an engine: points, told again where they were cut off, and a log.

    ``log`` has what happened in the order in which it happened, by the pack's own clock.
    """

    plans: list[TrialPlan]
    log: list[tuple[object, ...]] = field(default_factory=list)
    ended: dict[int, Outcome] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=dict)
    resumed: dict[int, int] = field(default_factory=dict)
    kill: Callable[[tuple[object, ...]], bool] = lambda entry: False

    def carry_on(self, engine: PackedEngine) -> None:
        waiting = [plan for plan in self.plans if plan.number in self.begins.keys() - self.ended]
        clock = max((outcome.clock for outcome in self.ended.values()), default=0)
        plans = self._plans(waiting)
        for outcome in engine.run(plans, self, Resumption(len(waiting), clock)):
            assert outcome.state is TrialState.COMPLETED, outcome.reason
            self.ended[outcome.trial] = outcome
            self._log("ended", outcome.trial, outcome.clock)

    def _plans(self, waiting: Iterable[TrialPlan]) -> Iterator[TrialPlan]:
        for plan in waiting:
            yield dataclasses.replace(plan, begins=self.begins[plan.number])
        for plan in self.plans:
            if plan.number in self.begins:
                continue
            clock = max((outcome.clock for outcome in self.ended.values()), default=0)
            self.begins[plan.number] = clock
            self._log("asked", plan.number, clock)
            yield dataclasses.replace(plan, begins=clock)

    def started(self, trial: int, facts: TrialFacts) -> None:
        self.resumed[trial] = facts.resumed_step

    def stepped(self, report: StepReport) -> None:
        pass

    def shrank(self, lanes: int, why: str) -> None:
        raise AssertionError(f"{why}: {lanes} lanes; no clock was meant to be held to that")

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        self._log("evaluated", evaluation.trial, evaluation.epoch)
        return Verdict(True, True)

    def _log(self, *entry: object) -> None:
        if entry not in self.log:  # what is told again is in its place already
            self.log.append(entry)
        if self.kill(entry):
            self.kill = lambda entry: False
            raise KeyboardInterrupt


@pytest.fixture
def make_engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    base = open_tiny()

    def make(lanes: int = 3) -> PackedEngine:
        settings = EngineSettings(precision="fp32", device="cpu", checkpoint_seconds=1e9)
        return PackedEngine(base, *splits, settings, lanes)

    return make


@pytest.fixture
def plans(make_plan) -> list[TrialPlan]:
    """Steps: 8, 10, 12, 4, 18, 8; the first and the fourth could end together with others."""
    changes: list[dict] = [
        {"epochs": 2},
        {"epochs": 1, "batch_size": 3},
        {"epochs": 3},
        {"epochs": 1},
        {"epochs": 3, "batch_size": 5},
        {"epochs": 2},
    ]
    return [make_plan(n, seed=n, **change) for n, change in enumerate(changes, start=1)]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves no time to save anything."""
    monkeypatch.setattr(PackRun, "_save_before_stopping", lambda self: None)


MOMENTS: dict[str, Callable[[tuple[object, ...]], bool]] = {
    "a first point was asked for": lambda entry: entry[:2] == ("asked", 2),
    "one of two epochs of a step was told": lambda entry: entry == ("evaluated", 1, 1),
    "a last epoch was told": lambda entry: entry == ("evaluated", 1, 2),
    "an outcome was told": lambda entry: entry[:2] == ("ended", 1),
    "one of two outcomes of a step was told": lambda entry: entry[:2] == ("ended", 3),
    "a place was filled again": lambda entry: entry[:2] == ("asked", 5),
    "there were no points left": lambda entry: entry == ("evaluated", 5, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_all_happens_in_the_order_in_which_it_would(
    moment, make_engine, plans, killed
):
    straight = Sweep(plans)
    straight.carry_on(make_engine())
    ends = [entry[1:] for entry in straight.log if entry[0] == "ended"]
    # Each of the moments is one of this sweep, two outcomes of one step among them.
    assert ends == [(1, 8), (2, 10), (3, 12), (4, 12), (6, 20), (5, 28)]
    cut = Sweep(plans, kill=MOMENTS[moment])
    with pytest.raises(KeyboardInterrupt):
        cut.carry_on(make_engine())
    assert len(cut.log) < len(straight.log)
    cut.carry_on(make_engine())
    assert cut.log == straight.log
    assert cut.begins == straight.begins


def test_a_kill_between_two_files_of_one_round_changes_no_order(
    make_engine, plans, killed, monkeypatch
):
    straight = Sweep(plans)
    straight.carry_on(make_engine())

    class Stop(BaseException):
        pass

    def save_first(self, lanes, state_of):
        """As if the round had come to its first file: lanes 2 and 3 stay at their beginning."""
        pack = list(lanes)
        if pack[0].progress.step == 7:
            save(self, pack[:1], state_of)
            raise Stop

    save = LaneCheckpoints.save
    cut = Sweep(plans)
    with monkeypatch.context() as patch:
        patch.setattr(LaneCheckpoints, "save", save_first)
        patch.setattr(LaneCheckpoints, "due", True)
        with pytest.raises(Stop):
            cut.carry_on(make_engine())
    assert [plan.number for plan in plans if plan.checkpoint.exists()] == [1]
    cut.carry_on(make_engine())
    assert {n: cut.resumed[n] for n in (1, 2, 3)} == {1: 7, 2: 0, 3: 0}
    assert cut.log == straight.log


def test_a_second_kill_while_others_wait_changes_no_order_either(make_engine, plans, killed):
    straight = Sweep(plans)
    straight.carry_on(make_engine())
    cut = Sweep(plans, kill=MOMENTS["an outcome was told"])
    with pytest.raises(KeyboardInterrupt):
        cut.carry_on(make_engine())
    cut.kill = MOMENTS["one of two outcomes of a step was told"]
    with pytest.raises(KeyboardInterrupt):
        cut.carry_on(make_engine())
    cut.carry_on(make_engine())
    assert cut.log == straight.log


@pytest.mark.parametrize(("lanes", "steps"), [(3, 12), (2, 10)])
def test_with_another_number_of_lanes_nobody_waits(lanes, steps, make_engine, plans, killed):
    cut = Sweep(plans[:3], kill=MOMENTS["an outcome was told"])
    with pytest.raises(KeyboardInterrupt):
        cut.carry_on(make_engine(3))
    made = make_engine(lanes)
    cut.carry_on(made)
    # 2 begins again and has 10 steps to go; 3 has 4, after its second epoch at step 8.
    assert (cut.resumed[2], cut.resumed[3]) == (0, 8)
    assert (made.use.steps, made.use.lane_steps) == (steps, 14)


@pytest.mark.parametrize("waiting", ["due", "ended"])
def test_no_new_point_is_asked_for_before_all_that_ended_was_told(waiting):
    places = PackPlaces(SimpleNamespace(capacity=3), Resumption(trials=0, clock=4))
    lane = SimpleNamespace(due=False, outcome=None)
    places.lanes.append(lane)
    assert not places.wants_plan  # the last outcome that was told lies ahead
    places.clock = 4
    assert places.wants_plan
    if waiting == "due":
        lane.due = True
    else:
        lane.outcome = object()
    assert not places.wants_plan
