"""One optimizer step of all lanes of a pack, and their losses, which may come in later."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lorasweep.core.outcomes import StepReport
from lorasweep.core.protocols import Reporter
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_adamw import LaneStep
from lorasweep.engines.pack_places import PackPlaces
from lorasweep.engines.pass_errors import fail_culprits
from lorasweep.model.lane_spans import lane_sums
from lorasweep.model.packed_batch import LaneRows, PackedBatch
from lorasweep.model.packed_dropout import lane_key
from lorasweep.model.torch_errors import is_out_of_memory
from lorasweep.model.transfer import OnItsWay

if TYPE_CHECKING:
    from lorasweep.engines.packed import PackedEngine


@dataclasses.dataclass(frozen=True, slots=True)
class MadeStep:
    """A step whose update was made, and whose losses may still be on their way.

    Attributes:
        lanes: Who took it, with the step's number (from 1) and rate.
        values: Losses and gradient norms, ``(2, lanes)``.
    """

    lanes: tuple[tuple[Lane, int, float], ...]
    values: OnItsWay


class PackSteps:
    """Takes all lanes of a pack one step further.

    Args:
        engine: Has the model, the rows and the optimizer.
        places: Whose lanes step.
        reporter: Told the losses.

    Attributes:
        unread: Steps that were made and whose losses were not read yet, at most
            ``engine.lag`` of them between two steps.
    """

    def __init__(self, engine: PackedEngine, places: PackPlaces, reporter: Reporter) -> None:
        self.unread: deque[MadeStep] = deque()
        self._engine, self._places, self._reporter = engine, places, reporter

    def take(self) -> None:
        """Take one optimizer step with every lane, and report the losses that have arrived.

        Where memory runs out on the way, no lane has changed. Nor has one after any other error
        before the update; whose own it is has failed then.
        """
        began = time.perf_counter()
        engine, lanes = self._engine, self._places.lanes
        failed = None
        try:
            losses, batches = self._pass(lanes)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failed = error
        if failed is not None:
            self._fail_culprits(failed)
            return
        engine.use.count(batches, len(lanes), self._places.idle)
        self._finish(losses)
        reports = self.note_losses(engine.lag)
        engine.use.step_seconds += time.perf_counter() - began
        for report in reports:
            self._reporter.stepped(report)

    def _pass(self, those: Sequence[Lane]) -> tuple[torch.Tensor, list[PackedBatch]]:
        """Leave gradients at the parameters, of the rows of some lanes; none of them has changed.

        Returns:
            Losses of all lanes, ``(lanes,)``, and the parts of the pass.
        """
        engine, lanes = self._engine, self._places.lanes
        nothing = np.zeros(0, dtype=np.int64)
        entries = [
            LaneRows(
                lane.progress.next_rows() if lane in those else nothing,
                lane_key(lane.plan.seed),
                lane.progress.step,
            )
            for lane in lanes
        ]
        batches = engine.passes.lay_out(engine.train, entries, training=True)
        found = engine.passes.each(self._forth_and_back, batches)
        losses = found[0].new_zeros(len(lanes))
        for batch, part in zip(batches, found, strict=True):
            losses[batch.lanes.start : batch.lanes.stop] += part
        return losses, batches

    def _fail_culprits(self, error: Exception) -> None:
        """A pass raised an error that isn't a lack of memory: end the lanes whose own it is."""
        self.read_losses()
        if self._places.ended:
            return  # one has just turned out to have failed: perhaps it goes without that one
        fail_culprits(self._places.going, [], lambda lane: self._pass([lane]), error)

    def _forth_and_back(self, batch: PackedBatch) -> torch.Tensor:
        """Leave gradients at the parameters of a batch's lanes, and return their losses."""
        logits = self._engine.model.forward(batch, training=True)
        each = F.cross_entropy(logits, batch.labels, reduction="none") * batch.row_weight
        # Lanes share no weight, so the gradient of the sum is each lane's own gradient.
        each.sum().backward()
        return lane_sums(each.detach().unsqueeze(1), batch.row_spans).squeeze(1)

    def _finish(self, losses: torch.Tensor) -> None:
        """Update all lanes."""
        weights, lanes = self._engine.model.weights, self._places.lanes
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
        with self._places.changing():
            numbers[0], numbers[1] = losses, self._engine.adamw.update(weights, steps)
            values.send()
            self._places.tick()
            for lane in lanes:
                lane.progress.step += 1
            made = [(lane, step.step, step.rate) for lane, step in zip(lanes, steps, strict=True)]
            self.unread.append(MadeStep(tuple(made), values))

    def read_losses(self) -> None:
        """Note all losses, and report them."""
        for report in self.note_losses():
            self._reporter.stepped(report)

    def note_losses(self, but: int = 0) -> list[StepReport]:
        """Note losses in their lanes; a lane whose loss is no number fails.

        That it may have made another step meanwhile harms nobody else.

        Args:
            but: So many of the latest steps may wait.

        Returns:
            What is to be reported.
        """
        log_every = self._engine.settings.log_every
        reports = []
        while len(self.unread) > but:
            made = self.unread[0]
            losses, norms = made.values.read()
            with self._places.changing():
                for (lane, step, rate), loss, norm in zip(made.lanes, losses, norms, strict=True):
                    reports.append(lane.note_step(step, rate, loss, norm, log_every))
                self.unread.popleft()
        return [report for report in reports if report is not None]
