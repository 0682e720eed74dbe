"""What one more lane takes, whether the lanes were measured or fixed, and too little memory."""

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_rows import rows_of_length
from recorder import Recorder, keep_nothing

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, EngineSettings, LargestTrial
from lorasweep.engines.engine_use import use_of
from lorasweep.engines.lane_memory import lane_bytes, saved_bytes
from lorasweep.engines.lane_scoring import validation_logits
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.packing import length_batches
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.adapter import attach
from lorasweep.model.base import fresh_classifier, open_base
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_lora import LaneSettings
from lorasweep.model.step_memory import installed_step_memory
from lorasweep.spec.schema import ModelSpec

SETTINGS = EngineSettings(precision="fp32", device="cpu")
CPU = torch.device("cpu")


@pytest.fixture
def make_engine(open_tiny, splits):
    return lambda lanes: PackedEngine(open_tiny("bert"), *splits, SETTINGS, lanes)


def bytes_of(engine: PackedEngine, train: EncodedSplit | None = None) -> int | None:
    largest = engine.settings.largest
    return lane_bytes(
        engine.model,
        engine.copies,
        train or engine.train,
        engine.device,
        largest,
        (engine.validation, 64),
    )


def test_a_lane_is_measured_the_same_whether_lanes_are_fixed_or_not(make_engine):
    measured = make_engine("auto")
    assert measured.capacity > 1
    fixed = make_engine(3)
    assert fixed.use.bytes_per_lane is None
    assert bytes_of(fixed) == measured.use.bytes_per_lane
    assert fixed.model.lanes == 0


def test_it_is_what_a_second_and_a_third_lane_take(make_engine):
    """Counted for one lane alone, it covers what each further lane really keeps."""
    engine = make_engine(3)
    claimed = bytes_of(engine)
    model, plan = engine.model, AdapterPlan(16, 16.0, 0.1)
    rows = length_batches(engine.train, 16)[0]
    taken = []
    for seed in range(3):
        adapter = attach(fresh_classifier(engine.base, seed), plan, seed)
        model.add_lane(adapter, LaneSettings(plan.scaling, plan.dropout))
        entries = [LaneRows(rows, key) for key in range(model.lanes)]
        batch = lay_out(engine.train, entries, CPU, training=True)

        def step(batch=batch):
            return model.forward(batch, training=True).sum()

        weights = model.weights.weights
        there = [*model.model.parameters(), weights]
        taken.append(saved_bytes(step, CPU, there) + 4 * weights.nbytes)
    more = np.diff(taken)
    assert (more <= claimed).all()
    assert (more >= claimed / 2).all()


def test_measuring_lets_go_of_what_the_pass_kept():
    """An operation that keeps its own result, such as tanh, must not keep all before it."""

    class Mark:
        """Something to be referred to weakly."""

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = Mark()
            marks.append(weakref.ref(ctx.mark))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    marks = []
    x = torch.ones(100, requires_grad=True)
    saved_bytes(lambda: torch.tanh(Marked.apply(x)).sum(), CPU)
    gc.collect()
    assert [mark() for mark in marks] == [None]


def test_the_frozen_base_is_nothing_that_a_lane_takes():
    """What is kept of it for gradients is there anyway, once for all lanes."""
    base = open_base(ModelSpec(name="embedded/minilm", max_length=128), ("no", "yes"))
    one = EncodedSplit(
        name="one",
        tokens=np.array([5, 6, 7], dtype=np.int32),
        offsets=np.array([0, 3]),
        labels=np.array([1]),
    )
    engine = PackedEngine(base, one, one, SETTINGS, 3)
    encoder = fresh_classifier(base, 0).model.base_model.encoder
    frozen = sum(tensor.nbytes for tensor in encoder.parameters())
    assert bytes_of(engine) < frozen / 2


def test_longer_rows_take_more(make_engine, splits):
    engine = make_engine(3)
    train, _ = splits
    longest = np.argsort(-train.lengths)[:16]
    doubled = EncodedSplit(
        name="doubled",
        tokens=np.concatenate([np.tile(train.row(row), 2) for row in longest]),
        offsets=np.cumsum([0, *(2 * train.lengths[longest])]),
        labels=train.labels[longest],
    )
    assert bytes_of(engine, doubled) > 1.5 * bytes_of(engine)


@pytest.fixture
def bytes_at(open_tiny):
    """``bytes_at(batch_size, *adapters)``: of 64 rows, all equally long."""
    train = EncodedSplit(
        name="even",
        tokens=np.random.default_rng(0).integers(5, 90, 64 * 30).astype(np.int32),
        offsets=np.arange(0, 64 * 30 + 1, 30),
        labels=np.arange(64) % 2,
    )

    def measure(batch_size: int, *adapters: AdapterPlan) -> int:
        largest = LargestTrial(batch_size, adapters or LargestTrial().adapters)
        # So few to score that a step takes the more.
        settings = replace(SETTINGS, eval_batch_size=16, largest=largest)
        engine = PackedEngine(open_tiny("bert"), train, train, settings, "auto")
        assert engine.capacity > 1
        return engine.use.bytes_per_lane

    return measure


def test_rows_of_a_step_count(bytes_at):
    assert bytes_at(64) / bytes_at(16) == pytest.approx(4, rel=0.2)


