"""What every engine must do; see ``core.protocols.Engine``. To add one, add it to ENGINES.

Numbers are compared within each engine's own stated tolerance: exactly for the trainer engine.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.outcomes import (
    EpochEvaluation,
    Outcome,
    StepReport,
    TrialFacts,
    TrialState,
    Verdict,
)
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.core.protocols import Engine
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.base import Base, open_base
from lorasweep.model.checkpoint import load_finetuned
from lorasweep.model.scoring import predict_logits
from lorasweep.spec.schema import ModelSpec

CPU = torch.device("cpu")
SETTINGS = EngineSettings(precision="fp32", device="cpu", log_every=2, eval_batch_size=8)
TRAIN_ROWS, VALIDATION_ROWS = 44, 20


@dataclass(frozen=True)
class EngineCase:
    """An engine under test and how far its numbers may move with the neighbours of a trial."""

    make: Callable[[Base, EncodedSplit, EncodedSplit, EngineSettings], Engine]
    tolerance: float


ENGINES = {
    "trainer": EngineCase(TrainerEngine, tolerance=0.0),
    # Sums are taken in another order among other neighbours: equal up to rounding.
    "packed, one lane": EngineCase(partial(PackedEngine, lanes=1), tolerance=1e-5),
    "packed, three lanes": EngineCase(partial(PackedEngine, lanes=3), tolerance=1e-5),
}


@dataclass
class Recorder:
    """A reporter that remembers everything; ``answer`` gives the verdicts."""

    answer: Callable[[EpochEvaluation], Verdict] = lambda evaluation: Verdict(True, True)
    events: list[object] = field(default_factory=list)

    def started(self, trial: int, facts: TrialFacts) -> None:
        self.events.append((trial, facts))

    def stepped(self, report: StepReport) -> None:
        self.events.append(report)

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        self.events.append(evaluation)
        return self.answer(evaluation)

    def of(self, kind: type, trial: int) -> list:
        return [e for e in self.events if isinstance(e, kind) and e.trial == trial]

    def facts(self, trial: int) -> TrialFacts:
        return next(e[1] for e in self.events if isinstance(e, tuple) and e[0] == trial)


def make_split(base: Base, name: str, rows: int, seed: int) -> EncodedSplit:
    """An easy task: label 1 where ``good`` or ``great`` occurs, else ``bad`` or ``awful`` does."""
    rng = random.Random(seed)
    filler = ["the", "film", "was", "a", "movie", "it", "very", "is", "but", "i"]
    tokens: list[int] = []
    offsets, labels = [0], []
    for row in range(rows):
        label = row % 2
        words = rng.choices(filler, k=rng.randint(1, 14))
        words.insert(
            rng.randint(0, len(words)), rng.choice([["bad", "awful"], ["good", "great"]][label])
        )
        tokens += base.tokenizer(" ".join(words))["input_ids"]
        offsets.append(len(tokens))
        labels.append(label)
    return EncodedSplit(
        name=name,
        tokens=np.asarray(tokens, dtype=np.int32),
        offsets=np.asarray(offsets, dtype=np.int64),
        labels=np.asarray(labels, dtype=np.int64),
    )


@pytest.fixture(scope="module")
def base(tiny_base_folder) -> Base:
    return open_base(ModelSpec(name=str(tiny_base_folder("bert")), max_length=64), ("bad", "good"))


@pytest.fixture(scope="module")
def train(base) -> EncodedSplit:
    return make_split(base, "train", TRAIN_ROWS, seed=1)


@pytest.fixture(scope="module")
def validation(base) -> EncodedSplit:
    return make_split(base, "validation", VALIDATION_ROWS, seed=2)


@pytest.fixture(params=ENGINES)
def case(request) -> EngineCase:
    return ENGINES[request.param]


@pytest.fixture
def engine(case, base, train, validation) -> Engine:
    return case.make(base, train, validation, SETTINGS)


@pytest.fixture
def plan(tmp_path) -> TrialPlan:
    """Dropout is on, in the adapter and (from the tiny model's configuration) in the base."""
    return TrialPlan(
        number=0,
        seed=7,
        adapter=AdapterPlan(rank=4, alpha=8.0, dropout=0.1),
        learning_rate=5e-3,
        epochs=2,
        batch_size=8,
        weight_decay=0.01,
        warmup=0.1,
        scheduler="linear",
        max_grad_norm=1.0,
        folder=tmp_path / "0000",
    )


def numbered(plan: TrialPlan, number: int, **changes: object) -> TrialPlan:
    changes.setdefault("seed", plan.seed + number)
    return dataclasses.replace(
        plan, number=number, folder=plan.folder.parent / f"{number:04d}", **changes
    )


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
        (StepReport, ("step", "loss", "learning_rate", "grad_norm")),
        (EpochEvaluation, ("step", "epoch", "logits")),
    ):
        first, second = one.of(kind, trial), other.of(kind, trial)
        assert len(first) == len(second) > 0
        for a, b in zip(first, second, strict=True):
            for value in values:
                x, y = getattr(a, value), getattr(b, value)
                np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=f"{value} of {a}")


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
    facts = recorder.facts(0)
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
    reports = recorder.of(StepReport, 0)
    assert [report.step for report in reports] == [2, 4, 6, 8, 10, 12]
    assert all(np.isfinite(report.loss) and report.steps == 12 for report in reports)
    assert all(report.grad_norm is None or report.grad_norm > 0 for report in reports)
    evaluations = recorder.of(EpochEvaluation, 0)
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
    assert [report.step for report in recorder.of(StepReport, 0)] == [5, 10, 12]


