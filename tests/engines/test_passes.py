"""A pass cut in parts that go through the base at the same time gives what a whole one gives."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from recorder import Recorder, keep_nothing

from lorasweep.core.outcomes import Outcome
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines import passes as module
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.passes import Passes
from lorasweep.model.base import open_base
from lorasweep.model.packed_batch import LaneRows
from lorasweep.spec.schema import ModelSpec

ROUNDING = 1e-5  # as among other neighbours: sums are taken in another order
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")


@pytest.fixture
def engine(splits, open_tiny) -> Callable[..., PackedEngine]:
    """``engine(parts=2)``: passes of so many parts, however few tokens they have."""

    def make(
        parts: int,
        architecture: str = "bert",
        lanes: int = 3,
        precision: str = "fp32",
        **spec: object,
    ):
        if architecture == "embedded/minilm":
            base = open_base(ModelSpec(name=architecture, max_length=64, **spec), ("no", "yes"))
        else:
            base = open_tiny(architecture, **spec)
        settings = EngineSettings(
            precision=precision, device="cpu", log_every=1, eval_batch_size=16
        )
        made = PackedEngine(base, *splits, settings, lanes)
        made.passes.most, made.passes.fewest = parts, 1
        return made

    return make


@pytest.fixture
def plans(make_plan) -> list[TrialPlan]:
    """Five trials that differ in all that a lane has of its own."""
    targets = ("all-linear",)
    return [
        make_plan(0, seed=0, batch_size=8, adapter=AdapterPlan(4, 8.0, 0.2)),
        make_plan(1, seed=1, batch_size=3, epochs=1, adapter=AdapterPlan(8, 4.0, 0.0, targets)),
        make_plan(2, seed=2, batch_size=16, adapter=AdapterPlan(1, 4.0, 0.5)),
        make_plan(3, seed=3, batch_size=30, adapter=AdapterPlan(2, 4.0, 0.1, targets)),
        make_plan(4, seed=4, batch_size=5, epochs=1, adapter=AdapterPlan(4, 8.0, 0.0)),
    ]


def run(
    engine: PackedEngine, plans: Sequence[TrialPlan], recorder: Recorder | None = None
) -> tuple[Recorder, list[Outcome]]:
    recorder = recorder or Recorder(keep_nothing)
    return recorder, list(engine.run(plans, recorder))


def assert_same(one: Recorder, other: Recorder, tolerance: float) -> None:
    assert one.log == other.log
    for trial, reports in one.steps.items():
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(
                [getattr(report, name) for report in reports],
                [getattr(report, name) for report in other.steps[trial]],
                rtol=tolerance * 10,
                atol=tolerance,
            )
    for trial, epochs in one.logits.items():
        for a, b in zip(epochs, other.logits[trial], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        *((name, "compiled") for name in (*ARCHITECTURES, "embedded/minilm")),
        *((name, "torch") for name in ARCHITECTURES),
    ],
)
def test_parts_learn_and_score_what_the_whole_does(
    architecture, kernels, engine, plans, monkeypatch
):
    """Dropout is on, in the base and in adapters: its masks know of no parts either."""
    if kernels == "torch":
        monkeypatch.setattr("lorasweep.model.kernels.loaded_kernels", lambda: None)
    whole, outcomes = run(engine(1, architecture, base_dropout=0.1), plans)
    assert [outcome.reason for outcome in outcomes] == [""] * 5
    halves = engine(2, architecture, base_dropout=0.1)
    cut, _ = run(halves, plans)
    assert_same(whole, cut, ROUNDING)
    again, _ = run(engine(2, architecture, base_dropout=0.1), plans)
    assert_same(cut, again, 0)  # which thread is first makes no difference, not even in rounding
    # They learned, or there would be nothing to compare.
    assert np.abs(whole.logits[0][0] - whole.logits[0][-1]).max() > 100 * ROUNDING


@pytest.mark.parametrize("top_layers", [None, 1])
@pytest.mark.parametrize("architecture", ["bert", "embedded/minilm"])
def test_in_bf16_parts_learn_what_the_whole_does_as_far_as_it_can_tell(
    architecture, top_layers, engine, make_plan
):
    """What two cores with bf16 do by default; sums of parts round elsewhere."""
    plans = [
        make_plan(n, seed=n, adapter=AdapterPlan(4, 8.0, 0.2, top_layers=top_layers))
        for n in range(3)
    ]
    make = partial(engine, architecture=architecture, precision="bf16", base_dropout=0.1)
    whole, _ = run(make(1), plans)
    cut, outcomes = run(make(2), plans)
    assert [outcome.reason for outcome in outcomes] == [""] * 3
    assert_same(cut, run(make(2), plans)[0], 0)
    exact, _ = run(make(1, precision="fp32"), plans)
    for trial in range(3):
        rounding = np.abs(np.array(whole.losses[trial]) - exact.losses[trial])
        apart = np.abs(np.array(whole.losses[trial]) - cut.losses[trial])
        # No further from one another than bf16 is from float32 at its worst.
        assert apart.max() <= 2 * rounding.max()
        assert rounding.max() < 0.1


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_lane_in_several_parts_has_the_sum_of_their_gradients(parts, lanes, engine, plans):
    whole, _ = run(engine(1, lanes=lanes), plans[2:4])
    cut, _ = run(engine(parts, lanes=lanes), plans[2:4])
    assert_same(whole, cut, ROUNDING)


@pytest.mark.parametrize("base_dropout", [0.0, 0.1])
def test_layers_that_nobody_adapts_are_computed_once_for_all_parts(
    base_dropout, engine, make_plan, monkeypatch
):
    plans = [make_plan(n, seed=n, adapter=AdapterPlan(4, 8.0, 0.2, top_layers=1)) for n in range(3)]
    whole, _ = run(engine(1, base_dropout=base_dropout), plans)
    made, found = engine(2, base_dropout=base_dropout), []
    reach = made.model.shared._reach

    def note(batch, layer):
        found.append((batch.split.name, threading.current_thread()))
        return reach(batch, layer)

    monkeypatch.setattr(made.model.shared, "_reach", note)
    cut, _ = run(made, plans)
    assert_same(whole, cut, ROUNDING)
    # Once for each split, and not while training with dropout; by who has all cores.
    names = ["validation"] if base_dropout else ["train", "validation"]
    assert found == [(name, threading.main_thread()) for name in names]


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Torch with four threads, whatever the tests run with: with one, no share is less."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_parts_go_at_the_same_time_each_with_its_share_of_torchs_threads(engine, plans):
    made, together = engine(2), threading.Barrier(2)
    forward, seen = made.model.forward, []
    threads = torch.get_num_threads()

    def meet(batch, *, training):
        together.wait(timeout=60)  # broken unless both are here
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return forward(batch, training=training)

    made.model.forward = meet
    run(made, plans[:3])
    assert len({thread for thread, _ in seen}) == 2
    assert threads == 4
    assert {share for _, share in seen} == {2}
    assert torch.get_num_threads() == 4


def test_what_is_short_or_alone_goes_in_one_piece(engine, splits):
    made = engine(2)
    rows = [LaneRows(np.arange(10)), LaneRows(np.arange(10, 20))]
    tokens = int(splits[0].lengths[:20].sum())
    for fewest, parts in ((1, 2), (tokens // 2, 2), (tokens // 2 + 1, 1)):
        made.passes.fewest = fewest
        assert len(made.passes.lay_out(splits[0], rows, training=True)) == parts
    made.passes.fewest = 1
    (batch,) = made.passes.lay_out(splits[0], [LaneRows(np.array([4]))], training=True)
    assert made.passes.each(lambda _: threading.current_thread(), [batch]) == [
        threading.main_thread()
    ]


@pytest.mark.parametrize(
    ("threads", "cores", "most"), [(2, 2, 2), (1, 2, 1), (2, 1, 1), (3, 4, 1), (16, 16, 1)]
)
def test_only_two_threads_on_two_cores_have_parts(threads, cores, most, engine, monkeypatch):
    made = engine(2)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert Passes(made.model).most == most
    made.model.device = torch.device("meta")  # any that is no CPU
    assert Passes(made.model).most == 1


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("started", [0, 1])
def test_a_system_without_threads_for_it_goes_on_in_one_piece(
    started, engine, plans, monkeypatch, caplog
):
    whole, _ = run(engine(1), plans)
    made, before = engine(2), torch.get_num_threads()
    start, names = threading.Thread.start, []

    def limited(thread):
        if thread.name.startswith("pass"):
            names.append(thread.name)
            if len(names) > started:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with caplog.at_level("WARNING"):
        cut, outcomes = run(made, plans)
    assert [outcome.reason for outcome in outcomes] == [""] * 5
    assert_same(whole, cut, ROUNDING)
    assert len(names) == started + 1  # it isn't tried again
    assert "passes go through the base in one piece: can't start new thread" in caplog.text
    assert torch.get_num_threads() == before == 4


def test_what_is_no_number_stays_in_its_lane(engine, plans):
    whole, _ = run(engine(1), [plans[0], plans[3]])
    made = engine(2)
    steep = plans[2]
    forward = made.model.forward

    def spoil(batch, *, training):
        logits = forward(batch, training=training)
        # The middle one of three lanes: whichever part it is in, or both.
        lane = batch.row_spans.lane + batch.lanes.start
        spoilt = (lane == 1) & (made.model.lanes == 3) & training
        return torch.where(spoilt[:, None], torch.nan, logits)

    made.model.forward = spoil
    cut, outcomes = run(made, [plans[0], steep, plans[3]])
    assert {o.trial: o.state.value for o in outcomes} == {
        0: "completed",
        2: "failed",
        3: "completed",
    }
    for trial in (0, 3):
        np.testing.assert_allclose(whole.losses[trial], cut.losses[trial], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_memory_that_runs_out_in_a_part_loses_no_step(which, engine, plans):
    whole, _ = run(engine(1), plans)
    made = engine(2)
    forward, at = made.model.forward, {"first": (0,), "second": (1,), "both": (0, 1)}[which]

    def tight(batch, *, training):
        if training and made.model.lanes == 3 and made.use.steps == 2 and batch.part in at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, training=training)

    made.model.forward = tight
    cut, outcomes = run(made, plans)
    assert [outcome.reason for outcome in outcomes] == [""] * 5
    assert made.use.halved == 1
    for trial in range(5):
        np.testing.assert_allclose(whole.losses[trial], cut.losses[trial], rtol=0, atol=ROUNDING)


def test_a_lack_of_memory_comes_before_what_it_did_to_another_part(engine, splits):
    made = engine(2)
    rows = [LaneRows(np.arange(10)), LaneRows(np.arange(10, 20))]
    batches = made.passes.lay_out(splits[0], rows, training=True)

    def work(batch):
        if batch.part == 0:
            raise ValueError("found nothing where it looked")
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        made.passes.each(work, batches)


def test_an_error_is_raised_when_all_parts_have_ended(engine, splits):
    made = engine(2)
    rows = [LaneRows(np.arange(10)), LaneRows(np.arange(10, 20))]
    batches = made.passes.lay_out(splits[0], rows, training=True)
    ended = []

    def work(batch):
        if batch.part == 0:
            raise ValueError("the first")
        time.sleep(0.2)
        ended.append(batch.part)

    with pytest.raises(ValueError, match="the first"):
        made.passes.each(work, batches)
    assert ended == [1]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """What Ctrl-C does in a command; a shell's background jobs begin with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_what_is_under_way(engine, splits):
    made, both = engine(2), threading.Barrier(2)
    rows = [LaneRows(np.arange(10)), LaneRows(np.arange(10, 20))]
    batches = made.passes.lay_out(splits[0], rows, training=True)
    ended = []

    def work(batch):
        both.wait(timeout=60)
        if batch.part == 0:
            _thread.interrupt_main()
        time.sleep(0.3)
        ended.append(batch.part)

    with pytest.raises(KeyboardInterrupt):
        made.passes.each(work, batches)
    assert sorted(ended) == [0, 1]
