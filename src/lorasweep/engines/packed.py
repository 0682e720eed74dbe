"""The packed engine: many LoRA trials at once on one frozen base, refilled without a pause.

Every step lays the next batch of every lane behind one another and runs the base once over
all of them. What is a trial's own stays its own: rows, masks, loss, gradient norm, moments,
rates, epochs. A lane that ends is given the next plan at the very next step; no lane waits
for another. See docs/packed-engine.md for the picture.
"""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel

from lorasweep.core.errors import StorageError
from lorasweep.core.protocols import Reporter
from lorasweep.core.records import (
    AdapterPlan,
    EncodedSplit,
    EngineSettings,
    EpochEvaluation,
    Outcome,
    StepReport,
    TrialFacts,
    TrialPlan,
    TrialState,
)
from lorasweep.core.seeding import derive_seed
from lorasweep.engines.lane_adamw import LaneStep, update
from lorasweep.engines.lane_memory import free_bytes, is_out_of_memory, saved_bytes
from lorasweep.engines.packing import Progress, lanes_that_fit, length_batches
from lorasweep.model.adapter import adapted_modules, attach, count_parameters
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.checkpoint import save_adapter
from lorasweep.model.lane_weights import LaneState
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.model.packed_dropout import lane_key
from lorasweep.model.packed_lora import LaneSettings, PackedModel, release_frozen
from lorasweep.model.packed_products import lane_sums
from lorasweep.model.precision import pick_device, resolve

if TYPE_CHECKING:
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

# More lanes than these don't make a step cheaper per trial: the products are large enough.
_MOST_LANES = {"cpu": 8, "cuda": 32}


@dataclass(slots=True, eq=False)
class Lane:
    """A trial under way.

    Attributes:
        plan: The trial.
        progress: Steps done, rows to come.
        adapter: Its PEFT model without frozen weights: names and shapes to save by.
        settings: Scaling and dropout.
        began: ``time.perf_counter()`` at its start.
        losses: Losses since the last report.
        parked: Weights and moments while it has no place in the pack.
        outcome: How it ended; None while it runs.
    """

    plan: TrialPlan
    progress: Progress
    adapter: PeftModel
    settings: LaneSettings
    began: float
    losses: list[float] = field(default_factory=list)
    parked: LaneState | None = None
    outcome: Outcome | None = None

    @property
    def seconds(self) -> float:
        """Wall time since it began."""
        return time.perf_counter() - self.began

    def end(self, state: TrialState, reason: str = "", trace: str = "") -> None:
        """Settle how it ended."""
        self.outcome = Outcome(
            self.plan.number, state, self.progress.step, self.seconds, reason, trace
        )


@dataclass(slots=True)
class PackUse:
    """What a pack did, for reports and benchmarks.

    Attributes:
        steps: Pack steps; each is one optimizer step of every lane in it.
        lane_steps: Optimizer steps of all trials.
        tokens: Real tokens of training and evaluation.
        attended: Tokens that attention computed for them, its padding included.
        halved: Times that memory ran out and the lanes were halved.
        bytes_per_lane: What one more lane takes at its longest batch; None until measured.
        idle_places: Sum over pack steps of places without a lane while plans remained.
    """

    steps: int = 0
    lane_steps: int = 0
    tokens: int = 0
    attended: int = 0
    halved: int = 0
    bytes_per_lane: int | None = None
    idle_places: int = 0


