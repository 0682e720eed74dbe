"""One run of the packed engine: places are filled, all lanes step, what ended is given out."""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lorasweep.core.errors import StorageError
from lorasweep.core.outcomes import EpochEvaluation, Outcome, TrialFacts, TrialState
from lorasweep.core.plans import TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_adamw import LaneStep, update
from lorasweep.engines.lane_checkpoint import discard, tell_again
from lorasweep.engines.lane_memory import is_out_of_memory
from lorasweep.engines.lane_scoring import validation_logits
from lorasweep.model.adapter import adapted_modules, count_parameters
from lorasweep.model.checkpoint import save_adapter
from lorasweep.model.lane_weights import LaneState
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_dropout import lane_key
from lorasweep.model.packed_lora import release_frozen
from lorasweep.model.packed_products import lane_sums

if TYPE_CHECKING:
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
        self._whole = True

    def outcomes(self) -> Generator[Outcome, None, None]:
        """Fill, step, and yield what ended, until no plan is left.

        Whatever stops it before that (Ctrl-C, an error that concerns all trials, whoever takes
        the outcomes closing it) leaves checkpoints of the trials under way.
        """
        self.engine.checkpoints.begin()
        try:
            while True:
                yield from self._fill()
                if not self.lanes:
                    return
                if all(lane.outcome is None for lane in self.lanes):
                    try:
                        self._advance()
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        self._shrink(error)
                yield from self._take_out_ended()
        except BaseException:
            self._save_before_stopping()
            raise

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
                discard(plan.checkpoint)
                continue
            self._start(lane)

    def _start(self, lane: Lane) -> None:
        taken = {other.place for other in (*self.lanes, *self.parked)}
        lane.place = next(place for place in itertools.count() if place not in taken)
        trainable, total = count_parameters(lane.adapter)
        facts = TrialFacts(
            trainable_parameters=trainable,
            all_parameters=total,
            steps=lane.progress.steps,
            targets=adapted_modules(lane.adapter),
            lane=lane.place,
            resumed_step=lane.resumed,
        )
        self._enter(lane)
        release_frozen(lane.adapter)
        self.reporter.started(lane.plan.number, facts)
        tell_again(lane, self.reporter)

    def _enter(self, lane: Lane) -> None:
        model = self.engine.model
        with self._changing():
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
            discard(lane.plan.checkpoint)  # only now: whoever took the outcome has noted it

    def _keep(self, kept: list[Lane]) -> None:
        with self._changing():
            self.engine.model.keep_lanes([self.lanes.index(lane) for lane in kept])
            self.lanes = kept

    def _shrink(self, error: Exception) -> None:
        """Memory ran out: park half of the lanes as they are, or fail the only one."""
        self._whole = True  # an update allocates before it changes anything
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
            lane.parked = self._state_of(lane)
            self.parked.append(lane)
        self._keep(self.lanes[:half])
        _log.warning("out of memory: going on with %d lanes", half)

    def _advance(self) -> None:
        """Evaluate what is due, else step: apart, so that a lack of memory repeats only one."""
        if due := [lane for lane in self.lanes if lane.due]:
            self._evaluate(due)
        else:
            self._step()
        checkpoints = self.engine.checkpoints
        if checkpoints.due:
            checkpoints.save_all([*self.lanes, *self.parked], self._state_of)
        else:
            checkpoints.save(due, self._state_of)

    # -- checkpoints -------------------------------------------------------------------

    def _state_of(self, lane: Lane) -> LaneState:
        if lane.parked is not None:
            return lane.parked
        return self.engine.model.lane_state(self.lanes.index(lane), lane.adapter)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Mark lanes that are half-way from one state to the next: none of them may be saved."""
        self._whole = False
        yield
        self._whole = True

    def _save_before_stopping(self) -> None:
        """Save all lanes as they are, unless the stop came while they changed."""
        if not self._whole:
            return
        try:
            self.engine.checkpoints.save([*self.lanes, *self.parked], self._state_of)
        except Exception as error:  # the reason for the stop is what must be told
            _log.warning("a trial will go on from an older checkpoint, or start again: %s", error)

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
        idle = 0 if self.exhausted else engine.capacity - len(self.lanes)
        engine.use.count(batch, len(self.lanes), idle)
        self._finish_step(losses)

    def _finish_step(self, losses: torch.Tensor) -> None:
        """Update all lanes and report; a lane whose loss is no number fails before its update."""
        weights = self.engine.model.weights
        weights.collect_gradients()
        steps = [
            LaneStep(
                lane.progress.rate,
                lane.plan.weight_decay,
                lane.plan.max_grad_norm,
                lane.progress.step + 1,
            )
            for lane in self.lanes
        ]
        log_every = self.engine.settings.log_every
        with self._changing():
            norms = update(weights, steps)
            found = zip(self.lanes, steps, losses.tolist(), norms.tolist(), strict=True)
            reports = [
                lane.count_step(step.rate, loss, norm, log_every)
                for lane, step, loss, norm in found
            ]
        for report in reports:
            if report is not None:
                self.reporter.stepped(report)

    # -- epochs ------------------------------------------------------------------------

    def _evaluate(self, due: list[Lane]) -> None:
        """Score the validation rows with every lane that ended an epoch, and ask about each."""
        scored = validation_logits(self.engine, self.lanes, due)
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
            evaluation = EpochEvaluation(
                trial=plan.number,
                epoch=progress.epochs_done,
                epochs=plan.epochs,
                step=progress.step,
                steps=progress.steps,
                logits=logits,
                seconds=lane.seconds,
            )
            verdict = self.reporter.evaluated(evaluation)
            with self._changing():
                if verdict.keep:
                    self.engine.model.write_lane(self.lanes.index(lane), lane.adapter)
                    save_adapter(lane.adapter, plan.adapter_folder)
                    lane.kept = evaluation.epoch
                lane.told.append(evaluation)
                lane.evaluated = evaluation.epoch
            if progress.ended:
                lane.end(TrialState.COMPLETED)
            elif not verdict.go_on:
                lane.end(
                    TrialState.PRUNED,
                    f"stopped after epoch {progress.epochs_done} of {plan.epochs}",
                )
