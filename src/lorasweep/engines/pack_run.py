"""One run of the packed engine: places are filled, all lanes step, what ended is given out."""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lorasweep.core.errors import StorageError
from lorasweep.core.outcomes import EpochEvaluation, Outcome, StepReport, TrialFacts, TrialState
from lorasweep.core.plans import NOTHING_BEFORE, Resumption, TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_adamw import LaneStep
from lorasweep.engines.lane_checkpoint import discard, tell_again
from lorasweep.engines.lane_scoring import validation_logits
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.model.adapter import adapted_modules, count_parameters
from lorasweep.model.checkpoint import save_adapter
from lorasweep.model.heap import give_freed_memory_back
from lorasweep.model.lane_spans import lane_sums
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_dropout import lane_key
from lorasweep.model.packed_lora import release_frozen
from lorasweep.model.torch_errors import is_out_of_memory
from lorasweep.model.transfer import OnItsWay

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class MadeStep:
    """A step whose update was made, and whose losses may still be on their way.

    Attributes:
        lanes: Who took it, with the step's number (from 1) and rate.
        values: Losses and gradient norms, ``(2, lanes)``.
    """

    lanes: tuple[tuple[Lane, int, float], ...]
    values: OnItsWay


class PackRun:
    """One call of :meth:`PackedEngine.run`.

    Attributes:
        unread: Steps that were made and whose losses were not read yet, at most
            ``engine.lag`` of them between two steps.
    """

    def __init__(
        self,
        engine: PackedEngine,
        plans: Iterator[TrialPlan],
        reporter: Reporter,
        resumption: Resumption = NOTHING_BEFORE,
    ) -> None:
        self.engine = engine
        self.plans = plans
        self.reporter = reporter
        self.places = PackPlaces(engine, resumption)
        self.unread: deque[MadeStep] = deque()

    def outcomes(self) -> Generator[Outcome, None, None]:
        """Fill, step, and yield what ended, until no plan is left.

        Whatever stops it before that (Ctrl-C, an error that concerns all trials, whoever takes
        the outcomes closing it) leaves checkpoints of the trials under way.
        """
        places = self.places
        self.engine.checkpoints.begin()
        try:
            yield from self._fill()
            while True:
                # What ends at the same step ends together: all of it is told before any point
                # is asked for, and so it is again when some of it was told before a kill.
                if not places.due:
                    yield from self._give_out_ended()
                    yield from self._fill()
                    if not places.lanes:
                        return
                if (lack := self._try_to_advance()) is not None:
                    self._shrink(lack)
        except BaseException:
            self._save_before_stopping()
            raise

    # -- places ------------------------------------------------------------------------

    def _fill(self) -> Iterator[Outcome]:
        """Give every free place a lane: those outside whose time has come, then the next plans."""
        places = self.places
        places.enter()
        while places.wants_plan:
            plan = next(self.plans, None)
            if plan is None:
                places.exhausted = True
                break
            turn, began = places.take_turn(), time.perf_counter()
            try:
                lane = self.engine.build(plan)
            except StorageError:
                raise  # the disk concerns all trials
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                yield Outcome(
                    plan.number,
                    TrialState.FAILED,
                    0,
                    time.perf_counter() - began,
                    reason,
                    traceback.format_exc(),
                    max(plan.begins, places.clock),
                )
                discard(plan.checkpoint)
                continue
            lane.turn = turn
            self._start(lane)
        places.enter()

    def _start(self, lane: Lane) -> None:
        self.places.admit(lane)
        trainable, total = count_parameters(lane.adapter)
        facts = TrialFacts(
            trainable_parameters=trainable,
            all_parameters=total,
            steps=lane.progress.steps,
            targets=adapted_modules(lane.adapter),
            lane=lane.place,
            resumed_step=lane.resumed,
        )
        release_frozen(lane.adapter)
        self.reporter.started(lane.plan.number, facts)
        tell_again(lane, self.reporter)

    def _give_out_ended(self) -> Iterator[Outcome]:
        places = self.places
        if not (ended := places.ended):
            return
        places.keep([lane for lane in places.lanes if lane.outcome is None])
        for lane in ended:
            assert lane.outcome is not None
            yield dataclasses.replace(lane.outcome, clock=places.clock)
            discard(lane.plan.checkpoint)  # only now: whoever took the outcome has noted it

    def _try_to_advance(self) -> str | None:
        """Advance, and return the traceback where memory ran out.

        The error holds the frames it went through, and they hold all that the step has computed:
        only when it is gone there is memory to go on with.
        """
        try:
            self._advance()
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            trace = "".join(traceback.format_exception(error))
            traceback.clear_frames(error.__traceback__)
        self.engine.model.forget_pass()
        return trace

    def _shrink(self, trace: str) -> None:
        """Memory ran out: park half of the lanes as they are, or fail the only one."""
        places = self.places
        places.whole = True  # an update allocates before it changes anything
        self.engine.model.weights.drop_gradients()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            give_freed_memory_back()
        self._read_losses()
        if places.ended and not places.due:
            return  # one has just turned out to have failed: perhaps there is room without it
        if len(going := places.going) > 1:
            self.engine.halve()
            places.park_half()
            _log.warning("out of memory: going on with %d lanes", len(places.going))
            return
        (lane,) = going
        lane.end(
            TrialState.FAILED,
            f"out of memory at batch size {lane.plan.batch_size} and rank "
            f"{lane.plan.adapter.rank}; a smaller batch_size or model.max_length needs less",
            trace,
        )

    def _advance(self) -> None:
        """Evaluate what is due, else step: apart, so that a lack of memory repeats only one."""
        places, checkpoints = self.places, self.engine.checkpoints
        if places.due:
            self._read_losses()  # one of them may fail
        if due := places.due:
            self._evaluate(due)
        elif not places.ended:
            self._step()
        if checkpoints.due:
            self._read_losses()
            checkpoints.save_all(places.everyone, places.state_of)
        else:
            checkpoints.save(due, places.state_of)

    def _save_before_stopping(self) -> None:
        """Save all lanes as they are, unless the stop came while they changed."""
        places = self.places
        if not places.whole:
            return
        try:
            self._note_losses()  # who goes on will be told them again
            self.engine.checkpoints.save(places.everyone, places.state_of)
        except Exception as error:  # the reason for the stop is what must be told
            _log.warning("a trial will go on from an older checkpoint, or start again: %s", error)

    # -- one step ----------------------------------------------------------------------

    def _step(self) -> None:
        """One optimizer step of every lane."""
        engine, model, lanes = self.engine, self.engine.model, self.places.lanes
        batch = lay_out(
            engine.train,
            [
                LaneRows(lane.progress.next_rows(), lane_key(lane.plan.seed), lane.progress.step)
                for lane in lanes
            ],
            engine.device,
            training=True,
            filled=model.filled,
        )
        logits = model.forward(batch, training=True)
        each = F.cross_entropy(logits, batch.labels, reduction="none") * batch.row_weight
        losses = lane_sums(each.detach().unsqueeze(1), batch.row_spans).squeeze(1)
        # Lanes share no weight, so the gradient of the sum is each lane's own gradient.
        each.sum().backward()
        engine.use.count(batch, len(lanes), self.places.idle)
        self._finish_step(losses)

    def _finish_step(self, losses: torch.Tensor) -> None:
        """Update all lanes, and report the losses that have arrived."""
        weights, lanes = self.engine.model.weights, self.places.lanes
        weights.collect_gradients()
        steps = [
            LaneStep(
                lane.progress.rate,
                lane.plan.weight_decay,
                lane.plan.max_grad_norm,
                lane.progress.step + 1,
            )
            for lane in lanes
        ]
        # All memory is taken before anything changes: it may run out.
        numbers = losses.new_empty(2, len(lanes))
        values = OnItsWay(numbers)
        with self.places.changing():
            numbers[0], numbers[1] = losses, self.engine.adamw.update(weights, steps)
            values.send()
            self.places.tick()
            for lane in lanes:
                lane.progress.step += 1
            made = [(lane, step.step, step.rate) for lane, step in zip(lanes, steps, strict=True)]
            self.unread.append(MadeStep(tuple(made), values))
        self._read_losses(self.engine.lag)

    def _read_losses(self, but: int = 0) -> None:
        """Note the losses of all steps made, but for the latest ones, and report them."""
        for report in self._note_losses(but):
            self.reporter.stepped(report)

    def _note_losses(self, but: int = 0) -> list[StepReport]:
        """Note losses in their lanes; a lane whose loss is no number fails.

        That it may have made another step meanwhile harms nobody else.

        Returns:
            What is to be reported.
        """
        log_every = self.engine.settings.log_every
        reports = []
        while len(self.unread) > but:
            made = self.unread[0]
            losses, norms = made.values.read()
            with self.places.changing():
                for (lane, step, rate), loss, norm in zip(made.lanes, losses, norms, strict=True):
                    reports.append(lane.note_step(step, rate, loss, norm, log_every))
                self.unread.popleft()
        return [report for report in reports if report is not None]

    # -- epochs ------------------------------------------------------------------------

    def _evaluate(self, due: list[Lane]) -> None:
        """Score the validation rows with every lane that ended an epoch, and ask about each."""
        places = self.places
        scored = validation_logits(self.engine, places.lanes, due)
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
            with places.changing():
                if verdict.keep:
                    self.engine.model.write_lane(places.lanes.index(lane), lane.adapter)
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
