"""A pack that is cut off goes on: same losses, same logits, no step done twice."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from recorder import Recorder
from safetensors.torch import load_file
from stopped_packs import NEIGHBOURS, STEPS, assert_same, at, but_the_second, cut, run

from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialState, Verdict
from lorasweep.core.plans import TrialPlan
from lorasweep.engines.lane_checkpoint import hand_over
from lorasweep.engines.pack_run import PackRun
from lorasweep.model.checkpoint import load_finetuned
from lorasweep.model.scoring import predict_logits


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
    recorder = Recorder(but_the_second)
    outcomes = list(made.run([stranger, *reversed(plans)], recorder))
    assert {outcome.state for outcome in outcomes} == {TrialState.COMPLETED}
    assert made.use.lane_steps == sum(STEPS.values()) - done + 10
    for plan in plans:
        assert_same(straight, recorder, plan.number, NEIGHBOURS)


def test_in_bf16_a_pack_goes_on_bit_by_bit_too(engine, plans):
    straight = run(engine(precision="bf16"), plans)
    cut(engine(precision="bf16"), plans, at(StepReport, 2, 9))
    resumed = run(engine(precision="bf16"), plans)
    for plan in plans:
        assert_same(straight, resumed, plan.number, 0.0)


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
    recorder = Recorder(but_the_second)
    (outcome,) = engine(1).run([plans[0]], recorder)
    told = recorder.epochs[1]
    assert [e.epoch for e in told] == [1, 2, 3]
    seconds = [e.seconds for e in told]
    assert seconds == sorted(seconds)
    assert outcome.seconds > seconds[0] > 0


def test_time_goes_on_from_what_the_checkpoint_counts(engine, plans, monkeypatch):
    now = time.perf_counter
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: 1e6 * now())  # a first part of hours
        cut(engine(1), [plans[0]], at(StepReport, 1, 6))
    (outcome,) = engine(1).run([plans[0]], Recorder(but_the_second))
    assert outcome.seconds > 1000


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
