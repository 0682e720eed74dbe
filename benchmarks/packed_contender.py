"""lorasweep's engines on the fixed trials, with one thing or another switched off."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
from workload import DROPOUT, EVAL_BATCH_SIZE, LABELS, MAX_LENGTH, Work, read

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialFacts, Verdict
from lorasweep.core.plans import EngineSettings, TrialPlan


class BestScores:
    """A reporter that keeps each trial's best validation F1."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels
        self.best: dict[int, float] = {}

    def started(self, trial: int, facts: TrialFacts) -> None:
        pass

    def stepped(self, report: StepReport) -> None:
        pass

    def shrank(self, lanes: int, why: str) -> None:
        pass

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        from sklearn.metrics import f1_score

        score = float(f1_score(self.labels, evaluation.logits.argmax(1)))
        keep = score > self.best.get(evaluation.trial, -1.0)
        self.best[evaluation.trial] = max(score, self.best.get(evaluation.trial, -1.0))
        return Verdict(keep, True)


def packed(
    work: Work,
    *,
    lanes: int | str | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    base_dropout: float | None = None,
    dropout: float = DROPOUT,
    top_layers: int | None = None,
    shared: bool = True,
    packs: Literal["refilled", "fixed", "of equal epochs"] = "refilled",
    padded: Literal["lane", "pack"] | None = None,
    whole: bool = False,
    laid_out: bool = True,
) -> dict[str, Any]:
    """Run the packed engine; each argument switches one thing off.

    Args:
        work: The work.
        lanes: None for the work's own.
        precision: ``fp32`` is without bfloat16.
        base_dropout, dropout: 0 is without.
        top_layers: Adapt only so many.
        shared: False computes the layers below the first adapted one again each time.
        packs: ``fixed`` starts a pack when the one before has ended, in the trials' order;
            ``of equal epochs`` does so with the trials sorted by epochs, which only somebody
            can who knows all trials beforehand and prunes none.
        padded: Pad each row to its lane's longest, or its pack's. The model sees the padding as
            words, so the scores mean nothing: only the time is that of a padded engine.
        whole: Each pass goes through the base in one piece, instead of in halves.
        laid_out: False leaves the base's weights as they are, to ``F.linear``.
    """
    began = time.perf_counter()
    base, train, validation = opened(work, base_dropout)
    opened_at = time.perf_counter()
    from lorasweep.engines.packed import PackedEngine
    from lorasweep.model import frozen_linear

    if not laid_out:
        frozen_linear.lays_out = lambda _: False
    settings = EngineSettings(precision=precision, eval_batch_size=EVAL_BATCH_SIZE)
    engine = PackedEngine(base, train, validation, settings, lanes or work.lanes)
    if whole:
        engine.passes.most = 1
    if not shared:
        engine.model.shared.most_bytes = 0
    scores, places = BestScores(validation.labels), engine.capacity
    built_at = time.perf_counter()
    busy: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder, _padded(padded, base.pad_id) as rows:
        plans = work.plans(Path(folder), dropout, top_layers)
        if packs == "of equal epochs":
            plans.sort(key=lambda plan: plan.epochs)
        size = len(plans) if packs == "refilled" else places
        outcomes = []
        for start in range(0, len(plans), size):
            pack = _noting(plans, start, start + size, lambda: busy.append(_lane_steps(engine)))
            outcomes += engine.run(pack, scores)
    _check(outcomes)
    use = engine.use
    steps, lane_steps = busy[0]
    return {
        "f1": [scores.best[number] for number in range(len(plans))],
        "lanes": places,
        "precision": engine.precision,
        "pack_steps": use.steps,
        "lane_steps": use.lane_steps,
        "step_time_share": use.step_seconds / use.seconds,
        "lanes_busy": use.lane_steps / max(1, use.steps * places),
        "lanes_busy_while_plans_remained": lane_steps / (steps * places) if steps else None,
        "real_share_in_attention": use.tokens / max(1, use.attended),
        "as_it_ran": _as_it_ran(engine),
        "phases": {  # seconds
            "imports, texts, base": opened_at - began,
            "engine, lanes measured": built_at - opened_at,
            "steps": use.step_seconds,
            "evaluation, building lanes, writing": use.seconds - use.step_seconds,
        },
        **rows,
        **{k: v for k, v in dataclasses.asdict(use).items() if k.startswith(("bytes", "halved"))},
    }