def test_ranks_and_targets_count_and_the_widest_is_found_among_many(bytes_at):
    narrow = AdapterPlan(16, 16.0, 0.1)
    high = replace(narrow, rank=64)
    wide = replace(narrow, targets=("all-linear",))
    shallow = replace(wide, rank=64, top_layers=1)
    least = bytes_at(16, narrow)
    assert bytes_at(16, replace(narrow, rank=2)) < least < bytes_at(16, high)
    assert least < bytes_at(16, wide)
    # The head is in both plans' lanes, so what is shared counts once.
    assert bytes_at(16, narrow, high) == bytes_at(16, high)
    assert bytes_at(16, wide, narrow) == bytes_at(16, wide)
    # No trial has all of it, and a lane among such trials does.
    assert bytes_at(16, narrow, shallow) > max(bytes_at(16, high), bytes_at(16, shallow))


def test_what_is_kept_once_for_all_lanes_is_no_part_of_one(open_tiny, splits):
    """The lower layers' output is computed once: the first measurement must not count it."""
    upper = AdapterPlan(16, 16.0, 0.1, targets=("all-linear",), top_layers=1)
    settings = replace(SETTINGS, largest=LargestTrial(16, (upper,)))
    engine = PackedEngine(open_tiny("modernbert"), *splits, settings, 2)
    first = engine.measure_lane()
    assert engine.model.shared._kept, "this base keeps nothing, so nothing was tried"
    assert engine.measure_lane() == first


def test_where_not_even_one_lane_fits_the_need_is_unknown(make_engine, monkeypatch):
    engine = make_engine(2)

    def full(batch, *, training):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.model, "forward", full)
    assert bytes_of(engine) is None
    assert engine.model.lanes == 0


def test_where_memory_really_runs_out_the_lanes_are_halved_and_no_trial_is_lost(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("tight_memory.py"), tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory: 4 lanes" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["halved"] >= 1
    assert found["lanes"] == 8 // 2 ** found["halved"]
    assert found["ends"] == {str(number): ["completed", 2, ""] for number in range(8)}


@pytest.mark.parametrize(("precision", "threads"), [("fp32", "1"), ("bf16", "2")])
def test_what_a_lane_is_said_to_take_is_what_the_process_takes_for_it(tmp_path, precision, threads):
    """Evaluation included; where rows change in length, fragments of the heap come on top."""
    script, found = Path(__file__).with_name("lane_peak.py"), {}
    for lanes in (2, 8):
        done = subprocess.run(
            [sys.executable, script, str(lanes), tmp_path, precision],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[lanes] = json.loads(done.stdout.splitlines()[-1])
    claim = found[8]["claim"]
    assert claim == found[2]["claim"]
    taken = (found[8]["peak"] - found[2]["peak"]) / 6
    assert claim / 2 < taken < 1.1 * claim


@pytest.mark.parametrize("layers", ["all", "top"])
def test_scoring_many_lanes_takes_no_more_than_their_steps(layers, make_plan):
    """Where only the top layer is adapted, scoring takes the more."""
    base = open_base(ModelSpec(name="embedded/minilm", max_length=128), ("no", "yes"))
    adapter = AdapterPlan(8, 16.0, 0.1, top_layers=None if layers == "all" else 1)
    largest = LargestTrial(16, (adapter,))
    settings = EngineSettings(precision="fp32", device="cpu", largest=largest)
    engine = PackedEngine(
        base, rows_of_length(64, rows=64), rows_of_length(64, rows=128), settings, 4
    )
    claim = engine.measure_lane()
    lanes = [engine.build(make_plan(n, batch_size=16, adapter=adapter)) for n in range(4)]
    for lane in lanes:
        engine.model.add_lane(lane.adapter, lane.settings)
    engine.model.shared.keep(engine.validation, training=False)  # kept once for all lanes
    memory = installed_step_memory()
    assert memory is not None
    memory.peak()
    before = memory.taken
    validation_logits(engine, lanes, lanes)
    taken = memory.peak() - before
    assert claim / 2 < taken / 4 < claim or layers == "all"
    assert 0 < taken < 4 * claim


def test_the_use_of_either_engine_is_one_record(open_tiny, splits, make_plan, make_engine):
    packed = make_engine(2)
    plans = [make_plan(n, seed=n, epochs=1 + n % 2) for n in range(4)]
    list(packed.run(plans, Recorder(keep_nothing)))
    use = use_of(packed, "packed, 2 lanes", 4)
    assert (use.engine, use.trials, use.lanes, use.halvings) == ("packed, 2 lanes", 4, 2, 0)
    assert use.lane_steps == 4 * (1 + 2 + 1 + 2)  # 30 rows in batches of 8
    assert 1 < use.trials_at_once <= 2
    assert use.busy_share == 1.0
    assert 0.9 < use.real_share <= 1.0
    assert 0 < use.step_time_share < 1
    packed.lag = 1  # as on an accelerator, whose steps the host doesn't wait for
    assert use_of(packed, "packed, 2 lanes", 4).step_time_share is None
    alone = use_of(TrainerEngine(open_tiny("bert"), *splits, SETTINGS), "trainer", 4)
    assert (alone.lanes, alone.trials, alone.real_share, alone.bytes_per_lane) == (1, 4, None, None)
