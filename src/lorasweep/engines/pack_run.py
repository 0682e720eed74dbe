"""One run of the packed engine: places are filled, all lanes step, what ended is given out."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from lorasweep.core.errors import StorageError
from lorasweep.core.protocols import Reporter
from lorasweep.core.records import (
    EpochEvaluation,
    Outcome,
    StepReport,
    TrialFacts,
    TrialPlan,
    TrialState,
)
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_adamw import LaneStep, update
from lorasweep.engines.lane_memory import is_out_of_memory
from lorasweep.engines.packing import length_batches
from lorasweep.model.adapter import adapted_modules, count_parameters
from lorasweep.model.checkpoint import save_adapter
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out
from lorasweep.model.packed_dropout import lane_key
from lorasweep.model.packed_lora import release_frozen
from lorasweep.model.packed_products import lane_sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasweep.engines.packed import PackedEngine

_log = logging.getLogger(__name__)


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
                self._advance()
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

    def _advance(self) -> None:
        """Evaluate what is due, else step: apart, so that a lack of memory repeats only one."""
        if due := [lane for lane in self.lanes if lane.due]:
            self._evaluate(due)
        else:
            self._step()

    # -- one step ----------------------------------------------------------------------

    def _step(self) -> None:
        """One optimizer step of every lane."""
        engine, model = self.engine, self.engine.model
        batch = lay_out(
            engine.train,
            [
                LaneRows(lane.progress.next_rows(), lane_key(lane.plan.seed), lane.progress.step)
                for lane in self.lanes
            ],
            engine.device,
            training=True,
            filled=model.filled,
        )
        logits = model.forward(batch, training=True)
        each = F.cross_entropy(logits, batch.labels, reduction="none") * batch.row_weight
        losses = lane_sums(each.detach().unsqueeze(1), batch.row_ends).squeeze(1)
        # Lanes share no weight, so the gradient of the sum is each lane's own gradient.
        each.sum().backward()
        self._count(batch)
        self._finish_step(losses)

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
            lane.evaluated = progress.epochs_done
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
                batch = lay_out(split, entries, engine.device, training=False, filled=model.filled)
                logits: Any = model.forward(batch, training=False).float().cpu().numpy()
                engine.use.tokens += batch.tokens
                engine.use.attended += batch.attended
                for at, result in enumerate(scored):
                    result[rows] = logits[at * len(rows) : (at + 1) * len(rows)]
        return scored
