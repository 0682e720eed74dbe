"""What only a pack has: refill, shrinking, memory, tokens that are all real."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from recorder import Recorder, keep_nothing

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.errors import ModelError
from lorasweep.core.outcomes import TrialState, Verdict
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines import pack_run
from lorasweep.engines import packed as packed_module
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.pack_run import PackRun
from lorasweep.engines.packed import PackedEngine
from lorasweep.model.base import Base, open_base
from lorasweep.spec.schema import ModelSpec

SETTINGS = EngineSettings(precision="fp32", device="cpu", log_every=1, eval_batch_size=16)
NEIGHBOURS = 1e-5  # the stated tolerance: sums are taken in another order among other rows


def split_of(base: Base, rows: int, seed: int) -> EncodedSplit:
    rng = np.random.default_rng(seed)
    pieces = [
        np.concatenate([[2], rng.integers(5, base.config.vocab_size, rng.integers(1, 20)), [3]])
        for _ in range(rows)
    ]
    return EncodedSplit(
        name="some",
        tokens=np.concatenate(pieces).astype(np.int32),
        offsets=np.cumsum([0, *(len(piece) for piece in pieces)]).astype(np.int64),
        labels=np.asarray([piece.sum() % 2 for piece in pieces], dtype=np.int64),
    )


@pytest.fixture
def architecture() -> str:
    return "bert"


@pytest.fixture
def base(tiny_base_folder, architecture) -> Base:
    """Dropout as the model's own configuration has it: 0.1."""
    folder = tiny_base_folder(architecture)
    return open_base(ModelSpec(name=str(folder), max_length=64), ("no", "yes"))


@pytest.fixture
def engine(base) -> Callable[..., PackedEngine]:
    def make(lanes: int | str = 3, **settings: object) -> PackedEngine:
        chosen = dataclasses.replace(SETTINGS, **settings)
        return PackedEngine(base, split_of(base, 40, 1), split_of(base, 20, 2), chosen, lanes)

    return make


@pytest.fixture
def plan(tmp_path) -> Callable[..., TrialPlan]:
    def make(number: int, **changes: object) -> TrialPlan:
        made = TrialPlan(
            number=number,
            seed=number,
            adapter=AdapterPlan(rank=4, alpha=8.0, dropout=0.2),
            learning_rate=2e-3,
            epochs=2,
            batch_size=8,
            weight_decay=0.01,
            warmup=0.1,
            scheduler="linear",
            max_grad_norm=1.0,
            folder=tmp_path / f"{number:04d}",
        )
        return dataclasses.replace(made, **changes)

    return make


