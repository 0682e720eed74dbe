"""What every engine must do; see ``core.protocols.Engine``; ``conftest.py`` lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from easy_task import SETTINGS, TRAIN_ROWS, VALIDATION_ROWS, numbered
from recorder import Recorder
from small_disk import room_for

from lorasweep.core.errors import StorageError
from lorasweep.core.outcomes import EpochEvaluation, Outcome, TrialState, Verdict
from lorasweep.core.plans import AdapterPlan, TrialPlan


def test_a_trial_reports_its_start_its_steps_and_its_epochs_in_order(engine, plan, base):
    assert engine.capacity >= 1
    recorder = Recorder()
    outcomes = list(engine.run([plan], recorder))
    steps_an_epoch = -(-TRAIN_ROWS // plan.batch_size)
    assert [(o.trial, o.state, o.steps) for o in outcomes] == [
        (0, TrialState.COMPLETED, 2 * steps_an_epoch)
    ]
    assert outcomes[0].reason == outcomes[0].traceback == ""
    assert outcomes[0].seconds > 0

    assert isinstance(recorder.events[0], tuple)
    facts = recorder.facts[0]
    # 2 layers × (query, value) × (4 × 32 + 32 × 4), and the classifier's 2 × 32 + 2.
    assert facts.trainable_parameters == 2 * 2 * 256 + 66
    assert facts.all_parameters > facts.trainable_parameters
    assert facts.steps == 2 * steps_an_epoch
    assert facts.targets == tuple(
        f"bert.encoder.layer.{layer}.attention.self.{name}"
        for layer in (0, 1)
        for name in ("query", "value")
    )
    # Every second step, and the last one wherever it falls; 12 steps here.
    reports = recorder.steps[0]
    assert [report.step for report in reports] == [2, 4, 6, 8, 10, 12]
    assert all(np.isfinite(report.loss) and report.steps == 12 for report in reports)
    assert all(report.grad_norm is None or report.grad_norm > 0 for report in reports)
    evaluations = recorder.epochs[0]
    assert [(e.epoch, e.epochs, e.step, e.share) for e in evaluations] == [
        (1, 2, 6, 0.5),
        (2, 2, 12, 1.0),
    ]
    for evaluation in evaluations:
        assert evaluation.logits.shape == (VALIDATION_ROWS, 2)
        assert evaluation.logits.dtype == np.float32
        assert 0 < evaluation.seconds <= outcomes[0].seconds


def test_the_last_step_is_reported_where_log_every_does_not_divide(
    case, base, train, validation, plan
):
    settings = dataclasses.replace(SETTINGS, log_every=5)
    recorder = Recorder()
    list(case.make(base, train, validation, settings).run([plan], recorder))
    assert [report.step for report in recorder.steps[0]] == [5, 10, 12]


def test_nothing_kept_leaves_no_adapter_not_even_an_older_one(engine, plan):
    plan.adapter_folder.mkdir(parents=True)
    (plan.adapter_folder / "adapter_config.json").write_text("{}")
    list(engine.run([plan], Recorder(lambda evaluation: Verdict(keep=False, go_on=True))))
    assert not plan.adapter_folder.exists()


def test_a_stop_prunes_that_trial_alone(engine, plan):
    plans = [numbered(plan, 1, epochs=3), numbered(plan, 2, epochs=3)]
    recorder = Recorder(lambda e: Verdict(keep=True, go_on=not (e.trial == 1 and e.epoch == 2)))
    outcomes = {outcome.trial: outcome for outcome in engine.run(plans, recorder)}
    assert outcomes[1].state is TrialState.PRUNED
    assert outcomes[1].steps == 12
    assert outcomes[1].reason
    assert outcomes[2].state is TrialState.COMPLETED
    assert outcomes[2].steps == 18
    assert len(recorder.epochs[1]) == 2
    assert plans[0].adapter_folder.is_dir()


def test_a_stop_after_the_last_epoch_is_a_completed_trial(engine, plan):
    recorder = Recorder(lambda evaluation: Verdict(keep=True, go_on=evaluation.share < 1))
    (outcome,) = engine.run([plan], recorder)
    assert outcome.state is TrialState.COMPLETED


def test_the_next_plan_is_asked_for_only_when_a_place_is_free(engine, plan):
    taken: list[int] = []
    asked: list[int] = []

    def ask() -> Iterator[TrialPlan]:
        for number in range(1, 2 * engine.capacity + 2):
            # Every place is free or its trial's outcome has already been taken.
            assert len(asked) - len(taken) < engine.capacity
            asked.append(number)
            yield numbered(plan, number, epochs=1)

    for outcome in engine.run(ask(), Recorder()):
        taken.append(outcome.trial)
        # The engine can't have looked at the next plan before this outcome was here.
        assert len(asked) <= engine.capacity + len(taken) - 1
    assert sorted(taken) == sorted(asked) == list(range(1, 2 * engine.capacity + 2))


def test_a_plan_that_cannot_be_built_fails_alone(engine, plan):
    plans = [numbered(plan, 1, adapter=AdapterPlan(4, 8.0, 0.0, ("nowhere",))), numbered(plan, 2)]
    outcomes = {outcome.trial: outcome for outcome in engine.run(plans, Recorder())}
    assert outcomes[1].state is TrialState.FAILED
    assert "nowhere" in outcomes[1].reason
    assert "Traceback" in outcomes[1].traceback
    assert outcomes[1].steps == 0
    assert outcomes[2].state is TrialState.COMPLETED


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError])
@pytest.mark.parametrize("event", ["started", "stepped", "evaluated"])
def test_what_the_reporter_raises_leaves_the_engine(error, event, engine, plan):
    recorder = Recorder()

    def fail(*args: object) -> None:
        raise error("not the trial's fault")

    setattr(recorder, event, fail)
    outcomes: list[Outcome] = []
    with pytest.raises(error):
        outcomes.extend(engine.run([plan], recorder))
    assert outcomes == []


def test_a_full_disk_leaves_the_engine_and_fails_no_trial(engine, plan):
    plans = [numbered(plan, n, adapter=AdapterPlan(64, 64.0, 0.0)) for n in (1, 2)]
    outcomes: list[Outcome] = []
    with ExitStack() as disk:

        def fill(evaluation: EpochEvaluation) -> Verdict:
            disk.enter_context(room_for(16_000))
            return Verdict(keep=True, go_on=True)

        with pytest.raises(StorageError, match="the adapter can't be written: File too large"):
            outcomes.extend(engine.run(plans, Recorder(fill)))
    assert outcomes == []
    assert not [path for path in plan.folder.parent.rglob("*") if "adapter" in path.name]


def test_only_the_adapter_is_written(engine, plan, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    list(engine.run([plan], Recorder()))
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in plan.folder.iterdir()] == ["adapter"]
    assert Path(plan.adapter_folder, "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out == ""
