"""Memory that runs out while a lane is built or let in: fewer lanes, and no trial is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recorder import Recorder, keep_nothing

from lorasweep.core.outcomes import Outcome, TrialState
from lorasweep.core.plans import (
    NOTHING_BEFORE,
    AdapterPlan,
    EngineSettings,
    Resumption,
    TrialPlan,
)
from lorasweep.engines.memory_lack import lack_in
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.packed import PackedEngine
from lorasweep.model.lane_weights import LaneWeights
from lorasweep.model.packed_lora import LaneSettings

NEIGHBOURS = 1e-5  # sums are taken in another order among other rows
ALONE = "out of memory at batch size 8 and rank 4; a smaller batch_size or model.max_length"


@pytest.fixture
def engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    base = open_tiny()

    def make(lanes: int = 4) -> PackedEngine:
        settings = EngineSettings(
            precision="fp32", device="cpu", log_every=1, checkpoint_seconds=1e9
        )
        return PackedEngine(base, *splits, settings, lanes)

    return make


@pytest.fixture
def plans(make_plan) -> list[TrialPlan]:
    """Four, and two that take the places of the second (at step 4) and of the third (at 8)."""
    return [
        make_plan(n, seed=n, epochs=epochs, adapter=AdapterPlan(4, 4.0 * n))
        for n, epochs in enumerate((3, 1, 2, 3, 2, 1), start=1)
    ]


def test_onednn_is_done_without_once_it_found_no_room_for_code(caplog):
    def step() -> None:
        raise RuntimeError("could not create a primitive")

    assert torch.backends.mkldnn.enabled
    try:
        assert "could not create a primitive" in lack_in(step)
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.set_flags(True)
    assert "going on without it" in caplog.text
    full = lacking(lambda: None, lambda _: True)
    assert "CUDA out of memory" in lack_in(full)
    assert torch.backends.mkldnn.enabled


def lacking(original: Callable, when: Callable[[int], bool]) -> Callable:
    """What runs out of memory at some of its calls, counted from 1."""
    calls: list[object] = []

    def limited(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if when(len(calls)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **kwargs)

    return limited


def run(
    engine: PackedEngine,
    plans: Iterable[TrialPlan],
    when_asked: Callable[[int, Recorder], None] = lambda number, recorder: None,
    resumption: Resumption = NOTHING_BEFORE,
) -> tuple[Recorder, dict[int, Outcome]]:
    recorder, outcomes = Recorder(keep_nothing), {}

    def one_by_one() -> Iterator[TrialPlan]:
        for plan in plans:
            when_asked(plan.number, recorder)
            yield plan

    for outcome in engine.run(one_by_one(), recorder, resumption):
        outcomes[outcome.trial] = outcome
    return recorder, outcomes


def assert_undisturbed(
    found: tuple[Recorder, dict[int, Outcome]], expected: Recorder, plans: list[TrialPlan]
) -> None:
    """Hold these trials to a run that has all the memory it wants."""
    recorder, outcomes = found
    assert {n: (o.state, o.steps) for n, o in outcomes.items()} == {
        plan.number: (TrialState.COMPLETED, 4 * plan.epochs) for plan in plans
    }
    for plan in plans:
        n = plan.number
        told = [(type(x), x.step) for x in recorder.told[n]]
        assert told == [(type(x), x.step) for x in expected.told[n]]  # no step twice
        np.testing.assert_allclose(recorder.losses[n], expected.losses[n], rtol=0, atol=NEIGHBOURS)
        np.testing.assert_allclose(recorder.logits[n], expected.logits[n], rtol=0, atol=NEIGHBOURS)


@pytest.fixture
def straight(engine, plans) -> Recorder:
    return run(engine(), plans)[0]


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("build", 2),  # of the first fill: nobody is in yet
        ("add_lane", 2),
        ("add_lane", 4),
        ("build", 5),  # of a refill
        ("add_lane", 5),
    ],
)
def test_who_finds_no_memory_comes_next_while_half_go_on(
    what, call, engine, plans, straight, monkeypatch
):
    made, sizes = engine(), []
    owner, tick = made if what == "build" else made.model, PackPlaces.tick
    monkeypatch.setattr(owner, what, lacking(getattr(owner, what), lambda n: n == call))

    def count(places: PackPlaces) -> None:
        sizes.append((len(places.lanes), made.capacity))
        tick(places)

    monkeypatch.setattr(PackPlaces, "tick", count)

    def nobody_before(number: int, recorder: Recorder) -> None:
        """Who comes after the one that waits; four are asked for before anyone is let in."""
        if number > call and (what == "build" or number > 4):
            assert recorder.facts.keys() >= {call}
            assert what == "build" or recorder.steps[call]

    found = run(made, plans, nobody_before)
    assert (made.use.halved, made.capacity) == (1, 2)
    assert sizes[0] == ((4, 4) if call == 5 else (2, 2))
    assert {size for size, capacity in sizes if capacity == 2} <= {1, 2}
    assert list(found[0].facts) == [1, 2, 3, 4, 5, 6]
    assert_undisturbed(found, straight, plans)


def test_nobody_is_asked_for_while_someone_finds_no_memory(engine, plans, straight, monkeypatch):
    """Also where there are free places, and the time to ask comes meanwhile."""
    made = engine(64)
    limited = lacking(made.model.add_lane, lambda n: 2 <= n <= 3)
    monkeypatch.setattr(made.model, "add_lane", limited)
    when: list[int] = []

    def note(number: int, recorder: Recorder) -> None:
        when.append(len(recorder.steps.get(1, [])))

    found = run(made, plans, note, Resumption(trials=2, clock=1))
    # The first time one more than are there may try, the second time nobody.
    assert (made.use.halved, made.capacity) == (2, 1)
    # It is time after one step, but the second has no place before the first has ended.
    assert when[:3] == [0, 0, 12]
    assert_undisturbed(found, straight, plans)


def test_a_parked_lane_that_finds_no_memory_stays_parked(engine, plans, straight, monkeypatch):
    made = engine()
    model = made.model
    monkeypatch.setattr(model, "forward", lacking(model.forward, lambda n: n == 3))
    monkeypatch.setattr(model, "restore_lane", lacking(model.restore_lane, lambda n: n == 1))
    found = run(made, plans)
    assert (made.use.halved, made.capacity) == (2, 1)
    assert_undisturbed(found, straight, plans)


@pytest.mark.parametrize("call", range(9, 41, 3))  # the first lane has its eight
def test_wherever_lanes_are_laid_out_anew_nothing_is_lost(
    call, engine, plans, straight, monkeypatch
):
    """A lane that comes finds no memory for one of its matrices; one that leaves needs none."""
    made = engine()
    asked: list[int] = []

    def when(number: int) -> bool:
        asked.append(number)
        return number == call

    monkeypatch.setattr(LaneWeights, "_zeros", lacking(LaneWeights._zeros, when))
    found = run(made, plans)
    assert len(asked) >= call, "memory never ran out"
    assert made.use.halved in (0, 1)
    assert_undisturbed(found, straight, plans)


@pytest.mark.parametrize("what", ["build", "add_lane"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_who_finds_no_memory_even_alone_fails_and_the_others_go_on(
    what, at, engine, plans, straight, monkeypatch
):
    made = engine()
    plans[at - 1] = dataclasses.replace(plans[at - 1], adapter=AdapterPlan(4, 1.0))
    owner = made if what == "build" else made.model
    original = getattr(owner, what)

    def limited(one: object, *settings: LaneSettings) -> object:
        adapter = settings[0] if settings else one.adapter
        if adapter.scaling == 0.25:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(one, *settings)

    monkeypatch.setattr(owner, what, limited)
    recorder, outcomes = run(made, plans)
    failed = outcomes.pop(at)
    assert (failed.state, failed.steps) == (TrialState.FAILED, 0)
    assert failed.reason.startswith(ALONE)
    assert "OutOfMemoryError" in failed.traceback
    assert at not in recorder.steps
    # The first of all has no neighbour yet whose memory could be asked for.
    assert made.use.halved == (0 if at == 1 else 2)
    assert_undisturbed((recorder, outcomes), straight, [p for p in plans if p.number != at])


@pytest.mark.parametrize("what", ["build", "add_lane"])
def test_who_finds_no_memory_alone_is_tried_again_when_all_was_let_go_of(
    what, engine, plans, straight, monkeypatch
):
    made = engine()
    made.model.shared.most_bytes = 77
    owner = made if what == "build" else made.model
    monkeypatch.setattr(owner, what, lacking(getattr(owner, what), lambda n: n == 1))
    found = run(made, plans)
    assert (made.use.halved, made.model.shared.most_bytes) == (0, 0)
    assert_undisturbed(found, straight, plans)


@pytest.mark.parametrize("twice", [False, True])
def test_without_memory_to_park_anyone_it_is_tried_again_and_then_the_latest_trial_fails(
    twice, engine, plans, straight, monkeypatch
):
    made = engine()
    steps, states = ((3, 4), (2, 4)) if twice else ((3,), (2,))
    for what, calls in (("forward", steps), ("lane_state", states)):
        limited = lacking(getattr(made.model, what), lambda n, calls=calls: n in calls)
        monkeypatch.setattr(made.model, what, limited)
    recorder, outcomes = run(made, plans)
    assert made.use.halved == int(twice)
    if twice:
        failed = outcomes.pop(4)
        assert (failed.state, failed.steps) == (TrialState.FAILED, 2)
        assert failed.reason.startswith(ALONE)
    left = [plan for plan in plans if plan.number in outcomes]
    assert len(left) == (5 if twice else 6)
    assert_undisturbed((recorder, outcomes), straight, left)


def test_who_comes_after_a_trial_that_failed_so_does_not_take_its_place(
    engine, plans, straight, monkeypatch
):
    """Four never fit, and nobody can be parked: the fifth and the sixth must wait."""
    made = engine()
    forward, model = made.model.forward, made.model

    def limited(batch, *, training):
        if training and model.lanes > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, training=training)

    monkeypatch.setattr(model, "forward", limited)
    lacks = lacking(model.lane_state, lambda n: n <= 2)
    monkeypatch.setattr(model, "lane_state", lacks)
    recorder, outcomes = run(made, plans)
    assert outcomes.pop(4).state is TrialState.FAILED
    assert made.capacity == 2
    assert_undisturbed((recorder, outcomes), straight, [p for p in plans if p.number != 4])


def test_a_plan_that_is_held_needs_a_place_and_nothing_else(make_plan):
    places = PackPlaces(SimpleNamespace(capacity=2), Resumption(trials=0, clock=4))
    places.lanes.append(SimpleNamespace(due=False, outcome=None))
    assert not places.wants_plan  # the last outcome that was told lies ahead
    places.held = make_plan(1), 1
    assert places.wants_plan
    places.parked.append(SimpleNamespace())
    assert not places.wants_plan
