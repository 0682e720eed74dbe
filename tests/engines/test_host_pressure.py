"""Memory of the host that runs low between two steps: let go, then halved, and no trial is lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from recorder import Recorder, keep_nothing

from lorasweep.core.outcomes import TrialState
from lorasweep.core.plans import AdapterPlan, EngineSettings
from lorasweep.engines import host_pressure, memory_lack
from lorasweep.engines.host_pressure import HostPressure
from lorasweep.engines.packed import PackedEngine

LANE = 1 << 30
PLENTY = 100 * LANE


class Host:
    """A machine's free memory; what the heap keeps comes back when it is asked for."""

    def __init__(self, free: int = PLENTY, kept: int = 0) -> None:
        self.free, self.kept, self.asked = free, kept, 0

    def give_back(self) -> None:
        self.asked += 1
        self.free, self.kept = self.free + self.kept, 0


@pytest.fixture
def host(monkeypatch) -> Host:
    machine = Host()
    monkeypatch.setattr(host_pressure, "free_bytes", lambda device: machine.free)
    for module in (host_pressure, memory_lack):
        monkeypatch.setattr(module, "give_freed_memory_back", machine.give_back)
    return machine


@pytest.fixture
def engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    base = open_tiny()

    def make(lanes: int = 4, lane: int | None = LANE) -> PackedEngine:
        settings = EngineSettings(precision="fp32", device="cpu", log_every=1)
        made = PackedEngine(base, *splits, settings, lanes)
        made.use.bytes_per_lane = lane
        return made

    return make


def test_before_the_first_step_all_of_its_lanes_must_fit(engine, host):
    """Linux would grant what it doesn't have, and kill the process in the middle of the step."""
    host.free = 4 * LANE
    assert not HostPressure(engine()).too_many(4)
    host.free = 4 * LANE - 1
    assert HostPressure(engine()).too_many(4)


def test_they_are_halved_until_they_fit(engine, host):
    host.free = 10 * LANE
    pressure = HostPressure(engine(64))
    assert [pressure.too_many(lanes) for lanes in (64, 32, 16, 8)] == [True, True, True, False]


def test_what_was_given_back_elsewhere_must_be_found_again(engine, host):
    pressure = HostPressure(engine())
    assert not pressure.too_many(4)
    host.free = 3 * LANE
    assert not pressure.too_many(4)
    pressure.forget()
    assert pressure.too_many(4)


def test_what_the_heap_keeps_is_there_for_the_next_step(engine, host):
    pressure = HostPressure(engine())
    assert not pressure.too_many(4)
    host.free = LANE  # the first step took the rest, and will take no more
    assert not pressure.too_many(4)
    assert host.asked == 0
    assert pressure.too_many(6)  # two more lanes


def test_what_the_heap_keeps_for_nothing_is_given_back_first(engine, host):
    made = engine()
    made.model.shared.most_bytes = 77
    pressure = HostPressure(made)
    assert not pressure.too_many(4)
    host.free, host.kept = LANE // 2, 8 * LANE
    assert not pressure.too_many(4)
    assert host.asked == 1
    assert made.model.shared.most_bytes == 77, "kept layers need not go"


def test_then_kept_layers_go(engine, host):
    made = engine()
    made.model.shared.most_bytes = 77
    pressure = HostPressure(made)
    assert not pressure.too_many(4)
    host.free = LANE // 2
    assert pressure.too_many(4)
    assert made.model.shared.most_bytes == 0


def test_without_a_measured_lane_only_the_reserve_counts(engine, host):
    pressure = HostPressure(engine(lane=None))
    host.free = 200 << 20
    assert not pressure.too_many(16)
    host.free = 100 << 20
    assert pressure.too_many(16)


def test_one_lane_goes_on_whatever_is_left_and_all_else_goes(engine, host):
    made = engine()
    made.model.shared.most_bytes = 77
    host.free, host.kept = 0, LANE // 2
    assert not HostPressure(made).too_many(1)
    assert host.asked
    assert made.model.shared.most_bytes == 0


def test_one_lane_whose_step_the_heap_holds_is_left_in_peace(engine, host):
    """Giving memory back before each step would have each step ask for it again."""
    pressure = HostPressure(engine())
    assert not pressure.too_many(1)
    host.free = LANE // 2
    assert not pressure.too_many(1)
    assert host.asked == 0
    assert not pressure.too_many(0)  # all have ended


def test_lanes_are_halved_in_time_and_nothing_is_lost(engine, host, make_plan):
    plans = [
        make_plan(n, seed=n, epochs=epochs, adapter=AdapterPlan(4, 4.0 * n))
        for n, epochs in enumerate((3, 1, 2, 3, 2, 1), start=1)
    ]
    expected = Recorder(keep_nothing)
    assert all(o.state is TrialState.COMPLETED for o in engine().run(plans, expected))
    made = engine()
    sizes: list[int] = []

    class Watched(Recorder):
        def stepped(self, report):
            sizes.append(made.model.lanes)
            if report.step == 3 and report.trial == 1:
                host.free = LANE // 2  # another program has taken the rest
            super().stepped(report)

    found = Watched(keep_nothing)
    outcomes = list(made.run(plans, found))
    assert {o.trial: o.state for o in outcomes} == dict.fromkeys(range(1, 7), TrialState.COMPLETED)
    assert sizes[:12] == [4] * 12
    assert set(sizes[12:]) == {1}
    assert made.use.halved == 2
    assert found.shrunk == [(2, "memory is running out"), (1, "memory is running out")]
    for plan in plans:
        n = plan.number
        assert len(found.losses[n]) == len(expected.losses[n])
        np.testing.assert_allclose(found.losses[n], expected.losses[n], rtol=0, atol=1e-5)


def test_the_real_machine_has_room_for_tiny_models(engine, make_plan):
    """Nothing is taken for a lack where there is none: also on a machine in full use."""
    made = engine(lane=1000)
    list(made.run([make_plan(n) for n in (1, 2)], Recorder(keep_nothing)))
    assert made.use.halved == 0
