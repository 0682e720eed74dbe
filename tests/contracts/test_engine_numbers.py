"""What every engine computes: the numbers of a trial are its plan's and nobody else's.

They are compared within each engine's own stated tolerance: exactly for the trainer engine.
"""

from __future__ import annotations

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from easy_task import SETTINGS, numbered
from recorder import Recorder

from lorasweep.core.outcomes import TrialState, Verdict
from lorasweep.core.plans import AdapterPlan, TrialPlan
from lorasweep.model.checkpoint import load_finetuned
from lorasweep.model.scoring import predict_logits

CPU = torch.device("cpu")


def mixed_plans(plan: TrialPlan) -> list[TrialPlan]:
    """Five trials that differ in everything that may differ."""
    return [
        numbered(plan, 1, epochs=1),
        numbered(plan, 2, batch_size=5, scheduler="cosine", adapter=AdapterPlan(8, 8.0, 0.0)),
        numbered(plan, 3, epochs=3, learning_rate=1e-3, scheduler="constant", max_grad_norm=0.0),
        numbered(plan, 4, adapter=AdapterPlan(2, 4.0, 0.2, ("all-linear",), top_layers=1)),
        numbered(plan, 5, adapter=AdapterPlan(4, 4.0, 0.3, ("key",)), warmup=0.0),
    ]


def same_numbers(one: Recorder, other: Recorder, trial: int, tolerance: float) -> None:
    for kind, values in (
        ("steps", ("step", "loss", "learning_rate", "grad_norm")),
        ("epochs", ("step", "epoch", "logits")),
    ):
        first, second = (getattr(told, kind)[trial] for told in (one, other))
        assert len(first) == len(second) > 0
        for a, b in zip(first, second, strict=True):
            for value in values:
                x, y = getattr(a, value), getattr(b, value)
                np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=f"{value} of {a}")


def test_it_learns(case, base, train, plan):
    # Scored on the rows that it learned: 44 rows on a random base are too few for others.
    recorder = Recorder()
    adapter = AdapterPlan(8, 16.0, 0.0, ("all-linear",))
    engine = case.make(base, train, train, SETTINGS)
    list(engine.run([numbered(plan, 1, epochs=12, adapter=adapter)], recorder))
    reports = recorder.steps[1]
    assert reports[-1].loss < reports[0].loss / 2
    correct = [(e.logits.argmax(axis=1) == train.labels).mean() for e in recorder.epochs[1]]
    assert correct[-1] >= 0.9 > correct[0]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_adapter_of_the_epoch_last_kept_is_there_with_the_outcome(
    kept, engine, plan, base, validation
):
    recorder = Recorder(lambda evaluation: Verdict(keep=evaluation.epoch <= kept, go_on=True))
    plan = dataclasses.replace(plan, epochs=3)
    for outcome in engine.run([plan], recorder):
        assert outcome.state is TrialState.COMPLETED
        reloaded = load_finetuned(base, plan.adapter_folder)
    logits = predict_logits(reloaded, validation, pad_id=base.pad_id, batch_size=4, device=CPU)
    evaluations = recorder.epochs[0]
    np.testing.assert_allclose(logits, evaluations[kept - 1].logits, atol=1e-5)
    for other in evaluations[: kept - 1] + evaluations[kept:]:
        assert np.abs(logits - other.logits).max() > 1e-3


def test_the_fifth_trial_gives_the_same_numbers_when_it_runs_alone(
    case, base, train, validation, plan
):
    plans = mixed_plans(plan)
    together = Recorder()
    outcomes = list(case.make(base, train, validation, SETTINGS).run(plans, together))
    assert {outcome.state for outcome in outcomes} == {TrialState.COMPLETED}
    alone = Recorder()
    list(case.make(base, train, validation, SETTINGS).run([plans[4]], alone))
    same_numbers(alone, together, trial=5, tolerance=case.tolerance)


def test_a_plan_decides_and_its_number_and_the_global_random_state_do_not(engine, plan, case):
    first = Recorder()
    list(engine.run([numbered(plan, 1, seed=3)], first))
    torch.manual_seed(99)
    random.seed(99)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    second = Recorder()
    list(engine.run([numbered(plan, 2, seed=3)], second))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    second.events = [
        dataclasses.replace(event, trial=1) for event in second.events if hasattr(event, "trial")
    ]
    same_numbers(first, second, trial=1, tolerance=case.tolerance)
    other = Recorder()
    list(engine.run([numbered(plan, 1, seed=4)], other))
    losses = [[report.loss for report in r.steps[1]] for r in (first, other)]
    assert not np.allclose(*losses, atol=1e-4)


def test_dropout_is_on_while_training_and_off_while_evaluating(engine, plan, base, validation):
    recorder = Recorder()
    plans = [
        numbered(plan, 1, seed=3, adapter=AdapterPlan(4, 8.0, 0.0)),
        numbered(plan, 2, seed=3, adapter=AdapterPlan(4, 8.0, 0.5)),
    ]
    list(engine.run(plans, recorder))
    losses = [[report.loss for report in recorder.steps[trial]] for trial in (1, 2)]
    assert not np.allclose(*losses, atol=1e-3)
    # The kept adapter scores as the evaluation said: the latter was without dropout.
    reloaded = load_finetuned(base, plans[1].adapter_folder)
    logits = predict_logits(reloaded, validation, pad_id=base.pad_id, batch_size=4, device=CPU)
    np.testing.assert_allclose(logits, recorder.epochs[2][-1].logits, atol=1e-5)


def test_a_diverging_trial_fails_with_that_reason_alone(case, base, train, validation, plan):
    good = numbered(plan, 2)
    alone = Recorder()
    list(case.make(base, train, validation, SETTINGS).run([good], alone))
    plans = [numbered(plan, 1, learning_rate=1e30), good]
    recorder = Recorder()
    engine = case.make(base, train, validation, SETTINGS)
    outcomes = {outcome.trial: outcome for outcome in engine.run(plans, recorder)}
    assert outcomes[1].state is TrialState.FAILED
    assert "step" in outcomes[1].reason
    assert "nan" in outcomes[1].reason or "inf" in outcomes[1].reason
    assert outcomes[1].steps < 12
    assert outcomes[2].state is TrialState.COMPLETED
    same_numbers(alone, recorder, trial=2, tolerance=case.tolerance)


def test_an_engine_can_run_again_and_shares_nothing_between_runs(engine, plan, case):
    first, second = Recorder(), Recorder()
    list(engine.run([plan], first))
    config = copy.deepcopy(engine.base.config.to_dict()) if hasattr(engine, "base") else None
    list(engine.run([plan], second))
    same_numbers(first, second, trial=0, tolerance=case.tolerance)
    if config is not None:
        assert engine.base.config.to_dict() == config
