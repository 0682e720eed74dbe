"""The contenders: our engines, and what a user would write with transformers instead.

Each function does the whole work, model load, tokenisation and evaluation included, and
returns the best validation F1 of every trial.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score
from workload import BATCH_SIZE, DROPOUT, EVAL_BATCH_SIZE, LABELS, MAX_LENGTH, Work, read

from lorasweep.core.records import (
    AdapterPlan,
    EngineSettings,
    EpochEvaluation,
    StepReport,
    TrialFacts,
    TrialPlan,
    Verdict,
)


class BestScores:
    """A reporter that keeps each trial's best validation F1."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels
        self.best: dict[int, float] = {}

    def started(self, trial: int, facts: TrialFacts) -> None:
        pass

    def stepped(self, report: StepReport) -> None:
        pass

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        score = float(f1_score(self.labels, evaluation.logits.argmax(1)))
        keep = score > self.best.get(evaluation.trial, -1.0)
        self.best[evaluation.trial] = max(score, self.best.get(evaluation.trial, -1.0))
        return Verdict(keep, True)


def packed(
    work: Work,
    *,
    lanes: int | str = "auto",
    precision: str = "auto",
    base_dropout: float | None = None,
    dropout: float = DROPOUT,
    refill: bool = True,
    engine: str = "packed",
    epochs: tuple[int, ...] = (),
) -> dict[str, Any]:
    """lorasweep's engine; the arguments switch one thing off each, for the ablation."""
    from lorasweep.data.tokens import encode
    from lorasweep.engines.packed import PackedEngine
    from lorasweep.engines.trainer import TrainerEngine
    from lorasweep.model.base import open_base
    from lorasweep.spec.schema import ModelSpec

    spec = ModelSpec(name="embedded/minilm", max_length=MAX_LENGTH, base_dropout=base_dropout)
    base = open_base(spec, LABELS)
    train, validation = (encode(split, base.tokenizer, MAX_LENGTH) for split in read(work))
    settings = EngineSettings(precision=precision, eval_batch_size=EVAL_BATCH_SIZE)
    scores = BestScores(validation.labels)
    with tempfile.TemporaryDirectory() as folder:
        plans = [
            TrialPlan(
                number=number,
                seed=number,
                adapter=AdapterPlan(point["rank"], 2.0 * point["rank"], dropout),
                learning_rate=point["learning_rate"],
                epochs=epochs[number % len(epochs)] if epochs else work.epochs,
                batch_size=BATCH_SIZE,
                weight_decay=0.01,
                warmup=0.06,
                scheduler="linear",
                max_grad_norm=1.0,
                folder=Path(folder) / f"{number:04d}",
            )
            for number, point in enumerate(work.points())
        ]
        if engine == "trainer":
            outcomes = list(TrainerEngine(base, train, validation, settings).run(plans, scores))
            facts = {}
        else:
            made = PackedEngine(base, train, validation, settings, lanes)
            size = len(plans) if refill else made.capacity
            outcomes = []
            for start in range(0, len(plans), size):  # without refill: pack after pack
                outcomes += made.run(plans[start : start + size], scores)
            use = made.use
            facts = {
                "lanes": made.capacity,
                "precision": made.precision,
                "tokens": use.tokens,
                "real_share_in_attention": use.tokens / max(1, use.attended),
                "lanes_busy": use.lane_steps / max(1, use.steps * made.capacity),
                **{k: v for k, v in dataclasses.asdict(use).items() if k.startswith("bytes")},
            }
    failed = [outcome.reason for outcome in outcomes if outcome.state != "completed"]
    assert not failed, failed
    return {"f1": [scores.best[number] for number in range(len(plans))], **facts}


def trainer_search(
    work: Work, *, bf16: bool = False, grouped: bool = False, padded: bool = False
) -> dict[str, Any]:
    """``Trainer.hyperparameter_search(backend="optuna")`` over the same fixed points.

    As shipped: float32, batches in random order, padded to their longest row. Tuned by hand:
    ``bf16`` and ``group_by_length``. The notebook's way: everything padded to the limit.
    """
    import datasets
    import optuna
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from lorasweep.model.embedded import embedded_folder

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    datasets.disable_progress_bars()
    folder = str(embedded_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splits = [
        datasets.Dataset.from_dict({"text": split.texts, "labels": split.labels}).map(
            lambda batch: tokenizer(
                batch["text"],
                truncation=True,
                max_length=MAX_LENGTH,
                padding="max_length" if padded else False,
            ),
            batched=True,
            remove_columns=["text"],
        )
        for split in read(work)
    ]
    points = work.points()
    best = [-1.0] * len(points)

    def model_init(trial: Any = None) -> Any:
        point = points[trial.number if trial is not None else 0]
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        return get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=point["rank"],
                lora_alpha=2 * point["rank"],
                lora_dropout=DROPOUT,
                target_modules=["query", "value"],
            ),
        )

    def metrics(prediction: Any) -> dict[str, float]:
        return {"f1": float(f1_score(prediction.label_ids, prediction.predictions.argmax(-1)))}

    class Search(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = super().evaluate(*args, **kwargs)
            if self._trial is not None:
                number = self._trial.number
                best[number] = max(best[number], found["eval_f1"])
            return found

    with tempfile.TemporaryDirectory() as scratch:
        search = Search(
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=work.epochs,
                per_device_train_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=EVAL_BATCH_SIZE,
                weight_decay=0.01,
                warmup_steps=0.06,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                train_sampling_strategy="group_by_length" if grouped else "random",
                eval_strategy="epoch",
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                disable_tqdm=True,
            ),
            model_init=model_init,
            train_dataset=splits[0],
            eval_dataset=splits[1],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=metrics,
        )
        search.hyperparameter_search(
            backend="optuna",
            direction="maximize",
            n_trials=len(points),
            hp_space=lambda trial: {"learning_rate": points[trial.number]["learning_rate"]},
            compute_objective=lambda found: found["eval_f1"],
        )
    return {"f1": best}


CONTENDERS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "packed": packed,
    "trainer engine": lambda work: packed(work, engine="trainer"),
    "as shipped": trainer_search,
    "tuned": lambda work: trainer_search(work, bf16=True, grouped=True),
    "notebook": lambda work: trainer_search(work, padded=True),
    # The ablation: one thing off in turn.
    "one lane": lambda work: packed(work, lanes=1),
    "two lanes": lambda work: packed(work, lanes=2),
    "four lanes": lambda work: packed(work, lanes=4),
    "fp32": lambda work: packed(work, precision="fp32"),
    "no base dropout": lambda work: packed(work, base_dropout=0.0),
    "no dropout": lambda work: packed(work, base_dropout=0.0, dropout=0.0),
    # Mixed epochs, with and without refill.
    "refilled": lambda work: packed(work, epochs=(1, 4, 2, 3)),
    "fixed packs": lambda work: packed(work, epochs=(1, 4, 2, 3), refill=False),
}