def run(engine: PackedEngine, plans: object, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or Recorder(keep_nothing)
    for outcome in engine.run(plans, recorder):
        recorder.events.append(outcome)
    return recorder


def same(one: Recorder, other: Recorder, trial: int, tolerance: float) -> None:
    np.testing.assert_allclose(
        one.losses[trial], other.losses[trial], rtol=0, atol=tolerance, strict=True
    )
    for a, b in zip(one.logits[trial], other.logits[trial], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_a_lane_is_refilled_at_the_next_step_and_nobody_waits(engine, plan):
    long, short = plan(1, epochs=4), [plan(n, epochs=1) for n in (2, 3, 4)]
    recorder = run(engine(2), [long, *short])
    # 5 steps an epoch: while the long one does its 20, three short ones follow each other.
    pairs = [(kind, trial, step) for kind, trial, step in recorder.log if kind != "evaluated"]
    for number in (3, 4):
        at = pairs.index(("started", number, 0))
        before = max(step for kind, trial, step in pairs[:at] if trial == 1)
        assert pairs[at - 1][:2] == ("completed", number - 1)
        assert pairs[at + 1] == ("stepped", 1, before + 1)
        assert pairs[at + 2] == ("stepped", number, 1)
    made = engine(2)
    run(made, [long, *short])
    assert made.use.idle_places == 0
    assert made.use.steps == 20
    assert made.use.lane_steps == 35


def test_lanes_at_the_same_time_have_numbers_of_their_own(engine, plan):
    # The first ends early, so the others move up; whoever takes its place takes its number.
    recorder = run(engine(3), [plan(n, epochs=e) for n, e in ((1, 1), (2, 4), (3, 4), (4, 3))])
    assert {trial: facts.lane for trial, facts in recorder.facts.items()} == {
        1: 0,
        2: 1,
        3: 2,
        4: 0,
    }


def test_the_pack_shrinks_when_no_plan_is_left(engine, plan):
    made = engine(3)
    sizes = []
    recorder = Recorder(lambda e: (sizes.append(made.model.lanes), Verdict(False, True))[1])
    run(made, [plan(1, epochs=1), plan(2, epochs=2), plan(3, epochs=3)], recorder)
    assert sizes == [3, 3, 3, 2, 2, 1]


def test_pruning_works_among_running_lanes(engine, plan):
    verdicts = Recorder(lambda e: Verdict(False, e.trial != 2))
    recorder = run(engine(2), [plan(1), plan(2), plan(3)], verdicts)
    ended = [entry for entry in recorder.log if entry[0] in ("completed", "pruned")]
    assert ended == [("pruned", 2, 5), ("completed", 1, 10), ("completed", 3, 10)]
    same(run(engine(1), [plan(3)]), recorder, 3, NEIGHBOURS)


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "modernbert"])
def test_a_nan_fails_its_lane_alone_and_leaves_no_trace_in_the_others(
    architecture, kernels, engine, plan, monkeypatch
):
    if kernels == "torch":
        monkeypatch.setattr("lorasweep.model.kernels.loaded_kernels", lambda: None)
    bad = plan(1, learning_rate=1e30, max_grad_norm=0.0)
    recorder = run(engine(3), [plan(2), bad, plan(3)])
    failed = [entry for entry in recorder.log if entry[0] == "failed"]
    assert [entry[1] for entry in failed] == [1]
    # Bit by bit: as with a neighbour of the same rows that leaves at the same step.
    made = engine(3)
    good = dataclasses.replace(bad, learning_rate=1e-3, max_grad_norm=1.0)
    steps = failed[0][2]
    assert 0 < steps < 10
    other = Recorder(keep_nothing)
    pack = PackRun(made, iter([plan(2), good, plan(3)]), other)
    list(pack._fill())
    while pack.places.lanes[1].progress.step < steps + 1:
        pack._advance()
    pack.places.keep([pack.places.lanes[0], pack.places.lanes[2]])
    while any(lane.outcome is None for lane in pack.places.lanes):
        pack._advance()
    for trial in (2, 3):
        assert recorder.losses[trial] == other.losses[trial]
        for a, b in zip(recorder.logits[trial], other.logits[trial], strict=True):
            np.testing.assert_array_equal(a, b)


def test_logits_that_are_no_numbers_fail_their_trial_and_are_told_to_nobody(
    engine, plan, monkeypatch
):
    """Its losses may be finite all the same: they were of other rows."""
    plans = [plan(1), plan(2), plan(3)]
    expected = run(engine(3), plans)
    made = engine(3)
    forward = made.model.forward

    def spoil(batch, *, training):
        logits = forward(batch, training=training)
        lane = batch.row_spans.lane + batch.lanes.start
        spoilt = (lane == 1) & (not training)
        return torch.where(spoilt[:, None], torch.nan, logits)

    monkeypatch.setattr(made.model, "forward", spoil)
    recorder, outcomes = Recorder(keep_nothing), {}
    for outcome in made.run(plans, recorder):
        outcomes[outcome.trial] = outcome
        made.model.forward = forward  # only the first time, when all three are there
    assert outcomes[2].state is TrialState.FAILED
    assert "logits of epoch 1 are not finite" in outcomes[2].reason
    assert 2 not in recorder.logits
    for number in (1, 3):
        assert outcomes[number].state is TrialState.COMPLETED
        same(expected, recorder, number, NEIGHBOURS)


