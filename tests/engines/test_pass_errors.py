"""An error in a pass of many lanes fails the trial whose own it is, and no other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from recorder import Recorder, keep_nothing

from lorasweep.core.outcomes import Outcome, TrialState
from lorasweep.core.plans import EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine

NEIGHBOURS = 1e-5  # sums are taken in another order among other rows
BAD = 5  # the bad trial's batch size, which no other has


class OddError(Exception):
    """Nothing that anyone has heard of."""


@pytest.fixture
def engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    def make(lanes: int = 3, parts: int = 1, checkpoint_seconds: float = 1e9) -> PackedEngine:
        settings = EngineSettings(
            precision="fp32",
            device="cpu",
            log_every=1,
            eval_batch_size=8,
            checkpoint_seconds=checkpoint_seconds,
        )
        made = PackedEngine(open_tiny(), *splits, settings, lanes)
        made.passes.most, made.passes.fewest = parts, 1
        return made

    return make


@pytest.fixture
def plans(make_plan) -> list[TrialPlan]:
    """Three at once, the second of them bad, and one that takes its place."""
    return [
        make_plan(n, seed=n, epochs=2, batch_size=size)
        for n, size in enumerate((8, BAD, 8, 6), start=1)
    ]


def run(
    engine: PackedEngine, plans: list[TrialPlan], at_an_end: Callable[[], None] = lambda: None
) -> tuple[Recorder, dict[int, Outcome]]:
    recorder, outcomes = Recorder(keep_nothing), {}
    for outcome in engine.run(plans, recorder):
        outcomes[outcome.trial] = outcome
        recorder.events.append(outcome)
        at_an_end()
    return recorder, outcomes


def lanes_in(batch: object) -> set[int]:
    """Which lanes of the pack have rows in a batch."""
    return set((batch.row_spans.lane + batch.lanes.start).tolist())


def has_bad_rows(batch: object) -> bool:
    return bool((batch.row_weight == 1 / np.float32(BAD)).any())


def odd(*_: object) -> None:
    raise OddError("a number that nobody knows")


def raising(
    engine: PackedEngine,
    monkeypatch: pytest.MonkeyPatch,
    when: Callable[[object, bool], bool],
    *,
    backward: bool = False,
) -> list[set[int]]:
    """Let passes fail, on their way forth or back; whose rows were in each is noted."""
    forward, seen = engine.model.forward, []

    def spoilt(batch, *, training):
        seen.append(lanes_in(batch))
        fails = when(batch, training)
        if fails and not backward:
            odd()
        logits = forward(batch, training=training)
        if fails:
            logits.register_hook(odd)
        return logits

    monkeypatch.setattr(engine.model, "forward", spoilt)
    return seen


def assert_failed(outcome: Outcome, steps: int) -> None:
    assert (outcome.state, outcome.steps) == (TrialState.FAILED, steps)
    assert outcome.reason == "OddError: a number that nobody knows"
    assert "in odd" in outcome.traceback
    assert outcome.traceback.count("Traceback") == 1  # its own error, and nobody else's


def assert_undisturbed(
    found: tuple[Recorder, dict[int, Outcome]], expected: Recorder, trials: tuple[int, ...]
) -> None:
    recorder, outcomes = found
    for n in trials:
        assert outcomes[n].state is TrialState.COMPLETED
        told = [(type(x), x.step) for x in recorder.told[n]]
        assert told == [(type(x), x.step) for x in expected.told[n]]
        np.testing.assert_allclose(recorder.losses[n], expected.losses[n], rtol=0, atol=NEIGHBOURS)
        norms, others = ([step.grad_norm for step in one.steps[n]] for one in (recorder, expected))
        np.testing.assert_allclose(norms, others, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(recorder.logits[n], expected.logits[n], rtol=0, atol=NEIGHBOURS)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_error_in_a_step_fails_its_own_trial_and_the_next_takes_the_place(
    parts, lag, backward, engine, plans, monkeypatch
):
    """Passes that were for nothing leave gradients, which must not count."""
    expected, _ = run(engine(parts=parts), plans)
    made = engine(parts=parts)
    made.lag = lag
    done = []
    monkeypatch.setattr(made.adamw, "update", noting(made.adamw.update, done))
    raising(
        made,
        monkeypatch,
        lambda batch, _: len(done) == 3 and has_bad_rows(batch),
        backward=backward,
    )
    recorder, outcomes = run(made, plans)
    assert_failed(outcomes[2], steps=3)
    assert recorder.losses[2] == pytest.approx(expected.losses[2][:3], abs=NEIGHBOURS)
    assert_undisturbed((recorder, outcomes), expected, (1, 3, 4))
    after = recorder.log[recorder.log.index(("failed", 2, 3)) :]
    assert after[1] == ("started", 4, 0)  # before anybody's next step
    assert made.use.halved == 0


def noting(original: Callable, calls: list[object]) -> Callable:
    def noted(*args: object) -> object:
        calls.append(args)
        return original(*args)

    return noted


def test_an_error_while_scoring_fails_its_own_trial(engine, make_plan, monkeypatch):
    plans = [make_plan(n, seed=n) for n in (1, 2, 3)]  # all end their epochs at the same step
    expected, _ = run(engine(), plans)
    made = engine()
    seen = raising(made, monkeypatch, lambda batch, training: not training and 1 in lanes_in(batch))
    recorder, outcomes = run(made, plans, monkeypatch.undo)
    assert_failed(outcomes[2], steps=4)
    assert 2 not in recorder.logits
    assert_undisturbed((recorder, outcomes), expected, (1, 3))
    # Four steps, all at once, each alone (14 validation rows by 8), and those that are left.
    assert seen == [{0, 1, 2}] * 5 + [{0}] * 2 + [{1}] + [{2}] * 2 + [{0, 2}] * 2


def test_an_error_of_the_only_one_that_is_scored_is_its_own_if_another_can_be(
    engine, make_plan, monkeypatch
):
    plans = [make_plan(1, seed=1, batch_size=15), make_plan(2, seed=2)]  # two steps an epoch; four
    expected, _ = run(engine(), plans)
    made = engine()
    seen = raising(made, monkeypatch, lambda batch, training: not training and 0 in lanes_in(batch))
    recorder, outcomes = run(made, plans, monkeypatch.undo)
    assert_failed(outcomes[1], steps=2)
    assert seen == [{0, 1}] * 2 + [{0}] + [{1}] * 2  # two steps, who is due, and the other
    assert_undisturbed((recorder, outcomes), expected, (2,))


def test_an_error_of_all_scoring_is_nobodys_own(engine, make_plan, monkeypatch):
    plans = [make_plan(1, seed=1, batch_size=15), make_plan(2, seed=2)]
    expected, _ = run(engine(), plans)
    made = engine()
    raising(made, monkeypatch, lambda batch, training: not training)
    with pytest.raises(OddError):
        list(made.run(plans, Recorder(keep_nothing)))
    found = run(engine(), plans)
    assert [facts.resumed_step for facts in found[0].facts.values()] == [2, 2]
    assert_undisturbed(found, expected, (1, 2))


def test_two_fail_each_by_an_error_of_its_own(engine, plans, monkeypatch):
    made = engine()
    forward = made.model.forward

    def spoilt(batch, *, training):
        whose = lanes_in(batch)
        if 1 in whose:
            raise ValueError("the second's\nand more of it")
        if 2 in whose and made.model.lanes == 3:
            raise KeyError("the third's")
        return forward(batch, training=training)

    monkeypatch.setattr(made.model, "forward", spoilt)
    _, outcomes = run(made, plans[:3])
    assert outcomes[1].state is TrialState.COMPLETED
    assert outcomes[2].reason == "ValueError: the second's"  # a line
    assert "and more of it" in outcomes[2].traceback
    assert outcomes[3].reason == 'KeyError: "the third\'s"'
    assert "ValueError" not in outcomes[3].traceback
    assert "KeyError" not in outcomes[2].traceback


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_error_of_the_device_is_nobodys_own(lanes, engine, plans, monkeypatch):
    made, calls = engine(lanes), []

    def lost(batch, *, training):
        calls.append(batch)
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(made.model, "forward", lost)
    with pytest.raises(torch.AcceleratorError):
        list(made.run(plans, Recorder(keep_nothing)))
    assert len(calls) == 1  # nothing else is asked of it


def test_a_trial_that_is_alone_fails_by_its_own_error_and_is_not_tried_again(
    engine, plans, monkeypatch
):
    made = engine(1)
    seen = raising(made, monkeypatch, lambda batch, _: has_bad_rows(batch))
    _, outcomes = run(made, plans[:2])
    assert_failed(outcomes[2], steps=0)
    assert outcomes[1].state is TrialState.COMPLETED
    assert len(seen) == 8 + 2 * 2 + 1  # steps and scores of the first, and one pass of the second


@pytest.mark.parametrize("whose", ["everybody's", "nobody's"])
def test_an_error_that_is_not_one_trials_own_stops_the_sweep_and_trials_go_on_later(
    whose, engine, plans, monkeypatch
):
    """Else it would spend all trials that are still to come."""
    plans = plans[:3]
    expected, _ = run(engine(), plans)
    made, done = engine(), []
    monkeypatch.setattr(made.adamw, "update", noting(made.adamw.update, done))
    raising(
        made,
        monkeypatch,
        lambda batch, _: len(done) == 2 and (whose == "everybody's" or len(lanes_in(batch)) > 1),
    )
    first = Recorder(keep_nothing)
    with pytest.raises(OddError, match="that nobody knows"):
        list(made.run(plans, first))
    assert {trial: len(told) for trial, told in first.told.items()} == {1: 2, 2: 2, 3: 2}
    recorder, outcomes = run(engine(), plans)
    assert [facts.resumed_step for facts in recorder.facts.values()] == [2, 2, 2]
    assert_undisturbed((recorder, outcomes), expected, (1, 2, 3))


def test_a_loss_that_is_no_number_is_looked_at_before_anybody_is_tried_alone(
    engine, plans, monkeypatch
):
    """Read a step late, it may be what the error comes from."""
    plans = plans[:3]
    made, steps = engine(), []
    made.lag, forward = 1, made.model.forward

    def spoilt(batch, *, training):
        steps.append(lanes_in(batch))
        if len(steps) == 3:
            raise OddError("a number that nobody knows")
        logits = forward(batch, training=training)
        if len(steps) == 2:
            logits = torch.where(batch.row_spans.lane[:, None] == 1, torch.nan, logits)
        return logits

    monkeypatch.setattr(made.model, "forward", spoilt)
    _, outcomes = run(made, plans)
    assert (outcomes[2].state, outcomes[2].steps) == (TrialState.FAILED, 1)
    assert outcomes[2].reason.startswith("the training loss became nan at step 2")
    assert outcomes[1].state is outcomes[3].state is TrialState.COMPLETED
    assert steps[:4] == [{0, 1, 2}] * 3 + [{0, 1}]


def test_memory_that_runs_out_while_trials_are_tried_alone_halves_the_lanes(
    engine, plans, monkeypatch
):
    expected, _ = run(engine(), plans)
    made = engine()
    forward, steps = made.model.forward, []

    def spoilt(batch, *, training):
        steps.append(lanes_in(batch))
        if len(steps) == 4:
            raise OddError("a number that nobody knows")
        if len(steps) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch, training=training)

    monkeypatch.setattr(made.model, "forward", spoilt)
    found = run(made, plans)
    assert steps[3:6] == [{0, 1, 2}, {0}, {0}]
    assert made.use.halved == 1
    assert_undisturbed(found, expected, (1, 2, 3, 4))
