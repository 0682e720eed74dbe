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
from collections.abc import Generator, Iterable
from typing import Literal

import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.outcomes import Outcome
from lorasweep.core.plans import NOTHING_BEFORE, EngineSettings, Resumption, TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.core.seeding import derive_seed
from lorasweep.engines.lane import Lane, PackUse
from lorasweep.engines.lane_adamw import LaneAdamW
from lorasweep.engines.lane_checkpoint import LaneCheckpoints
from lorasweep.engines.lane_memory import free_bytes, lane_bytes
from lorasweep.engines.lane_scoring import SCORED_ROWS
from lorasweep.engines.pack_run import PackRun
from lorasweep.engines.packing import Progress, lanes_that_fit
from lorasweep.engines.passes import Passes
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.fresh_copies import FreshCopies
from lorasweep.model.heap import keep_freed_memory
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.model.precision import pick_device, resolve

_log = logging.getLogger(__name__)

# More lanes than these don't make a step cheaper per trial: the products are large enough. For
# CUDA it is a guess (docs/decisions/0010).
_MOST_LANES = {"cpu": 16, "cuda": 32}


class PackedEngine:
    """Trains many plans at the same time on one base. Implements ``core.protocols.Engine``.

    Args:
        base: The frozen base; loaded once, here, and proven against the plain model.
        train: Rows to learn from.
        validation: Rows to score after each epoch.
        settings: What all trials share.
        lanes: How many trials at once; ``auto`` measures a step of the largest trial that the
            settings allow for, and takes what memory allows.
        most: With ``auto``, no more than these, whatever the memory; None for no such bound.

    Attributes:
        copies: Of the base as it was read; each trial's own PEFT model begins as one.
        model: The base that all trials share.
        passes: Take rows through it.
        use: What was done so far.
        checkpoints: Of the lanes under way.
        adamw: Updates them.
        lag: Steps that are under way before the losses of the one before them are read: on an
            accelerator the next step is sent off without waiting for this one.

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
        *,
        most: int | None = None,
    ) -> None:
        self.base = base
        self.train = train
        self.validation = validation
        self.settings = settings
        self.device = pick_device(settings.device)
        self.precision = resolve(settings.precision, self.device)
        self.use = PackUse()
        self.checkpoints = LaneCheckpoints(
            base, train, validation, self.precision, settings.checkpoint_seconds
        )
        self.lag = 0 if self.device.type == "cpu" else 1
        self._lanes = lanes
        self._most = _MOST_LANES.get(self.device.type, 8)
        if most is not None:
            self._most = min(self._most, most)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        if self.device.type == "cpu":
            keep_freed_memory()
        loaded = fresh_classifier(base, 0)
        self.copies = FreshCopies(loaded, 0)
        self.model = PackedModel(loaded, self.device, dtype)
        self.model.shared.most_bytes = free_bytes(self.device) // 8
        self.passes = Passes(self.model)
        self.adamw = LaneAdamW(self.device)

    @property
    def capacity(self) -> int:
        """How many trials it trains at the same time; measured on the first call for ``auto``."""
        if self._lanes == "auto":
            self._lanes = self._measured_lanes()
        return self._lanes

    def run(
        self,
        plans: Iterable[TrialPlan],
        reporter: Reporter,
        resumption: Resumption = NOTHING_BEFORE,
    ) -> Generator[Outcome, None, None]:
        """Train every plan and yield each outcome; see ``core.protocols.Engine``."""
        self.model.keep_lanes([])
        yield from PackRun(self, iter(plans), reporter, resumption).outcomes()

    def halve(self, most: int) -> None:
        """Go on with half the places, and with no more than ``most``: memory ran out."""
        self._lanes = max(1, min(self.capacity // 2, most))
        self.use.halved += 1

    def build(self, plan: TrialPlan) -> Lane:
        """Build a trial exactly as the trainer engine does, and keep what is its own of it.

        Where a checkpoint of exactly this plan lies in its folder, it is where that left it.
        """
        began = time.perf_counter()
        shutil.rmtree(plan.adapter_folder, ignore_errors=True)
        fresh = self.copies.fresh(derive_seed(plan.seed, "head"))
        adapter = attach(fresh, plan.adapter, derive_seed(plan.seed, "adapter"))
        lane = Lane(
            plan=plan,
            progress=Progress(plan, self.train.lengths),
            adapter=adapter,
            settings=LaneSettings(plan.adapter.scaling, plan.adapter.dropout),
            began=began,
            clock=plan.begins,
        )
        self.checkpoints.take_up(lane)
        return lane

    def measure_lane(self) -> int | None:
        """Measure what one more lane takes and note it; a pack without lanes only.

        Returns:
            Bytes; None where not even one fits.
        """
        largest = self.settings.largest
        rows = min(self.settings.eval_batch_size, SCORED_ROWS * largest.batch_size)
        self.use.bytes_per_lane = lane_bytes(
            self.model, self.copies, self.train, self.device, largest, (self.validation, rows)
        )
        return self.use.bytes_per_lane

    def _measured_lanes(self) -> int:
        """See how often the largest lane of the sweep fits."""
        needed = self.measure_lane()
        if needed is None:
            return 1  # whose own step will say what didn't fit
        lanes = lanes_that_fit(free_bytes(self.device), needed, self._most)
        _log.info("%d lanes: one more takes %.0f MiB", lanes, needed / 2**20)
        return lanes