@pytest.mark.parametrize("times", [1, 2])
def test_an_adapter_that_finds_no_memory_is_kept_at_the_second_try_or_its_trial_fails(
    times, engine, plan, monkeypatch
):
    """Whoever was told of the epoch knows it by then: it can't be told again."""
    plans = [plan(1), plan(2)]
    expected = run(engine(2), plans)
    made, save, calls = engine(2), pack_run.save_adapter, []

    def tight(adapter, folder):
        calls.append(folder)
        if len(calls) <= times:
            raise MemoryError
        save(adapter, folder)

    monkeypatch.setattr(pack_run, "save_adapter", tight)
    recorder = Recorder()
    outcomes = {outcome.trial: outcome for outcome in made.run(plans, recorder)}
    assert calls[1] == calls[0]
    if times == 2:
        failed = outcomes.pop(1)
        assert failed.state is TrialState.FAILED
        assert failed.reason.startswith("out of memory at batch size 8")
        assert "MemoryError" in failed.traceback
        assert [e.epoch for e in recorder.epochs[1]] == [1]
    for number, outcome in outcomes.items():
        assert outcome.state is TrialState.COMPLETED
        assert (plans[number - 1].adapter_folder / "adapter_model.safetensors").exists()
        same(expected, recorder, number, NEIGHBOURS)


@pytest.mark.parametrize("places", [4, 64])
def test_running_out_of_memory_halves_the_lanes_and_loses_no_step(
    places, engine, plan, monkeypatch
):
    """Half of those that are there: free places would only have the step fail again."""
    plans = [plan(number) for number in range(1, 6)]
    expected = run(engine(places), plans)
    made = engine(places)
    model = made.model
    forward = model.forward
    calls = []

    def tight(batch, *, training):
        calls.append(model.lanes)
        if training and model.lanes > 2 and len(calls) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, training=training)

    monkeypatch.setattr(model, "forward", tight)
    recorder = run(made, plans)
    assert made.use.halved == 1
    assert made.capacity == 2
    assert not model.shared.most_bytes  # what can be computed again is no longer kept
    for number in range(1, 6):
        assert recorder.log.count(("completed", number, 10)) == 1
        assert recorder.log.count(("started", number, 0)) == 1
        same(expected, recorder, number, NEIGHBOURS)


@pytest.mark.parametrize(("parts", "failing"), [(1, (0,)), (2, (0,)), (2, (1,)), (2, (0, 1))])
def test_what_the_failed_step_had_computed_is_gone_before_lanes_are_parked(
    parts, failing, engine, plan, monkeypatch
):
    """Else there may be no memory to park them in."""
    made, computed, alive = engine(2), [], []
    made.passes.most, made.passes.fewest = parts, 1
    forward, park_half = made.model.forward, PackPlaces.park_half

    def tight(batch, *, training):
        logits = forward(batch, training=training)
        if training and not made.use.steps and made.model.lanes == 2:
            computed.extend(weakref.ref(x) for x in (logits, batch.ids))
            if batch.part in failing:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    def park(self):
        alive.extend(reference() for reference in computed)
        park_half(self)

    monkeypatch.setattr(made.model, "forward", tight)
    monkeypatch.setattr(PackPlaces, "park_half", park)
    run(made, [plan(1, epochs=1), plan(2, epochs=1)])
    assert alive == [None] * 2 * parts


def test_running_out_of_memory_while_evaluating_loses_no_evaluation(engine, plan, monkeypatch):
    plans = [plan(number) for number in range(1, 5)]
    expected = run(engine(4), plans)
    made = engine(4)
    forward = made.model.forward

    def tight(batch, *, training):
        if not training and made.model.lanes > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, training=training)

    monkeypatch.setattr(made.model, "forward", tight)
    recorder = run(made, plans)
    assert made.capacity == 1
    for number in range(1, 5):
        assert recorder.log.count(("completed", number, 10)) == 1
        same(expected, recorder, number, NEIGHBOURS)