class PackedEngine:
    """Trains many plans at the same time on one base. Implements ``core.protocols.Engine``.

    Args:
        base: The frozen base; loaded once.
        train: Rows to learn from.
        validation: Rows to score after each epoch.
        settings: What all trials share.
        lanes: How many trials at once; ``auto`` measures a step and takes what memory allows.

    Raises:
        ModelError: The device isn't there, or the base has a part that a pack can't carry.
    """

    def __init__(
        self,
        base: Base,
        train: EncodedSplit,
        validation: EncodedSplit,
        settings: EngineSettings,
        lanes: int | Literal["auto"] = "auto",
    ) -> None:
        self.base = base
        self.train = train
        self.validation = validation
        self.settings = settings
        self.device = pick_device(settings.device)
        self.precision = resolve(settings.precision, self.device)
        self.use = PackUse()
        self._lanes = lanes
        self._model: PackedModel | None = None

    @property
    def capacity(self) -> int:
        """How many trials it trains at the same time; measured on the first call for ``auto``."""
        if self._lanes == "auto":
            self._lanes = self._measured_lanes()
        return self._lanes

    @property
    def model(self) -> PackedModel:
        """The base that all trials share, loaded on first use."""
        if self._model is None:
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            self._model = PackedModel(fresh_classifier(self.base, 0), self.device, dtype)
        return self._model

    def run(self, plans: Iterable[TrialPlan], reporter: Reporter) -> Iterator[Outcome]:
        """Train every plan and yield each outcome; see ``core.protocols.Engine``."""
        self.model.keep_lanes([])
        yield from PackRun(self, iter(plans), reporter).outcomes()

    def halve(self) -> None:
        """Go on with half the lanes: memory ran out."""
        self._lanes = max(1, self.capacity // 2)
        self.use.halved += 1

    def build(self, plan: TrialPlan) -> Lane:
        """Build a trial exactly as the trainer engine does, and keep what is its own of it."""
        began = time.perf_counter()
        shutil.rmtree(plan.adapter_folder, ignore_errors=True)
        fresh = fresh_classifier(self.base, derive_seed(plan.seed, "head"))
        adapter = attach(fresh, plan.adapter, derive_seed(plan.seed, "adapter"))
        return Lane(
            plan=plan,
            progress=Progress(plan, self.train.lengths),
            adapter=adapter,
            settings=LaneSettings(plan.adapter.scaling, plan.adapter.dropout),
            began=began,
        )

    def _measured_lanes(self) -> int:
        """Measure one step of one lane at its longest rows, and see how often that fits."""
        model = self.model
        plan = AdapterPlan(rank=16, alpha=16.0, dropout=0.1)
        probe = attach(fresh_classifier(self.base, 0), plan, 0)
        model.add_lane(probe, LaneSettings(plan.scaling, plan.dropout))
        rows = length_batches(self.train, 16)[0]
        batch = lay_out(self.train, [LaneRows(rows)], self.device, training=True)
        needed = saved_bytes(lambda: model.forward(batch, training=True).sum(), self.device)
        # Weights, gradients and moments come on top.
        needed += 4 * model.weights.weights.nbytes
        model.keep_lanes([])
        self.use.bytes_per_lane = needed
        most = _MOST_LANES.get(self.device.type, 8)
        lanes = lanes_that_fit(free_bytes(self.device), needed, most)
        _log.info("%d lanes: one more takes %.0f MiB", lanes, needed / 2**20)
        return lanes


class PackRun:
    """One call of :meth:`PackedEngine.run`."""

    def __init__(
        self, engine: PackedEngine, plans: Iterator[TrialPlan], reporter: Reporter
    ) -> None:
        self.engine = engine
        self.plans = plans
        self.reporter = reporter
        self.lanes: list[Lane] = []
        self.parked: list[Lane] = []
        self.exhausted = False

    def outcomes(self) -> Iterator[Outcome]:
        """Fill, step, and yield what ended, until no plan is left."""
        while True:
            yield from self._fill()
            if not self.lanes:
                return
            try:
                self._step()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(error)
            yield from self._take_out_ended()

    # -- places ------------------------------------------------------------------------

    def _fill(self) -> Iterator[Outcome]:
        """Give every free place a lane: parked ones first, then the next plans."""
        while len(self.lanes) < self.engine.capacity:
            if self.parked:
                self._enter(self.parked.pop(0))
                continue
            plan = None if self.exhausted else next(self.plans, None)
            if plan is None:
                self.exhausted = True
                return
            began = time.perf_counter()
            try:
                lane = self.engine.build(plan)
            except StorageError:
                raise  # the disk concerns all trials
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                trace = traceback.format_exc()
                seconds = time.perf_counter() - began
                yield Outcome(plan.number, TrialState.FAILED, 0, seconds, reason, trace)
                continue
            self._start(lane)

    def _start(self, lane: Lane) -> None:
        trainable, total = count_parameters(lane.adapter)
        facts = TrialFacts(
            trainable_parameters=trainable,
            all_parameters=total,
            steps=lane.progress.steps,
            targets=adapted_modules(lane.adapter),
            lane=len(self.lanes),
        )
        self._enter(lane)
        release_frozen(lane.adapter)
        self.reporter.started(lane.plan.number, facts)

    def _enter(self, lane: Lane) -> None:
        model = self.engine.model
        if lane.parked is None:
            model.add_lane(lane.adapter, lane.settings)
        else:
            model.restore_lane(lane.adapter, lane.settings, lane.parked)
            lane.parked = None
        self.lanes.append(lane)

    def _take_out_ended(self) -> Iterator[Outcome]:
        ended = [lane for lane in self.lanes if lane.outcome is not None]
        if not ended:
            return
        self._keep([lane for lane in self.lanes if lane.outcome is None])
        for lane in ended:
            assert lane.outcome is not None
            yield lane.outcome

    def _keep(self, kept: list[Lane]) -> None:
        self.engine.model.keep_lanes([self.lanes.index(lane) for lane in kept])
        self.lanes = kept

    def _shrink(self, error: Exception) -> None:
        """Memory ran out: park half of the lanes as they are, or fail the only one."""
        weights = self.engine.model.weights
        weights.drop_gradients()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(self.lanes) == 1:
            plan = self.lanes[0].plan
            self.lanes[0].end(
                TrialState.FAILED,
                f"out of memory at batch size {plan.batch_size} and rank {plan.adapter.rank}; "
                "a smaller batch_size or model.max_length needs less",
                "".join(traceback.format_exception(error)),
            )
            return
        self.engine.halve()
        half = max(1, len(self.lanes) // 2)
        for lane in self.lanes[half:]:
            lane.parked = self.engine.model.lane_state(self.lanes.index(lane), lane.adapter)
            self.parked.append(lane)
        self._keep(self.lanes[:half])
        _log.warning("out of memory: going on with %d lanes", half)

    # -- one step ----------------------------------------------------------------------

    def _step(self) -> None:
        """One optimizer step of every lane; those at the end of an epoch are evaluated."""
        engine, model = self.engine, self.engine.model
        batch = lay_out(
            engine.train,
            [
                LaneRows(lane.progress.next_rows(), lane_key(lane.plan.seed), lane.progress.step)
                for lane in self.lanes
            ],
            engine.device,
            training=True,
        )
        logits = model.forward(batch, training=True)
        each = F.cross_entropy(logits, batch.labels, reduction="none") * batch.row_weight
        losses = lane_sums(each.detach().unsqueeze(1), batch.row_ends).squeeze(1)
        # Lanes share no weight, so the gradient of the sum is each lane's own gradient.
        each.sum().backward()
        self._count(batch)
        self._finish_step(losses)
        due = [lane for lane in self.lanes if lane.outcome is None and lane.progress.epoch_ended]
        if due:
            self._evaluate(due)

    def _finish_step(self, losses: torch.Tensor) -> None:
        """Update all lanes and report; a lane whose loss is no number fails before its update."""
        weights = self.engine.model.weights
        weights.collect_gradients()
        rates = [lane.progress.rate for lane in self.lanes]
        norms = update(
            weights,
            [
                LaneStep(
                    rate, lane.plan.weight_decay, lane.plan.max_grad_norm, lane.progress.step + 1
                )
                for lane, rate in zip(self.lanes, rates, strict=True)
            ],
        )
        found = zip(self.lanes, rates, losses.tolist(), norms.tolist(), strict=True)
        for lane, rate, loss, norm in found:
            if not np.isfinite(loss):
                lane.end(
                    TrialState.FAILED,
                    f"the training loss became {loss} at step {lane.progress.step + 1} "
                    f"of {lane.progress.steps}; a lower learning rate may hold it",
                )
                continue
            lane.progress.step += 1
            lane.losses.append(loss)
            self._report(lane, rate, norm)

    def _report(self, lane: Lane, rate: float, norm: float) -> None:
        progress = lane.progress
        if progress.step % self.engine.settings.log_every and not progress.ended:
            return
        loss = sum(lane.losses) / len(lane.losses)
        lane.losses.clear()
        self.reporter.stepped(
            StepReport(lane.plan.number, progress.step, progress.steps, loss, rate, norm)
        )

    def _count(self, batch: PackedBatch) -> None:
        use = self.engine.use
        use.steps += 1
        use.lane_steps += len(self.lanes)
        use.tokens += batch.tokens
        use.attended += batch.attended
        if not self.exhausted:
            use.idle_places += self.engine.capacity - len(self.lanes)

    # -- epochs ------------------------------------------------------------------------

    def _evaluate(self, due: list[Lane]) -> None:
        """Score the validation rows with every lane that ended an epoch, and ask about each."""
        scored = self._validation_logits(due)
        for lane, logits in zip(due, scored, strict=True):
            progress, plan = lane.progress, lane.plan
            if not np.isfinite(logits).all():
                lane.end(
                    TrialState.FAILED,
                    f"the validation logits of epoch {progress.epochs_done} are not finite "
                    f"numbers (step {progress.step} of {progress.steps}); a lower learning rate "
                    "may help",
                )
                continue
            verdict = self.reporter.evaluated(
                EpochEvaluation(
                    trial=plan.number,
                    epoch=progress.epochs_done,
                    epochs=plan.epochs,
                    step=progress.step,
                    steps=progress.steps,
                    logits=logits,
                    seconds=lane.seconds,
                )
            )
            if verdict.keep:
                self.engine.model.write_lane(self.lanes.index(lane), lane.adapter)
                save_adapter(lane.adapter, plan.adapter_folder)
            if progress.ended:
                lane.end(TrialState.COMPLETED)
            elif not verdict.go_on:
                lane.end(
                    TrialState.PRUNED,
                    f"stopped after epoch {progress.epochs_done} of {plan.epochs}",
                )

    def _validation_logits(self, due: list[Lane]) -> list[NDArray[np.float32]]:
        engine, model = self.engine, self.engine.model
        split = engine.validation
        labels = len(engine.base.label_names)
        scored = [np.zeros((len(split), labels), dtype=np.float32) for _ in due]
        nothing = np.zeros(0, dtype=np.int64)
        with torch.no_grad():
            for rows in length_batches(split, engine.settings.eval_batch_size):
                entries = [LaneRows(rows if lane in due else nothing) for lane in self.lanes]
                batch = lay_out(split, entries, engine.device, training=False)
                logits: Any = model.forward(batch, training=False).float().cpu().numpy()
                engine.use.tokens += batch.tokens
                engine.use.attended += batch.attended
                for at, result in enumerate(scored):
                    result[rows] = logits[at * len(rows) : (at + 1) * len(rows)]
        return scored