def test_it_learns(case, base, train, plan):
    # Scored on the rows that it learned: 44 rows on a random base are too few for others.
    recorder = Recorder()
    adapter = AdapterPlan(8, 16.0, 0.0, ("all-linear",))
    engine = case.make(base, train, train, SETTINGS)
    list(engine.run([numbered(plan, 1, epochs=12, adapter=adapter)], recorder))
    reports = recorder.of(StepReport, 1)
    assert reports[-1].loss < reports[0].loss / 2
    correct = [
        (e.logits.argmax(axis=1) == train.labels).mean() for e in recorder.of(EpochEvaluation, 1)
    ]
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
    evaluations = recorder.of(EpochEvaluation, 0)
    np.testing.assert_allclose(logits, evaluations[kept - 1].logits, atol=1e-5)
    for other in evaluations[: kept - 1] + evaluations[kept:]:
        assert np.abs(logits - other.logits).max() > 1e-3


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
    assert len(recorder.of(EpochEvaluation, 1)) == 2
    assert plans[0].adapter_folder.is_dir()


def test_a_stop_after_the_last_epoch_is_a_completed_trial(engine, plan):
    recorder = Recorder(lambda evaluation: Verdict(keep=True, go_on=evaluation.share < 1))
    (outcome,) = engine.run([plan], recorder)
    assert outcome.state is TrialState.COMPLETED


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
    losses = [[report.loss for report in r.of(StepReport, 1)] for r in (first, other)]
    assert not np.allclose(*losses, atol=1e-4)


def test_dropout_is_on_while_training_and_off_while_evaluating(engine, plan, base, validation):
    recorder = Recorder()
    plans = [
        numbered(plan, 1, seed=3, adapter=AdapterPlan(4, 8.0, 0.0)),
        numbered(plan, 2, seed=3, adapter=AdapterPlan(4, 8.0, 0.5)),
    ]
    list(engine.run(plans, recorder))
    losses = [[report.loss for report in recorder.of(StepReport, trial)] for trial in (1, 2)]
    assert not np.allclose(*losses, atol=1e-3)
    # The kept adapter scores as the evaluation said: the latter was without dropout.
    reloaded = load_finetuned(base, plans[1].adapter_folder)
    logits = predict_logits(reloaded, validation, pad_id=base.pad_id, batch_size=4, device=CPU)
    np.testing.assert_allclose(logits, recorder.of(EpochEvaluation, 2)[-1].logits, atol=1e-5)


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


def test_an_engine_can_run_again_and_shares_nothing_between_runs(engine, plan, case):
    first, second = Recorder(), Recorder()
    list(engine.run([plan], first))
    config = copy.deepcopy(engine.base.config.to_dict()) if hasattr(engine, "base") else None
    list(engine.run([plan], second))
    same_numbers(first, second, trial=0, tolerance=case.tolerance)
    if config is not None:
        assert engine.base.config.to_dict() == config


def test_only_the_adapter_is_written(engine, plan, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    list(engine.run([plan], Recorder()))
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in plan.folder.iterdir()] == ["adapter"]
    assert Path(plan.adapter_folder, "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out == ""
