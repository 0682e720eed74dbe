"""A pack that is cut off goes on: same losses, same logits, no step done twice."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasweep.core.errors import StorageError
from lorasweep.core.outcomes import (
    EpochEvaluation,
    Outcome,
    StepReport,
    TrialFacts,
    TrialState,
    Verdict,
)
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_checkpoint import hand_over
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.pack_run import PackRun
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.base import open_base
from lorasweep.model.checkpoint import load_finetuned
from lorasweep.model.scoring import predict_logits
from lorasweep.spec.schema import ModelSpec

NEVER = 1e9
NEIGHBOURS = 1e-5  # sums are taken in another order among other rows
# 30 rows: 4 steps an epoch at batch size 8, 6 at 5.
STEPS = {1: 12, 2: 12, 3: 16}


@dataclass
class Recorder:
    answer: Callable[[EpochEvaluation], Verdict] = lambda e: Verdict(e.epoch != 2, True)
    stop: Callable[[StepReport | EpochEvaluation], bool] = lambda told: False
    steps: dict[int, list[StepReport]] = field(default_factory=dict)
    epochs: dict[int, list[EpochEvaluation]] = field(default_factory=dict)
    facts: dict[int, TrialFacts] = field(default_factory=dict)
    order: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    plans: list[TrialPlan] = field(default_factory=list)

    def started(self, trial: int, facts: TrialFacts) -> None:
        self.facts[trial] = facts

    def stepped(self, report: StepReport) -> None:
        self._tell("step", report, self.steps)

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        self._tell("epoch", evaluation, self.epochs)
        return self.answer(evaluation)

    def _tell(self, kind: str, told: StepReport | EpochEvaluation, to: dict) -> None:
        if self.stop(told):
            raise KeyboardInterrupt
        to.setdefault(told.trial, []).append(told)
        self.order.setdefault(told.trial, []).append((kind, told.step))


@pytest.fixture
def engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    """Dropout of the base as its configuration has it: 0.1."""

    def make(lanes: int = 3, *, base: object = None, **settings: object) -> PackedEngine:
        chosen = {"precision": "fp32", "device": "cpu", "log_every": 1, "eval_batch_size": 8}
        chosen |= {"checkpoint_seconds": NEVER} | settings
        return PackedEngine(base or open_tiny(), *splits, EngineSettings(**chosen), lanes)

    return make


def three(folder: Path, make_plan: Callable[..., TrialPlan]) -> list[TrialPlan]:
    """Three that differ in what may differ, dropout on; see STEPS."""
    changes: list[dict] = [
        {"epochs": 3, "adapter": AdapterPlan(4, 8.0, 0.2)},
        {"batch_size": 5, "scheduler": "cosine", "adapter": AdapterPlan(2, 2.0, 0.3)},
        {"epochs": 4, "adapter": AdapterPlan(8, 8.0, 0.1, ("all-linear",), top_layers=1)},
    ]
    return [
        dataclasses.replace(make_plan(n, seed=n, **change), folder=folder / f"{n:04d}")
        for n, change in enumerate(changes, start=1)
    ]


@pytest.fixture
def plans(tmp_path, make_plan) -> list[TrialPlan]:
    return three(tmp_path, make_plan)


_STRAIGHT: dict[str, Recorder] = {}


@pytest.fixture
def straight(engine, make_plan, tmp_path_factory) -> Recorder:
    """The three in one pack from their first step to their last, done once for all tests."""
    if not _STRAIGHT:
        plans = three(tmp_path_factory.mktemp("straight"), make_plan)
        _STRAIGHT["made"] = run(engine(), plans)
        _STRAIGHT["made"].plans = plans
    return _STRAIGHT["made"]


def run(engine: PackedEngine, plans: object, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or Recorder()
    outcomes = {outcome.trial: outcome for outcome in engine.run(plans, recorder)}
    assert {o.state for o in outcomes.values()} == {TrialState.COMPLETED}
    assert {n: o.steps for n, o in outcomes.items()} == {n: STEPS[n] for n in outcomes}
    return recorder


def cut(engine: PackedEngine, plans: object, stop: Callable[..., bool]) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(plans, Recorder(stop=stop)))


def at(kind: type, trial: int, step: int) -> Callable[..., bool]:
    return lambda told: isinstance(told, kind) and (told.trial, told.step) == (trial, step)


def assert_same(one: Recorder, other: Recorder, trial: int, tolerance: float) -> None:
    assert one.order[trial] == other.order[trial]
    for a, b in zip(one.steps[trial], other.steps[trial], strict=True):
        assert (a.step, a.steps, a.learning_rate) == (b.step, b.steps, b.learning_rate)
        np.testing.assert_allclose(a.loss, b.loss, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=100 * tolerance)
    for c, d in zip(one.epochs[trial], other.epochs[trial], strict=True):
        assert (c.epoch, c.epochs, c.step, c.steps) == (d.epoch, d.epochs, d.step, d.steps)
        np.testing.assert_allclose(c.logits, d.logits, rtol=0, atol=tolerance)


def weights(plan: TrialPlan) -> dict[str, torch.Tensor]:
    return load_file(plan.adapter_folder / "adapter_model.safetensors")


# When it is stopped, how many steps were done then, and steps between two reports.
MOMENTS = {
    "in the first step": (at(StepReport, 1, 1), 3, 1),
    "in the middle of an epoch": (at(StepReport, 2, 3), 9, 1),
    "while an epoch is scored": (at(EpochEvaluation, 1, 4), 12, 1),
    "with losses not yet reported": (at(EpochEvaluation, 1, 4), 12, 3),
    "right after an epoch": (at(StepReport, 1, 5), 15, 1),
    "in the last epoch": (at(StepReport, 3, 11), 33, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pack_that_was_stopped_goes_on_bit_by_bit(moment, engine, plans, straight):
    stop, done, log_every = MOMENTS[moment]
    kept = {plan.number: weights(straight.plans[plan.number - 1]) for plan in plans}
    expected = straight if log_every == 1 else run(engine(log_every=log_every), plans)
    cut(engine(log_every=log_every), plans, stop)
    made = engine(log_every=log_every)
    resumed = run(made, plans)
    assert made.use.lane_steps == sum(STEPS.values()) - done
    assert {facts.resumed_step for facts in resumed.facts.values()} == {done // 3}
    for plan in plans:
        assert_same(expected, resumed, plan.number, 0.0)
        assert [path.name for path in plan.folder.iterdir()] == ["adapter"]
        for name, value in weights(plan).items():
            assert torch.equal(value, kept[plan.number][name])


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("moment", ["in the middle of an epoch", "right after an epoch"])
def test_it_goes_on_among_other_neighbours_and_in_other_lanes(
    moment, lanes, engine, plans, straight, make_plan
):
    stop, done, _ = MOMENTS[moment]
    cut(engine(), plans, stop)
    made = engine(lanes)
    stranger = make_plan(4, seed=9, epochs=1, batch_size=3)
    recorder = Recorder()
    outcomes = list(made.run([stranger, *reversed(plans)], recorder))
    assert {outcome.state for outcome in outcomes} == {TrialState.COMPLETED}
    assert made.use.lane_steps == sum(STEPS.values()) - done + 10
    for plan in plans:
        assert_same(straight, recorder, plan.number, NEIGHBOURS)


def test_a_kill_loses_what_came_after_the_last_epoch(engine, plans, straight, monkeypatch):
    monkeypatch.setattr(PackRun, "_save_before_stopping", lambda self: None)
    cut(engine(), plans, at(StepReport, 1, 7))
    assert {plan.checkpoint.exists() for plan in plans} == {True}
    made = engine()
    resumed = run(made, plans)
    # Epochs ended at step 4, 6 and 4.
    assert {n: facts.resumed_step for n, facts in resumed.facts.items()} == {1: 4, 2: 6, 3: 4}
    assert made.use.lane_steps == sum(STEPS.values()) - 14
    for plan in plans:
        assert_same(straight, resumed, plan.number, NEIGHBOURS)


@pytest.mark.parametrize(("seconds", "found"), [(0, True), (NEVER, False)])
def test_checkpoints_come_with_the_seconds_too(seconds, found, engine, plans, monkeypatch):
    monkeypatch.setattr(PackRun, "_save_before_stopping", lambda self: None)
    cut(engine(checkpoint_seconds=seconds), plans, at(StepReport, 3, 3))
    assert {plan.checkpoint.exists() for plan in plans} == {found}
    if found:
        made = engine()
        run(made, plans)
        assert made.use.lane_steps == sum(STEPS.values()) - 6


def test_a_trial_may_be_cut_off_again_and_again(engine, plans, straight):
    done = 0
    for step in (2, 3, 6, 7, 11):
        made = engine()
        cut(made, plans, at(StepReport, 3, step))
        done += made.use.lane_steps
        # Nobody's checkpoint was taken away before there was another.
        assert plans[2].checkpoint.exists()
    made = engine()
    resumed = run(made, plans)
    assert done + made.use.lane_steps == sum(STEPS.values())
    for plan in plans:
        assert_same(straight, resumed, plan.number, 0.0)


def test_the_kept_adapter_comes_along_to_another_folder(engine, plans, open_tiny, splits):
    """A retried trial has another number; its best epoch may lie before the cut."""
    only_first = Recorder(lambda e: Verdict(e.epoch == 1, True))
    straight = run(engine(1), [plans[0]], only_first)
    cut(engine(1), [plans[0]], at(StepReport, 1, 10))
    retry = dataclasses.replace(plans[0], number=8, folder=plans[0].folder.with_name("0008"))
    assert hand_over(plans[0].checkpoint, retry.checkpoint)
    assert not plans[0].checkpoint.exists()
    (outcome,) = engine(1).run([retry], Recorder(only_first.answer))
    assert (outcome.trial, outcome.steps) == (8, 12)
    model = load_finetuned(open_tiny(), retry.adapter_folder)
    logits = predict_logits(model, splits[1], pad_id=0, batch_size=5, device=torch.device("cpu"))
    np.testing.assert_allclose(logits, straight.epochs[1][0].logits, atol=1e-5)
    assert np.abs(logits - straight.epochs[1][-1].logits).max() > 1e-3


def test_every_epoch_is_told_again_and_time_goes_on(engine, plans):
    cut(engine(1), [plans[0]], at(StepReport, 1, 6))
    recorder = Recorder()
    (outcome,) = engine(1).run([plans[0]], recorder)
    told = recorder.epochs[1]
    assert [e.epoch for e in told] == [1, 2, 3]
    seconds = [e.seconds for e in told]
    assert seconds == sorted(seconds)
    assert outcome.seconds > seconds[0] > 0


def test_a_reporter_may_end_a_trial_when_it_is_told_again(engine, plans):
    """As when another process has taken the trial for abandoned."""
    cut(engine(2), plans[:2], at(StepReport, 1, 6))
    made = engine(2)
    recorder = Recorder(lambda e: Verdict(True, e.trial != 1))
    outcomes = list(made.run(plans, recorder))
    first = next(o for o in outcomes if o.trial == 1)
    assert outcomes[0] == first
    assert (first.state, first.steps) == (TrialState.PRUNED, 6)
    assert made.use.lane_steps == STEPS[2] - 6 + STEPS[3]


def test_a_best_epoch_that_is_now_another_one_fails_the_trial_with_that_reason(engine, plans):
    cut(engine(1), [plans[0]], at(StepReport, 1, 10))  # epoch 1 was kept
    (outcome,) = engine(1).run([plans[0]], Recorder(lambda e: Verdict(True, True)))
    assert outcome.state is TrialState.FAILED
    assert "best epoch was 1, and now it is 2" in outcome.reason


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
        list(made.run([dataclasses.replace(plan, **change)], Recorder()))
    assert "of another plan, base or data" in caplog.text
    steps = change.get("epochs", 3) * -(-30 // change.get("batch_size", 8))
    assert made.use.lane_steps == steps


@pytest.mark.parametrize("other", ["base", "base dropout", "rows", "precision"])
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
        labels = made.train.labels.copy()
        labels[0] = 1 - labels[0]
        train = dataclasses.replace(made.train, labels=labels)
        made = PackedEngine(made.base, train, made.validation, made.settings, 1)
    with caplog.at_level(logging.WARNING, logger="lorasweep"):
        run(made, plans[:1])
    assert "of another plan, base or data" in caplog.text
    assert made.use.lane_steps == STEPS[1]


def test_in_bf16_a_pack_goes_on_bit_by_bit_too(engine, plans):
    straight = run(engine(precision="bf16"), plans)
    cut(engine(precision="bf16"), plans, at(StepReport, 2, 9))
    resumed = run(engine(precision="bf16"), plans)
    for plan in plans:
        assert_same(straight, resumed, plan.number, 0.0)


def test_refilled_lanes_and_pruned_neighbours_leave_nothing_behind(engine, plans, make_plan):
    def prune(e: EpochEvaluation) -> Verdict:
        return Verdict(True, e.trial != 5)

    more = [*plans, make_plan(5, seed=5), make_plan(6, epochs=1, learning_rate=1e30)]
    straight, ends = Recorder(prune), {}
    for outcome in engine(2).run(more, straight):
        ends[outcome.trial] = (outcome.state, outcome.steps)
    with pytest.raises(KeyboardInterrupt):
        list(engine(2).run(more, Recorder(prune, at(StepReport, 3, 2))))
    waiting = [plan for plan in more if plan.checkpoint.exists()]
    assert 3 in [plan.number for plan in waiting]
    assert len(waiting) == 2  # the others had ended, or had not begun
    begun = [plan for plan in more if not (plan.number < 3 and not plan.checkpoint.exists())]
    resumed = Recorder(prune)
    for outcome in engine(3).run(begun, resumed):
        assert ends[outcome.trial] == (outcome.state, outcome.steps)
    for plan in begun:
        if plan.number != 6:  # its numbers are no numbers
            assert_same(straight, resumed, plan.number, NEIGHBOURS)
    assert not [plan for plan in more if plan.checkpoint.exists()]


def test_a_parked_lane_is_saved_as_it_was_when_memory_ran_out(engine, plans, straight, monkeypatch):
    made = engine()
    forward = made.model.forward

    def tight(batch, *, training):
        if training and made.model.lanes > 1 and made.use.steps >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, training=training)

    monkeypatch.setattr(made.model, "forward", tight)
    cut(made, plans, at(StepReport, 1, 6))
    assert made.capacity == 1
    again = engine()
    resumed = run(again, plans)
    assert {n: facts.resumed_step for n, facts in resumed.facts.items()} == {1: 6, 2: 3, 3: 3}
    for plan in plans:
        assert_same(straight, resumed, plan.number, NEIGHBOURS)


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


def test_whoever_closes_the_engine_stops_it(engine, plans, make_plan):
    made = engine()
    outcomes = made.run([make_plan(7, epochs=1), *plans[:2]], Recorder())
    assert next(outcomes).trial == 7
    outcomes.close()
    assert plans[0].checkpoint.exists()
    resumed = run(engine(), plans[:2])
    assert {facts.resumed_step for facts in resumed.facts.values()} == {4}


def test_the_checkpoint_outlives_the_outcome_until_it_was_taken(engine, plans):
    """A kill while the outcome is written down must not cost the trial."""
    there: list[bool] = []
    for outcome in engine(1).run(plans[:2], Recorder()):
        there += [plans[outcome.trial - 1].checkpoint.exists()]
        assert not [plan for plan in plans[: outcome.trial - 1] if plan.checkpoint.exists()]
    assert there == [True, True]
    assert not [plan for plan in plans if plan.checkpoint.exists()]


def test_a_full_disk_stops_the_sweep_with_a_sentence(engine, plans, monkeypatch):
    cut(engine(), plans, at(StepReport, 1, 5))
    before = plans[0].checkpoint.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"checkpoint can't be written: No space left"):
            list(engine(checkpoint_seconds=0).run(plans, Recorder()))
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


def test_the_trainer_starts_again_and_leaves_no_checkpoint(engine, plans, open_tiny, splits):
    cut(engine(1), plans[:1], at(StepReport, 1, 6))
    settings = EngineSettings(precision="fp32", device="cpu", log_every=1)
    recorder = Recorder()
    outcomes: list[Outcome] = list(
        TrainerEngine(open_tiny(), *splits, settings).run(plans[:1], recorder)
    )
    assert [outcome.state for outcome in outcomes] == [TrialState.COMPLETED]
    assert [report.step for report in recorder.steps[1]] == list(range(1, 13))
    assert [path.name for path in plans[0].folder.iterdir()] == ["adapter"]
