"""When a checkpoint is written, when it is taken away, and whose is refused."""

from __future__ import annotations

import dataclasses
import logging
import os
import time

import pytest
import torch
from recorder import Recorder
from safetensors.torch import save_file
from small_disk import room_for
from stopped_packs import NEIGHBOURS, NEVER, STEPS, assert_same, at, but_the_second, cut, run

from lorasweep.core.errors import StorageError
from lorasweep.core.outcomes import Outcome, StepReport, TrialState, Verdict
from lorasweep.core.plans import AdapterPlan, EngineSettings
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_checkpoint import hand_over
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.pack_run import PackRun
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.base import open_base
from lorasweep.spec.schema import ModelSpec


@pytest.mark.parametrize(("seconds", "found"), [(0, True), (NEVER, False)])
def test_checkpoints_come_with_the_seconds_too(seconds, found, engine, plans, monkeypatch):
    monkeypatch.setattr(PackRun, "_save_before_stopping", lambda self: None)
    cut(engine(checkpoint_seconds=seconds), plans, at(StepReport, 3, 3))
    assert {plan.checkpoint.exists() for plan in plans} == {found}
    if found:
        made = engine()
        run(made, plans)
        assert made.use.lane_steps == sum(STEPS.values()) - 6


def test_large_lanes_on_a_slow_disk_are_written_seldom_enough_to_cost_next_to_nothing(
    engine, monkeypatch
):
    made, now = engine(checkpoint_seconds=30.0), [0.0]
    checkpoints = made.checkpoints
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def save(lanes, state_of):
        now[0] += 2.0

    monkeypatch.setattr(checkpoints, "save", save)

    def seconds_to_the_next() -> float:
        began = now[0]
        while not checkpoints.due:
            now[0] += 0.5
        return now[0] - began

    checkpoints.begin()
    assert seconds_to_the_next() == 30.0
    checkpoints.save_all([], lambda lane: None)
    assert seconds_to_the_next() == 400.0  # of which the two that it took are half a percent
    monkeypatch.setattr(checkpoints, "save", lambda lanes, state_of: None)
    checkpoints.save_all([], lambda lane: None)
    assert seconds_to_the_next() == 30.0


@pytest.mark.parametrize("place", ["between update and count", "among losses"])
def test_what_was_half_done_is_not_saved(place, engine, plans, straight, monkeypatch):
    """A stop between the update and its count would make one step count for two."""
    made, tick, note_step = engine(), PackPlaces.tick, Lane.note_step

    def stopped_tick(self):
        if self.clock == 7:
            raise KeyboardInterrupt
        tick(self)

    def stopped_note(self, step, *arguments):
        if self.plan.number == 2 and step == 8:
            raise KeyboardInterrupt  # lane 1 has noted the loss, 2 and 3 have not
        return note_step(self, step, *arguments)

    with monkeypatch.context() as patch:
        if place == "among losses":
            patch.setattr(Lane, "note_step", stopped_note)
        else:
            patch.setattr(PackPlaces, "tick", stopped_tick)
        cut(made, plans, lambda told: False)
    resumed = run(engine(), plans)
    assert {n: facts.resumed_step for n, facts in resumed.facts.items()} == {1: 4, 2: 6, 3: 4}
    for plan in plans:
        assert_same(straight, resumed, plan.number, NEIGHBOURS)


@pytest.mark.parametrize("last_word", [True, False], ids=["go on", "stop"])
def test_who_is_stopped_between_its_last_epoch_and_its_outcome_trains_no_further(
    last_word, engine, plans, straight, monkeypatch
):
    """Nor is it pruned: after the last epoch there is nothing left to give up."""

    def verdict(evaluation):
        found = but_the_second(evaluation)
        last = evaluation.epoch == evaluation.epochs
        return Verdict(found.keep, last_word) if last else found

    def stopped(self, state, *words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "end", stopped)
        cut(engine(), plans, lambda told: False)
    resumed = run(engine(), plans, Recorder(verdict))
    assert {n: facts.resumed_step for n, facts in resumed.facts.items()} == {1: 12, 2: 12, 3: 12}
    for plan in plans:
        assert_same(straight, resumed, plan.number, NEIGHBOURS)


def test_whoever_closes_the_engine_stops_it(engine, plans, make_plan):
    made = engine()
    outcomes = made.run([make_plan(7, epochs=1), *plans[:2]], Recorder(but_the_second))
    assert next(outcomes).trial == 7
    outcomes.close()
    assert plans[0].checkpoint.exists()
    resumed = run(engine(), plans[:2])
    assert {facts.resumed_step for facts in resumed.facts.values()} == {4}


def test_the_checkpoint_outlives_the_outcome_until_it_was_taken(engine, plans):
    """A kill while the outcome is written down must not cost the trial."""
    there: list[bool] = []
    for outcome in engine(1).run(plans[:2], Recorder(but_the_second)):
        there += [plans[outcome.trial - 1].checkpoint.exists()]
        assert not [plan for plan in plans[: outcome.trial - 1] if plan.checkpoint.exists()]
    assert there == [True, True]
    assert not [plan for plan in plans if plan.checkpoint.exists()]