def trainer_engine(
    work: Work, *, precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> dict[str, Any]:
    """Run the reference engine: one Trainer per trial, in the packed engine's data order."""
    from lorasweep.engines.trainer import TrainerEngine

    base, train, validation = opened(work)
    settings = EngineSettings(precision=precision, eval_batch_size=EVAL_BATCH_SIZE)
    scores = BestScores(validation.labels)
    with tempfile.TemporaryDirectory() as folder:
        engine = TrainerEngine(base, train, validation, settings)
        plans = work.plans(Path(folder))
        _check(list(engine.run(plans, scores)))
    return {"f1": [scores.best[plan.number] for plan in plans], "precision": engine.precision}


def opened(work: Work, base_dropout: float | None = None) -> tuple[Any, EncodedSplit, EncodedSplit]:
    splits = read(work)
    from lorasweep.data.tokens import encode
    from lorasweep.model.base import open_base
    from lorasweep.spec.schema import ModelSpec

    spec = ModelSpec(name=work.model, max_length=MAX_LENGTH, base_dropout=base_dropout)
    base = open_base(spec, LABELS)
    train, validation = (encode(split, base.tokenizer, MAX_LENGTH) for split in splits)
    return base, train, validation


def _as_it_ran(engine: Any) -> dict[str, Any]:
    """What was switched on, asked of the engine itself."""
    from lorasweep.model.frozen_linear import FrozenLinear
    from lorasweep.model.kernels import kernels_for
    from lorasweep.model.packed_modules import KeyedDropout

    modules = list(engine.model.model.modules())
    frozen = [module for module in modules if isinstance(module, FrozenLinear)]
    return {
        "parts_of_a_pass": engine.passes.most,
        "weights_laid_out": any(module.laid_out is not None for module in frozen),
        "base_dropout": any(isinstance(module, KeyedDropout) and module.p for module in modules),
        "lower_layers_kept": bool(engine.model.shared._kept),
        "compiled_kernels": kernels_for(engine.model.weights.weights) is not None,
    }


def _noting(plans: Sequence[TrialPlan], start: int, stop: int, note: Any) -> Iterator[TrialPlan]:
    """Hand out a part of the plans; take note when the very last of all is taken."""
    for number, plan in enumerate(plans[start:stop], start):
        if number == len(plans) - 1:
            note()
        yield plan


def _lane_steps(engine: Any) -> tuple[int, int]:
    return engine.use.steps, engine.use.lane_steps


def _check(outcomes: Sequence[Any]) -> None:
    failed = [outcome.reason for outcome in outcomes if outcome.state != "completed"]
    if failed:
        raise RuntimeError("; ".join(failed))


@contextlib.contextmanager
def _padded(over: Literal["lane", "pack"] | None, pad_id: int) -> Iterator[dict[str, Any]]:
    """Let the engine lay out padded rows for as long as the block runs, and count them."""
    rows: dict[str, Any] = {}
    if over is None:
        yield rows
        return
    from lorasweep.engines.passes import Passes

    original, counts = Passes.lay_out, {"real": 0, "laid": 0}

    def lay_out(self: Any, split: EncodedSplit, lanes: Sequence[Any], *, training: bool) -> Any:
        if not training:
            return original(self, split, lanes, training=training)
        longest = [int(split.lengths[lane.rows].max(initial=0)) for lane in lanes]
        if over == "pack":
            longest = [max(longest)] * len(lanes)
        sizes = [len(lane.rows) for lane in lanes]
        wide = np.repeat(longest, sizes)
        made = _widened(split, np.concatenate([lane.rows for lane in lanes]), wide, pad_id)
        numbers = np.split(np.arange(len(wide)), np.cumsum(sizes)[:-1])
        counts["real"] += int(split.lengths[np.concatenate([lane.rows for lane in lanes])].sum())
        counts["laid"] += int(wide.sum())
        padded = [
            dataclasses.replace(lane, rows=own) for lane, own in zip(lanes, numbers, strict=True)
        ]
        return original(self, made, padded, training=training)

    with mock.patch.object(Passes, "lay_out", lay_out):
        yield rows
    rows["real_share"] = counts["real"] / counts["laid"]


def _widened(split: EncodedSplit, rows: np.ndarray, wide: np.ndarray, pad_id: int) -> EncodedSplit:
    """Copy rows of a split, each padded to the width given."""
    column = np.arange(wide.max())[None, :]
    real = column < split.lengths[rows][:, None]
    index = np.where(real, split.offsets[rows][:, None] + column, 0)
    tokens = np.where(real, split.tokens[index], pad_id)[column < wide[:, None]]
    offsets = np.concatenate([[0], np.cumsum(wide)]).astype(np.int64)
    return EncodedSplit(split.name, tokens.astype(np.int32), offsets, split.labels[rows])
