"""What the trainer engine promises beyond the contract: its arithmetic, memory and precision."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import weakref

import numpy as np
import pytest
import torch

from lorasweep.core.errors import ModelError, StorageError
from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialState, Verdict
from lorasweep.core.plans import AdapterPlan, EngineSettings
from lorasweep.core.seeding import derive_seed
from lorasweep.data.order import epoch_batches
from lorasweep.engines import trainer as trainer_module
from lorasweep.engines import trial_trainer
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.adapter import attach
from lorasweep.model.base import fresh_classifier
from lorasweep.model.checkpoint import load_finetuned
from lorasweep.model.scoring import pad_rows, predict_logits

CPU = torch.device("cpu")
SETTINGS = EngineSettings(precision="fp32", device="cpu", log_every=1, eval_batch_size=8)


class Recorder:
    def __init__(self):
        self.facts, self.steps, self.evaluations = {}, [], []

    def started(self, trial, facts):
        self.facts[trial] = facts

    def stepped(self, report: StepReport):
        self.steps.append(report)

    def evaluated(self, evaluation: EpochEvaluation):
        self.evaluations.append(evaluation)
        return Verdict(keep=True, go_on=True)


def run(base, splits, plans, settings=SETTINGS):
    recorder = Recorder()
    outcomes = list(TrainerEngine(base, *splits, settings).run(plans, recorder))
    return recorder, outcomes


# --- the arithmetic -------------------------------------------------------------------


def rate(plan, step, steps):
    """Learning rate of an optimizer step counted from 0, written out from the definitions."""
    if plan.scheduler == "constant":
        return plan.learning_rate
    rising = math.ceil(plan.warmup * steps)
    if step < rising:
        return plan.learning_rate * step / max(1, rising)
    progress = (step - rising) / max(1, steps - rising)
    shape = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant_with_warmup": 1.0,
    }[plan.scheduler]
    return plan.learning_rate * shape


def written_out(base, train, plan):
    """The same trial in a dozen lines of PyTorch: losses, norms and rates of every step."""
    model = attach(
        fresh_classifier(base, derive_seed(plan.seed, "head")),
        plan.adapter,
        derive_seed(plan.seed, "adapter"),
    ).train()
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    decayed = [value for name, value in named if "bias" not in name]
    plain = [value for name, value in named if "bias" in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": plan.weight_decay},
            {"params": plain, "weight_decay": 0},
        ],
        eps=1e-8,
    )
    batches = [
        rows
        for epoch in range(plan.epochs)
        for rows in epoch_batches(train.lengths, plan.batch_size, plan.seed, epoch)
    ]
    found = []
    for step, rows in enumerate(batches):
        batch = pad_rows(train, rows, 0)
        labels = batch.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        limit = plan.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_([value for _, value in named], limit)
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step, len(batches))
        optimizer.step()
        found.append((loss.item(), norm.item(), rate(plan, step, len(batches))))
    return found


@pytest.mark.parametrize(
    ("scheduler", "max_grad_norm", "batch_size"),
    [
        ("linear", 0.5, 8),
        ("cosine", 0.0, 7),
        ("constant", 1e-2, 30),
        ("constant_with_warmup", 1, 4),
    ],
)
def test_every_step_is_what_the_documentation_says(
    scheduler, max_grad_norm, batch_size, open_tiny, splits, make_plan
):
    base = open_tiny(base_dropout=0.0)
    plan = make_plan(scheduler=scheduler, max_grad_norm=max_grad_norm, batch_size=batch_size)
    recorder, (outcome,) = run(base, splits, [plan])
    expected = written_out(base, splits[0], plan)
    assert outcome.steps == len(recorder.steps) == len(expected)
    for report, (loss, norm, learning_rate) in zip(recorder.steps, expected, strict=True):
        assert report.loss == pytest.approx(loss, abs=1e-5)
        assert report.grad_norm == pytest.approx(norm, rel=1e-3)
        assert report.learning_rate == pytest.approx(learning_rate, rel=1e-6, abs=1e-12)


def test_a_report_is_the_mean_since_the_last_one(open_tiny, splits, make_plan):
    base, plan = open_tiny(base_dropout=0.0), make_plan()
    single, _ = run(base, splits, [plan])
    grouped, _ = run(base, splits, [plan], dataclasses.replace(SETTINGS, log_every=3))
    losses = [report.loss for report in single.steps]
    assert [report.step for report in grouped.steps] == [3, 6, 8]
    means = [np.mean(losses[0:3]), np.mean(losses[3:6]), np.mean(losses[6:8])]
    np.testing.assert_allclose([report.loss for report in grouped.steps], means, atol=1e-6)


def test_batches_come_in_the_shared_order_padded_to_their_longest(
    open_tiny, splits, make_plan, monkeypatch
):
    train, _ = splits
    seen = []

    def spy(split, rows, pad_id, *, left=False):
        batch = pad_rows(split, rows, pad_id, left=left)
        seen.append((list(rows), batch["input_ids"].shape[1]))
        return batch

    monkeypatch.setattr(trial_trainer, "pad_rows", spy)
    run(open_tiny(), splits, [make_plan(seed=5)])
    expected = [
        rows.tolist() for epoch in (0, 1) for rows in epoch_batches(train.lengths, 8, 5, epoch)
    ]
    assert [rows for rows, _ in seen] == expected
    assert [width for _, width in seen] == [max(train.lengths[rows]) for rows in expected]


@pytest.mark.parametrize(
    "architecture", ["distilbert", "roberta", "electra", "deberta-v2", "modernbert", "xlnet"]
)
def test_every_architecture_trains_and_its_kept_adapter_scores_the_same(
    architecture, open_tiny, splits, make_plan
):
    base, plan = open_tiny(architecture), make_plan(epochs=1, learning_rate=1e-2)
    recorder, (outcome,) = run(base, splits, [plan])
    assert outcome.state is TrialState.COMPLETED, outcome.traceback
    reloaded = load_finetuned(base, plan.adapter_folder)
    logits = predict_logits(reloaded, splits[1], pad_id=0, batch_size=5, device=CPU)
    np.testing.assert_allclose(logits, recorder.evaluations[0].logits, atol=1e-5)


# --- precision ------------------------------------------------------------------------


def test_bf16_keeps_the_weights_in_float32_and_does_not_linger(
    open_tiny, splits, make_plan, monkeypatch
):
    base, plan = open_tiny(), make_plan(epochs=1)
    dtypes = set()
    real = trainer_module.predict_logits

    def spy(model, *args, **kwargs):
        dtypes.update(value.dtype for value in model.parameters())
        return real(model, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "predict_logits", spy)
    before, _ = run(base, splits, [plan])
    half, (outcome,) = run(base, splits, [plan], dataclasses.replace(SETTINGS, precision="bf16"))
    after, _ = run(base, splits, [plan])
    assert outcome.state is TrialState.COMPLETED, outcome.traceback
    assert dtypes == {torch.float32}
    exact, rounded = before.evaluations[0].logits, half.evaluations[0].logits
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.1
    # The Trainer's accelerator is global to the process: bf16 must not stick to the next trial.
    np.testing.assert_array_equal(exact, after.evaluations[0].logits)
    assert [r.loss for r in before.steps] == [r.loss for r in after.steps]


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_follows_the_hardware(native, expected, open_tiny, splits, monkeypatch):
    monkeypatch.setattr("lorasweep.model.precision.multiplies_bf16", lambda device: native)
    engine = TrainerEngine(open_tiny(), *splits, EngineSettings(device="cpu"))
    assert engine.precision == expected


def test_a_second_cuda_device_is_refused_with_the_way_out(open_tiny, splits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="CUDA_VISIBLE_DEVICES=1"):
        TrainerEngine(open_tiny(), *splits, EngineSettings(device="cuda:1", precision="fp32"))


# --- memory and failures --------------------------------------------------------------


def test_memory_is_given_back_between_trials(open_tiny, splits, make_plan, monkeypatch):
    models, alive = [], []
    real = trainer_module.attach

    def spy(*args, **kwargs):
        model = real(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(trainer_module, "attach", spy)

    def parameters():
        gc.collect()
        # By type: isinstance would wake up deprecated attributes of unrelated objects.
        return sum(type(thing) is torch.nn.Parameter for thing in gc.get_objects())

    plans = [
        make_plan(1, epochs=1),
        make_plan(2, epochs=1, learning_rate=1e30),  # fails: its traceback must not hold it
        make_plan(3, epochs=1),
        make_plan(4, epochs=1),
    ]
    engine = TrainerEngine(open_tiny(), *splits, SETTINGS)
    before = parameters()
    for _ in engine.run(plans, Recorder()):
        assert models[-1]() is None
        alive.append(parameters())
    assert len(models) == 4
    assert alive == [before] * 4


def test_out_of_memory_is_a_reason_with_advice(open_tiny, splits, make_plan, monkeypatch):
    errors = iter(
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
        ]
    )

    def full(*args, **kwargs):
        raise next(errors)

    monkeypatch.setattr(trainer_module, "predict_logits", full)
    _, outcomes = run(open_tiny(), splits, [make_plan(1), make_plan(2)])
    for outcome in outcomes:
        assert outcome.state is TrialState.FAILED
        assert outcome.reason.startswith("out of memory at batch size 8")
        assert outcome.steps == 4


def test_logits_that_are_not_finite_fail_the_trial_and_reach_nobody(
    open_tiny, splits, make_plan, monkeypatch
):
    broken = np.full((14, 2), np.nan, dtype=np.float32)
    monkeypatch.setattr(trainer_module, "predict_logits", lambda *args, **kwargs: broken)
    recorder, (outcome,) = run(open_tiny(), splits, [make_plan()])
    assert outcome.state is TrialState.FAILED
    assert "logits of epoch 1 are not finite" in outcome.reason
    assert recorder.evaluations == []


def test_a_loss_that_is_not_a_number_names_its_step(open_tiny, splits, make_plan):
    adapter = AdapterPlan(4, 8.0, 0.0)
    plan = make_plan(learning_rate=1e30, warmup=0.0, adapter=adapter)
    recorder, (outcome,) = run(open_tiny(), splits, [plan])
    assert outcome.reason.startswith("the training loss became ")
    assert f"at step {outcome.steps + 1} of 8" in outcome.reason
    assert all(math.isfinite(report.loss) for report in recorder.steps)


def test_a_disk_that_cannot_be_written_ends_the_sweep_and_not_one_trial(
    open_tiny, splits, make_plan
):
    plan = make_plan()
    plan.folder.parent.mkdir(exist_ok=True)
    plan.folder.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="the Trainer's folder can't be written"):
        run(open_tiny(), splits, [plan])


def test_so_does_one_that_takes_no_adapter(open_tiny, splits, make_plan):
    plan = make_plan()
    plan.folder.mkdir(parents=True)
    in_the_way = plan.folder / f".adapter.{os.getpid()}.writing"
    in_the_way.write_text("a file where the adapter is written")
    with pytest.raises(StorageError, match="the adapter can't be written"):
        run(open_tiny(), splits, [plan])


def test_nothing_but_the_adapter_is_left_of_a_trial(open_tiny, splits, make_plan):
    plan = make_plan()
    run(open_tiny(), splits, [plan])
    assert [path.name for path in plan.folder.iterdir()] == ["adapter"]
