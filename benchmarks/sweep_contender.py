"""A search that prunes, by lorasweep: the whole of ``run_sweep``, tracking and all."""

from __future__ import annotations

import csv
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload import (
    BATCH_SIZE,
    DROPOUT,
    EVAL_BATCH_SIZE,
    LABELS,
    MAX_LENGTH,
    RANKS,
    WARMUP,
    WEIGHT_DECAY,
    Work,
    read,
)

from lorasweep.core.corpora import TextSplit

LOW, HIGH = 1e-4, 2e-3
TIMES_RANK = (1.0, 2.0, 4.0)
REDUCTION = 2


@dataclass(frozen=True)
class Search(Work):
    """A search instead of fixed trials; ``epochs`` has one entry, the whole budget of a trial."""

    trials: int = 64
    epochs: tuple[int, ...] = (4,)

    def described(self) -> dict[str, Any]:
        known = {k: v for k, v in super().described().items() if k != "points"}
        return {
            **known,
            "space": {
                "learning_rate": {"low": LOW, "high": HIGH, "log": True},
                "rank": RANKS,
                "alpha": {"times_rank": TIMES_RANK},
            },
            "halving": {"after_epochs": "1, 2, 4, …", "reduction_factor": REDUCTION},
        }


def sweep(work: Search) -> dict[str, Any]:
    """Search with the packed engine, TPE, and successive halving at the same epochs as ASHA's.

    The pruner's rungs are shares of the budget: with 4 epochs a half and a quarter, that is 2
    epochs and 1.
    """
    began = time.perf_counter()
    from lorasweep.api import run_sweep
    from lorasweep.sweep.events import Event, SweepStarted, TrialEvaluated

    evaluations: list[tuple[float, int, int, float]] = []
    engine = ""

    def listen(event: Event) -> None:
        nonlocal engine
        if isinstance(event, SweepStarted):
            engine = event.engine
        if isinstance(event, TrialEvaluated):
            seconds = time.perf_counter() - began
            evaluations.append((seconds, event.number, event.epoch, event.score))

    with tempfile.TemporaryDirectory(prefix="lorasweep-") as folder:
        spec = _spec(work, Path(folder))
        result, _ = run_sweep(spec, listener=listen, report=False)
    states = [str(record.state) for record in result.records]
    return {
        "engine": engine,
        "evaluations": evaluations,
        "states": {state: states.count(state) for state in sorted(set(states))},
    }


def _spec(work: Search, folder: Path) -> Path:
    for split in read(work):
        _write(folder / f"{split.name}.csv", split)
    spec = folder / "search.yaml"
    spec.write_text(
        f"""\
name: search
seed: {work.seed(1)}
model: {{name: "{work.model}", max_length: {MAX_LENGTH}}}
data:
  source: {{kind: files, train: "{folder}/train.csv", validation: "{folder}/validation.csv"}}
  labels: [{", ".join(LABELS)}]
lora: {{dropout: {DROPOUT}}}
training:
  epochs: {work.epochs[0]}
  batch_size: {BATCH_SIZE}
  eval_batch_size: {EVAL_BATCH_SIZE}
  weight_decay: {WEIGHT_DECAY}
  warmup: {WARMUP}
engine: packed
lanes: {work.lanes}
search:
  trials: {work.trials}
  objective: f1
  sampler: {{kind: tpe}}
  pruner: {{kind: successive_halving, reduction_factor: {REDUCTION}}}
  space:
    learning_rate: {{low: {LOW:.1e}, high: {HIGH:.1e}, log: true}}
    rank: {{choices: {list(RANKS)}}}
    alpha: {{times_rank: {list(TIMES_RANK)}}}
baselines: []
output: "{folder}/mlruns"
""",
        encoding="utf-8",
    )
    return spec


def _write(path: Path, split: TextSplit) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = zip(split.texts, split.labels, strict=True)
        csv.writer(stream).writerows([("text", "label"), *rows])
