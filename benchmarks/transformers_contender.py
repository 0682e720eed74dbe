"""What a user would write with transformers, PEFT and Optuna instead."""

from __future__ import annotations

import tempfile
from typing import Any

from workload import (
    BATCH_SIZE,
    DROPOUT,
    EVAL_BATCH_SIZE,
    MAX_LENGTH,
    MINILM,
    WARMUP,
    WEIGHT_DECAY,
    Work,
    read,
)

# Query and value, and what of the head PEFT doesn't know to be new.
_ADAPTED: dict[str, dict[str, list[str]]] = {
    "bert": {"target_modules": ["query", "value"]},
    "distilbert": {
        "target_modules": ["q_lin", "v_lin"],
        "modules_to_save": ["pre_classifier", "classifier"],
    },
}


def model_folder(model: str) -> str:
    """Return the local folder of a model."""
    from lorasweep.model.embedded import embedded_folder

    return str(embedded_folder()) if model == MINILM else model


def lora_classifier(folder: str, rank: int, alpha: float) -> Any:
    """Load the base with a new head, and attach LoRA."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=DROPOUT,
            **_ADAPTED[model.config.model_type],
        ),
    )


def tokenised(splits: Any, tokenizer: Any, *, padded: bool = False) -> list[Any]:
    """Tokenise with ``datasets``, once; ``padded`` to the limit, else to be padded by batch."""
    import datasets

    datasets.disable_progress_bars()
    return [
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
        for split in splits
    ]


def training_arguments(folder: str, epochs: int, *, bf16: bool, grouped: bool, **more: Any) -> Any:
    """Return the Trainer's arguments: its defaults, but for what the work says."""
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if grouped else "random",
        eval_strategy="epoch",
        save_strategy="no",  # spares it the time of checkpoints that nobody reads
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def f1_of(prediction: Any) -> dict[str, float]:
    """Score as the Trainer asks it: F1 of the positive label."""
    from sklearn.metrics import f1_score

    return {"f1": float(f1_score(prediction.label_ids, prediction.predictions.argmax(-1)))}


def trainer_search(
    work: Work, *, bf16: bool = False, grouped: bool = False, padded: bool = False
) -> dict[str, Any]:
    """``Trainer.hyperparameter_search(backend="optuna")`` over the same fixed points.

    As shipped: float32, batches in random order, padded to their longest row. Tuned by hand:
    ``bf16`` and ``group_by_length``. The notebook's way: everything padded to the limit.
    """
    import optuna
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, set_seed

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = model_folder(work.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, validation = tokenised(read(work), tokenizer, padded=padded)
    points = work.points()
    best = [-1.0] * len(points)

    def model_init(trial: Any = None) -> Any:
        number = trial.number if trial is not None else 0
        set_seed(work.seed(number))  # the search seeds every trial alike, which hides the noise
        return lora_classifier(folder, points[number]["rank"], 2 * points[number]["rank"])

    def hp_space(trial: Any) -> dict[str, Any]:
        point = points[trial.number]
        return {
            "learning_rate": point["learning_rate"],
            "num_train_epochs": point["epochs"],
            "seed": work.seed(trial.number),
        }

    class Search(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = super().evaluate(*args, **kwargs)
            if self._trial is not None:  # the search itself keeps the last epoch, not the best
                number = self._trial.number
                best[number] = max(best[number], found["eval_f1"])
            return found

    with tempfile.TemporaryDirectory() as scratch:
        search = Search(
            args=training_arguments(scratch, points[0]["epochs"], bf16=bf16, grouped=grouped),
            model_init=model_init,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=f1_of,
        )
        search.hyperparameter_search(
            backend="optuna",
            direction="maximize",
            n_trials=len(points),
            hp_space=hp_space,
            compute_objective=lambda found: found["eval_f1"],
        )
    return {"f1": best, "precision": "bf16" if bf16 else "fp32"}
