"""A search that prunes, by Ray Tune: ASHAScheduler and OptunaSearch over a function trainable.

Written as Ray's documentation has it: a function that trains one trial and reports after each
epoch, the data handed over once by ``tune.with_parameters``, the base loaded by each trial.
"""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections.abc import Mapping
from typing import Any

from sweep_contender import HIGH, LOW, REDUCTION, TIMES_RANK, Search
from transformers_contender import f1_of, lora_classifier, model_folder, training_arguments
from workload import RANKS, read


def train_trial(config: dict[str, Any], splits: Any, tokenizer: Any, fixed: dict[str, Any]) -> None:
    """Train one trial and report its validation F1 after each epoch; Ray calls this."""
    from ray import tune
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, set_seed

    class Report(TrainerCallback):
        def on_evaluate(
            self, _args: Any, state: Any, _control: Any, metrics: Any, **_: Any
        ) -> None:
            tune.report({"f1": metrics["eval_f1"], "epoch": round(state.epoch), "at": time.time()})

    seed = seed_of(config, fixed["seed"])
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=lora_classifier(
                fixed["folder"], config["rank"], config["times"] * config["rank"]
            ),
            args=training_arguments(
                scratch,
                fixed["epochs"],
                bf16=fixed["tuned"],
                grouped=fixed["tuned"],
                learning_rate=config["learning_rate"],
                seed=seed,
            ),
            train_dataset=splits[0],
            eval_dataset=splits[1],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=f1_of,
            callbacks=[Report()],
        )
        trainer.train()


def seed_of(config: Mapping[str, Any], seed: int) -> int:
    """Seed of a trial, 32 bits: Ray tells it no number, but hardly two have the same point.

    With one seed for all, as Ray's examples have it, a turn's scores would share a head's luck.
    """
    return zlib.crc32(repr((seed, sorted(config.items()))).encode())


def ray_search(work: Search, *, tuned: bool = False) -> dict[str, Any]:
    """Search with one CPU for each trial, as many at once as there are CPUs.

    Args:
        work: The search.
        tuned: By hand: bf16, batches grouped by length, and workers that go on to the next
            trial instead of starting Python and importing everything again.
    """
    began = time.time()
    # Ray would ask a server for news, its workers would meet the terminal's progress bars, and
    # they would give way to whatever else runs here, which no other contender's processes do.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_worker_niceness": "0",
    }
    import ray
    import torch
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch
    from transformers import AutoTokenizer
    from transformers_contender import tokenised

    from lorasweep.tracking.environment import describe

    folder = model_folder(work.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splits = tokenised(read(work), tokenizer)
    fixed = {"folder": folder, "epochs": work.epochs[0], "tuned": tuned, "seed": work.seed(1)}
    gpus = {"gpu": 0.25} if torch.cuda.is_available() else {}
    ray.init(
        num_cpus=describe()["cores"],
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="lorasweep-") as storage:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(
                        train_trial, splits=splits, tokenizer=tokenizer, fixed=fixed
                    ),
                    {"cpu": 1, **gpus},
                ),
                param_space={
                    "learning_rate": tune.loguniform(LOW, HIGH),
                    "rank": tune.choice(list(RANKS)),
                    "times": tune.choice(list(TIMES_RANK)),
                },
                tune_config=tune.TuneConfig(
                    metric="f1",
                    mode="max",
                    num_samples=work.trials,
                    search_alg=OptunaSearch(seed=work.seed(1)),
                    scheduler=ASHAScheduler(
                        max_t=work.epochs[0], grace_period=1, reduction_factor=REDUCTION
                    ),
                    reuse_actors=tuned,
                ),
                run_config=tune.RunConfig(storage_path=storage, verbose=0),
            )
            results = tuner.fit()
            return _found(results, began, work.epochs[0])
    finally:
        ray.shutdown()


def _found(results: Any, began: float, epochs: int) -> dict[str, Any]:
    if results.errors:
        raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
    evaluations, ended = [], []
    for number, result in enumerate(results):
        frame = result.metrics_dataframe
        # The time is the worker's own, so that Ray's way to the driver isn't counted.
        for at, epoch, score in zip(frame["at"], frame["epoch"], frame["f1"], strict=True):
            evaluations.append((float(at) - began, number, int(epoch), float(score)))
        ended.append(int(frame["epoch"].max()) == epochs)
    return {
        "engine": "ray tune",
        "evaluations": sorted(evaluations),
        "states": {"completed": sum(ended), "pruned": len(ended) - sum(ended)},
    }
