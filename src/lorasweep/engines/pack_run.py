"""One run of the packed engine: places are filled, all lanes step, what ended is given out."""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorasweep.core.outcomes import EpochEvaluation, Outcome, TrialFacts, TrialState, Verdict
from lorasweep.core.plans import NOTHING_BEFORE, Resumption, TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.engines.host_pressure import HostPressure
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_build import build_lane
from lorasweep.engines.lane_checkpoint import discard, tell_again
from lorasweep.engines.lane_scoring import validation_logits
from lorasweep.engines.memory_lack import lack_in, let_go, needs_too_much
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.pack_steps import PackSteps
from lorasweep.engines.pass_errors import fail_culprits
from lorasweep.model.adapter import adapted_modules, count_parameters
from lorasweep.model.checkpoint import save_adapter
from lorasweep.model.lane_adapter import release_frozen, write_values
from lorasweep.model.torch_errors import is_out_of_memory

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine

_log = logging.getLogger(__name__)


class PackRun:
    """One call of :meth:`PackedEngine.run`.

    Args:
        engine: Has the model, and what all runs share.
        plans: Asked for the next one whenever a place is free.
        reporter: Told of everything that happens to a trial.
        resumption: Where earlier commands left off.

    Attributes:
        places: Who trains, and who waits.
        steps: Take all lanes one step further.
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
        self.steps = PackSteps(engine, self.places, reporter)
        self._pressure = HostPressure(engine)
        self._lacked: tuple[int, tuple[int, int]] | None = None

    def outcomes(self) -> Generator[Outcome, None, None]:
        """Fill, step, and yield what ended, until no plan is left.

        Whatever stops it before that (Ctrl-C, an error that concerns all trials, whoever takes
        the outcomes closing it) leaves checkpoints of the trials under way.
        """
        places, began = self.places, time.perf_counter()
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
                self._foresee_lack()
                if (lack := self._lack_in(self._advance)) is not None:
                    self._shrink(lack)
                elif self._lack_in(self._save) is not None:
                    self.engine.checkpoints.begin()
                    _log.warning("out of memory: trials keep their older checkpoints for now")
        except BaseException:
            self._save_before_stopping()
            raise
        finally:
            self.engine.use.seconds += time.perf_counter() - began

    # -- places ------------------------------------------------------------------------

    def _fill(self) -> Iterator[Outcome]:
        """Give every free place a lane: those outside whose time has come, then the next plans.

        As long as one of them finds no memory, nobody else is asked for.
        """
        places = self.places
        fits = yield from self._let_in()
        while fits and places.wants_plan:
            yield from self._take_plans()
            fits = yield from self._let_in()
            if places.held is not None and places.lanes:
                return

    def _let_in(self) -> Generator[Outcome, None, bool]:
        """Let in everyone whose time has come, and fail who finds no memory even alone.

        Returns:
            Whether there was memory; if not, who found none waits for fewer lanes.
        """
        places = self.places
        again = False
        while (lack := self._lack_in(places.enter)) is not None:
            if places.lanes:
                self._make_room(len(places.lanes) + 1)
                return False
            again = not again
            if again:
                continue  # what was let go of may have been enough
            lane = places.turn_away()
            if lane.outcome is None:
                lane.end(TrialState.FAILED, needs_too_much(lane.plan), lack)
            yield from self._give_out([lane])
        return True

    def _take_plans(self) -> Iterator[Outcome]:
        """Build a lane for every free place; where memory runs out, the plan is held for later."""
        places = self.places
        again = False
        while places.wants_plan:
            if places.held is None:
                if (plan := next(self.plans, None)) is None:
                    places.exhausted = True
                    return
                places.held = plan, places.take_turn()
            plan, turn = places.held
            built = build_lane(self.engine, plan, places.clock, last_try=again)
            if built is None:
                if places.everyone:
                    self._make_room(len(places.everyone) + 1)
                    return
                self._let_go()
                again = True
                continue
            again = False
            places.held = None
            if isinstance(built, Outcome):
                yield built
                discard(plan.checkpoint)
            else:
                built.turn = turn
                self._start(built)

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
        yield from self._give_out(ended)

    def _give_out(self, ended: list[Lane]) -> Iterator[Outcome]:
        for lane in ended:
            assert lane.outcome is not None
            yield dataclasses.replace(lane.outcome, clock=self.places.clock)
            discard(lane.plan.checkpoint)  # only now: whoever took the outcome has noted it

    # -- memory that ran out -----------------------------------------------------------

    def _lack_in(self, act: Callable[[], None]) -> str | None:
        """Do something that changes nothing where memory runs out; see :func:`lack_in`."""
        if (lack := lack_in(act)) is not None:
            self.places.whole = True
            self._let_go()
        return lack

    def _let_go(self) -> None:
        let_go(self.engine)
        self._pressure.forget()

    def _make_room(self, most: int) -> None:
        """Someone who is to come finds no memory: it waits for fewer places, ``most`` at most."""
        places = self.places
        self._let_go()
        self.steps.read_losses()
        if places.ended:
            return  # one has just turned out to have failed: perhaps there is room without it
        self.engine.halve(most)
        self._lack_in(lambda: places.park_all_but(self.engine.capacity))
        self.reporter.shrank(self.engine.capacity, "out of memory")

    def _shrink(self, trace: str) -> None:
        """Memory ran out in a step: park half of the lanes as they are.

        Where there is only one, or no memory to park any in, it is tried once more, since all
        that can be let go of has been; then the latest lane fails.
        """
        places = self.places
        self.steps.read_losses()
        if places.ended and not places.due:
            return  # one has just turned out to have failed: perhaps there is room without it
        if (stay := len(places.going) // 2) and self._lack_in(places.park_half) is None:
            self.engine.halve(stay)
            self.reporter.shrank(self.engine.capacity, "out of memory")
            return
        lane = places.going[-1]
        here = lane.plan.number, lane.mark
        if self._lacked == here:
            if stay:  # or whoever takes its place would have the same end
                self.engine.halve(len(places.going) - 1)
                self.reporter.shrank(self.engine.capacity, "out of memory")
            lane.end(TrialState.FAILED, needs_too_much(lane.plan), trace)
        else:
            self._lacked = here
            _log.warning("out of memory: trying once more with all that could be let go of")

    def _foresee_lack(self) -> None:
        """Park half of the lanes, and again, where the kernel would rather kill than refuse."""
        places = self.places
        while self._pressure.too_many(len(places.going)):
            self.steps.read_losses()
            if places.ended and not places.due:
                return  # one has just turned out to have failed: perhaps there is room without it
            stay = len(places.going) // 2
            if self._lack_in(places.park_half) is not None:
                return
            self.engine.halve(stay)
            self.reporter.shrank(self.engine.capacity, "memory is running out")

    # -- between steps -----------------------------------------------------------------

    def _advance(self) -> None:
        """Evaluate what is due, else step: apart, so that a lack of memory repeats only one."""
        places = self.places
        if places.due:
            self.steps.read_losses()  # one of them may fail
        if due := places.due:
            self._evaluate(due)
        elif not places.ended:
            self.steps.take()

    def _save(self) -> None:
        """Save all lanes when it is time to, else those that were evaluated since they were."""
        places, checkpoints = self.places, self.engine.checkpoints
        if checkpoints.due:
            self.steps.read_losses()
            checkpoints.save_all(places.everyone, places.state_of)
        else:
            further = [lane for lane in places.everyone if lane.evaluated > lane.saved[1]]
            checkpoints.save(further, places.state_of)

    def _save_before_stopping(self) -> None:
        """Save all lanes as they are, unless the stop came while they changed."""
        places = self.places
        if not places.whole:
            return
        try:
            self.steps.note_losses()  # who goes on will be told them again
            self.engine.checkpoints.save(places.everyone, places.state_of)
        except Exception as error:  # the reason for the stop is what must be told
            _log.warning("a trial will go on from an older checkpoint, or start again: %s", error)

    # -- epochs ------------------------------------------------------------------------

    def _evaluate(self, due: list[Lane]) -> None:
        """Score the validation rows with every lane that ended an epoch, and ask about each."""
        places, score = self.places, partial(validation_logits, self.engine, self.places.lanes)
        failed = None
        try:
            scored = score(due)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failed = error
        if failed is not None:
            others = [lane for lane in places.going if lane not in due]
            fail_culprits(due, others, lambda lane: score([lane]), failed)
            return
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
            # Copied before anyone is told: where memory runs out, the epoch is evaluated again.
            values = self.engine.model.lane_values(places.lanes.index(lane), lane.adapter)
            try:
                verdict = self._tell(lane, evaluation, values)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Some of those who are told may know the epoch by now, so it can't be told again;
                # and the adapter that they take for kept isn't.
                lane.end(TrialState.FAILED, needs_too_much(plan), traceback.format_exc())
                places.whole = True
                continue
            if progress.ended:
                lane.end(TrialState.COMPLETED)
            elif not verdict.go_on:
                lane.end(
                    TrialState.PRUNED,
                    f"stopped after epoch {progress.epochs_done} of {plan.epochs}",
                )

    def _tell(
        self, lane: Lane, evaluation: EpochEvaluation, values: Mapping[str, torch.Tensor]
    ) -> Verdict:
        """Tell of an epoch, and keep the lane's weights where that is the answer."""
        verdict = self.reporter.evaluated(evaluation)
        with self.places.changing():
            if verdict.keep:
                if lack_in(lambda: _keep(lane, values)) is not None:
                    self._let_go()
                    _keep(lane, values)
                lane.kept = evaluation.epoch
            lane.told.append(evaluation)
            lane.evaluated = evaluation.epoch
        return verdict


def _keep(lane: Lane, values: Mapping[str, torch.Tensor]) -> None:
    write_values(lane.adapter, values)
    save_adapter(lane.adapter, lane.plan.adapter_folder)