def test_an_epoch_is_told_once_though_memory_ran_out_for_what_is_kept_of_it(
    engine, plan, monkeypatch
):
    plans = [plan(number) for number in range(1, 5)]
    expected = run(engine(4), plans)
    made = engine(4)
    copy = made.model.lane_values
    calls = []

    def tight(lane, adapter):
        calls.append(lane)
        if len(calls) == 2:  # the first lane's was copied, and told
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(lane, adapter)

    monkeypatch.setattr(made.model, "lane_values", tight)
    recorder = run(made, plans)
    assert made.capacity == 2
    evaluated = [entry for entry in recorder.log if entry[0] == "evaluated"]
    assert len(evaluated) == len(set(evaluated))
    for number in range(1, 5):
        same(expected, recorder, number, NEIGHBOURS)


def test_a_trial_that_does_not_fit_alone_fails_with_that_reason(engine, plan, monkeypatch):
    made = engine(2)
    forward = made.model.forward

    def tight(batch, *, training):
        if 1 in [lane.plan.number for lane in pack_lanes()]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return forward(batch, training=training)

    entered: list[PackRun] = []
    original = PackRun.__init__
    monkeypatch.setattr(
        PackRun, "__init__", lambda self, *a: (entered.append(self), original(self, *a))[1]
    )
    monkeypatch.setattr(made.model, "forward", tight)

    def pack_lanes() -> list:
        return entered[-1].places.lanes

    outcomes = {o.trial: o for o in made.run([plan(1), plan(2)], Recorder(keep_nothing))}
    assert outcomes[1].state is TrialState.FAILED
    assert "out of memory at batch size 8 and rank 4" in outcomes[1].reason
    assert outcomes[2].state is TrialState.COMPLETED


def test_auto_measures_a_lane_and_fills_the_memory(engine, plan, monkeypatch):
    made = engine("auto")
    assert made.capacity == 16  # a tiny base: as many as pay on a CPU
    per_lane = made.use.bytes_per_lane
    assert per_lane > 10_000
    monkeypatch.setattr(packed_module, "free_bytes", lambda device: 6 * per_lane)
    tight = engine("auto")
    assert tight.capacity == 3  # 60 % of what is free
    assert run(tight, [plan(1, epochs=1)]).log[-1] == ("completed", 1, 5)


def test_what_the_trial_gets_when_precision_is_bf16(engine, plan):
    made = engine(2, precision="bf16")
    recorder = run(made, [plan(1), plan(2)])
    assert {p.dtype for p in made.model.model.parameters()} == {torch.bfloat16}
    assert made.model.weights.weights.dtype == made.model.weights.first.dtype == torch.float32
    exact = run(engine(2), [plan(1), plan(2)])
    for trial in (1, 2):
        np.testing.assert_allclose(recorder.losses[trial], exact.losses[trial], atol=0.05)


@pytest.mark.parametrize("lanes", [2, "auto"])
def test_a_base_that_it_cannot_carry_is_refused_at_once(lanes, tiny_base_folder):
    base = open_base(ModelSpec(name=str(tiny_base_folder("xlnet")), max_length=64), ("no", "yes"))
    split = split_of(base, 4, 1)
    with pytest.raises(ModelError, match="can't carry this xlnet"):
        PackedEngine(base, split, split, SETTINGS, lanes)


@pytest.mark.parametrize("kind", ["neighbour", "interrupt"])
def test_the_plans_come_one_by_one_and_an_interrupt_goes_through(kind, engine, plan):
    def plans() -> Iterator[TrialPlan]:
        yield plan(1)
        if kind == "interrupt":
            raise KeyboardInterrupt
        yield plan(2)

    if kind == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            run(engine(2), plans())
    else:
        assert len(run(engine(2), plans()).losses) == 2