def test_a_checkpoint_that_finds_no_memory_costs_no_trial_and_is_written_later(
    engine, plans, straight, monkeypatch, caplog
):
    made = engine(checkpoint_seconds=0)  # one after every step
    save, calls = made.checkpoints.save, []

    def tight(lanes, state_of):
        calls.append([lane.mark for lane in lanes])
        if len(calls) in (3, 4):
            raise MemoryError
        save(lanes, state_of)

    monkeypatch.setattr(made.checkpoints, "save", tight)
    found = run(made, plans)
    assert caplog.text.count("trials keep their older checkpoints for now") == 2
    assert made.use.halved == 0
    assert [marks[0][0] for marks in calls[:6]] == [1, 2, 3, 4, 4, 5]  # epoch 1 is step 4
    for plan in plans:
        assert_same(straight, found, plan.number, 0.0)


def test_a_full_disk_stops_the_sweep_with_a_sentence(engine, plans):
    cut(engine(), plans, at(StepReport, 1, 5))
    before = plans[0].checkpoint.read_bytes()
    said = "the checkpoint can't be written: File too large"
    # The adapter of the best epoch, which comes along, is a quarter of a checkpoint.
    with room_for(len(before) // 2), pytest.raises(StorageError, match=said):
        list(engine(checkpoint_seconds=0).run(plans[:1], Recorder(but_the_second)))
    assert plans[0].checkpoint.read_bytes() == before
    assert sorted(path.name for path in plans[0].folder.iterdir()) == [
        "adapter",
        "checkpoint.safetensors",
    ]
    run(engine(), plans)


def test_a_full_disk_does_not_hide_why_it_was_stopped(engine, plans, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cut(engine(), plans, at(StepReport, 1, 2))
    assert "No space left" in caplog.text


def test_a_checkpoint_that_cannot_be_handed_over_is_said_and_stays(tmp_path):
    earlier, later = (tmp_path / name / "checkpoint.safetensors" for name in ("0001", "0002"))
    earlier.parent.mkdir()
    earlier.write_bytes(b"all of it")
    later.parent.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=f"{later}: the checkpoint can't be written"):
        hand_over(earlier, later)
    assert earlier.read_bytes() == b"all of it"


def spoil_tensor(path):
    """Another number, in a file that is whole to whoever knows no digest."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def replace_by_another_file(path):
    save_file({"a": torch.zeros(3)}, path)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_text("hello"),
    "one bit": spoil_tensor,
    "another program's": replace_by_another_file,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_ignored_and_said(damage, engine, plans, straight, caplog):
    cut(engine(), plans, at(StepReport, 2, 9))
    DAMAGES[damage](plans[0].checkpoint)
    made = engine()
    with caplog.at_level(logging.WARNING, logger="lorasweep"):
        resumed = run(made, plans)
    (record,) = caplog.records
    assert "trial 1 begins at its first step" in record.getMessage()
    assert {n: facts.resumed_step for n, facts in resumed.facts.items()} == {1: 0, 2: 9, 3: 9}
    for plan in plans:
        assert_same(straight, resumed, plan.number, NEIGHBOURS)
        assert not plan.checkpoint.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"epochs": 4},
        {"batch_size": 4},
        {"learning_rate": 1e-3},
        {"adapter": AdapterPlan(4, 8.0, 0.1)},
        {"adapter": AdapterPlan(8, 8.0, 0.2)},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_plan_is_ignored_and_said(change, engine, plans, caplog):
    plan = plans[0]
    cut(engine(1), [plan], at(StepReport, 1, 6))
    made = engine(1)
    with caplog.at_level(logging.WARNING, logger="lorasweep"):
        list(made.run([dataclasses.replace(plan, **change)], Recorder(but_the_second)))
    assert "of another plan, base or data" in caplog.text
    steps = change.get("epochs", 3) * -(-30 // change.get("batch_size", 8))
    assert made.use.lane_steps == steps


@pytest.mark.parametrize(
    "other", ["base", "base dropout", "labels", "tokens", "validation tokens", "precision"]
)
def test_a_checkpoint_of_another_base_data_or_precision_is_ignored(
    other, engine, plans, open_tiny, tiny_base_folder, caplog
):
    cut(engine(1), plans[:1], at(StepReport, 1, 6))
    if other == "base":
        spec = ModelSpec(name=str(tiny_base_folder("bert", seed=1)), max_length=64)
        made = engine(1, base=open_base(spec, ("no", "yes")))
    elif other == "base dropout":
        made = engine(1, base=open_tiny(base_dropout=0.2))
    elif other == "precision":
        made = engine(1, precision="bf16")
    else:
        made = engine(1)
        splits = {"train": made.train, "validation": made.validation}
        which, what = ("validation", "tokens") if " " in other else ("train", other)
        changed = getattr(splits[which], what).copy()
        changed[1] = 1 - changed[1] if what == "labels" else changed[1] + 1
        splits[which] = dataclasses.replace(splits[which], **{what: changed})
        made = PackedEngine(made.base, **splits, settings=made.settings, lanes=1)
    with caplog.at_level(logging.WARNING, logger="lorasweep"):
        run(made, plans[:1])
    assert "of another plan, base or data" in caplog.text
    assert made.use.lane_steps == STEPS[1]


def test_the_trainer_starts_again_and_leaves_no_checkpoint(engine, plans, open_tiny, splits):
    cut(engine(1), plans[:1], at(StepReport, 1, 6))
    settings = EngineSettings(precision="fp32", device="cpu", log_every=1)
    recorder = Recorder(but_the_second)
    outcomes: list[Outcome] = list(
        TrainerEngine(open_tiny(), *splits, settings).run(plans[:1], recorder)
    )
    assert [outcome.state for outcome in outcomes] == [TrialState.COMPLETED]
    assert [report.step for report in recorder.steps[1]] == list(range(1, 13))
    assert [path.name for path in plans[0].folder.iterdir()] == ["adapter"]
