"""Losses that are read a step late, as on an accelerator: nobody can tell by the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from recorder import Recorder

from lorasweep.core.outcomes import EpochEvaluation, Outcome, StepReport, Verdict
from lorasweep.core.plans import EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine


@pytest.fixture
def engine(open_tiny, splits) -> Callable[[int], PackedEngine]:
    def make(lag: int) -> PackedEngine:
        settings = EngineSettings(
            precision="fp32", device="cpu", log_every=1, eval_batch_size=8, checkpoint_seconds=1e9
        )
        made = PackedEngine(open_tiny(), *splits, settings, 3)
        assert made.lag == 0  # a CPU gains nothing by it
        made.lag = lag
        return made

    return make


@pytest.fixture
def plans(make_plan) -> list[TrialPlan]:
    """More than lanes, of unequal length; the second fails, the fourth is pruned."""
    changes: list[dict] = [
        {"epochs": 3},
        {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup": 0.0},
        {"batch_size": 5},
        {"epochs": 2},
        {"epochs": 1},
    ]
    return [make_plan(at, seed=at, **each) for at, each in enumerate(changes, start=1)]


def prune_the_fourth(evaluation: EpochEvaluation) -> Verdict:
    return Verdict(keep=True, go_on=evaluation.trial != 4)


def order(recorder: Recorder) -> list[tuple[int, int]]:
    return [(trial, step) for what, trial, step in recorder.log if what != "started"]


def numbers(told: StepReport | EpochEvaluation) -> np.ndarray:
    if isinstance(told, StepReport):
        return np.array([told.trial, told.step, told.loss, told.learning_rate, told.grad_norm])
    return told.logits


def run(engine: PackedEngine, plans: list[TrialPlan], recorder: Recorder) -> list[Outcome]:
    return list(engine.run(plans, recorder))


def test_reports_scores_and_outcomes_are_those_of_losses_read_at_once(engine, plans):
    found = {}
    for lag in (0, 1):
        recorder = Recorder(prune_the_fourth)
        found[lag] = recorder, run(engine(lag), plans, recorder)
    (once, at_once), (late, later) = found.values()
    assert order(once) != order(late)  # or nothing was late
    assert late.told.keys() == once.told.keys()
    for trial, told in once.told.items():
        assert [type(x) for x in late.told[trial]] == [type(x) for x in told]
        for a, b in zip(late.told[trial], told, strict=True):
            # The lane that fails stays a step longer, so sums are taken in another order.
            np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)

    def ends(outcomes: list[Outcome]) -> dict[int, tuple]:
        return {o.trial: (o.state, o.steps, o.reason) for o in outcomes}

    assert ends(later) == ends(at_once)
    assert {state.value for state, *_ in ends(later).values()} == {"completed", "failed", "pruned"}


def test_a_loss_still_on_its_way_is_in_the_checkpoint_of_who_stops(engine, plans):
    plans = [plan for plan in plans if plan.number in (1, 3)]
    whole = Recorder(prune_the_fourth)
    run(engine(1), plans, whole)
    for name in ("interrupted", "plain"):
        moved = [dataclasses.replace(p, folder=p.folder / name) for p in plans]
        if name == "interrupted":
            first = Recorder(prune_the_fourth, lambda told: (told.trial, told.step) == (3, 5))
            with pytest.raises(KeyboardInterrupt):
                run(engine(1), moved, first)
            assert max(step for trial, step in order(first) if trial == 1) < 6
        again = Recorder(prune_the_fourth)
        outcomes = run(engine(1), moved, again)
        assert {o.state.value for o in outcomes} == {"completed"}
        for trial, told in whole.told.items():
            steps = [x.step for x in again.told[trial] if isinstance(x, StepReport)]
            assert steps == [x.step for x in told if isinstance(x, StepReport)]
            for a, b in zip(again.told[trial], told, strict=True):
                np.testing.assert_allclose(numbers(a), numbers(b), rtol=1e-4, atol=1e-5)


@pytest.fixture
def tight(monkeypatch) -> Callable[..., None]:
    """Let the fourth step of an engine find no memory, as often as wanted."""

    def make(engine: PackedEngine, times: int, nan_for: int | None = None) -> None:
        forward, steps = engine.model.forward, []

        def limited(batch, *, training):
            steps.append(training)
            if 3 < len(steps) <= 3 + times:
                raise torch.OutOfMemoryError("CUDA out of memory")
            logits = forward(batch, training=training)
            if len(steps) == 3 and nan_for is not None:
                logits = torch.where(batch.row_spans.lane[:, None] == nan_for, torch.nan, logits)
            return logits

        monkeypatch.setattr(engine.model, "forward", limited)

    return make


def test_losses_on_their_way_are_told_before_lack_of_memory_ends_a_trial(engine, make_plan, tight):
    made = engine(1)
    tight(made, times=99)
    recorder = Recorder()
    (outcome,) = run(made, [make_plan(1)], recorder)
    assert (outcome.state.value, outcome.steps) == ("failed", 3)
    assert outcome.reason.startswith("out of memory")
    assert "OutOfMemoryError" in outcome.traceback
    assert [report.step for report in recorder.told[1]] == [1, 2, 3]


def test_the_only_lane_is_tried_once_more_since_what_could_be_let_go_of_was(
    engine, make_plan, tight, caplog
):
    expected, found, made = Recorder(), Recorder(), engine(0)
    run(engine(0), [make_plan(1)], expected)
    made.model.shared.most_bytes = 77
    tight(made, times=1)
    (outcome,) = run(made, [make_plan(1)], found)
    assert (outcome.state.value, outcome.reason) == ("completed", "")
    assert found.losses[1] == expected.losses[1]
    assert made.use.halved == 0
    assert made.model.shared.most_bytes == 0
    assert "trying once more" in caplog.text


def test_a_loss_that_is_no_number_is_the_reason_also_where_memory_runs_out_next(
    engine, make_plan, tight
):
    made = engine(1)
    tight(made, times=1, nan_for=0)
    (outcome,) = run(made, [make_plan(1)], Recorder())
    assert (outcome.state.value, outcome.steps) == ("failed", 2)
    assert "the training loss became nan at step 3" in outcome.reason


def test_a_lane_that_turns_out_to_have_failed_makes_room_and_nobody_is_parked(
    engine, make_plan, tight
):
    made = engine(1)
    tight(made, times=1, nan_for=0)
    outcomes = run(made, [make_plan(1, seed=1), make_plan(2, seed=2)], Recorder())
    assert [(o.trial, o.state.value) for o in outcomes] == [(1, "failed"), (2, "completed")]
    assert (made.use.halved, made.capacity) == (0, 3)
