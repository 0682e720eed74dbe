"""Checkpoints of a pack's lanes: a trial that was cut off goes on where it was.

Data order, dropout masks and rates are functions of the plan and the step, so a lane is its
weights, its moments, its step, and what its reporter was told. All of it lies in one file,
which is replaced whole: nothing in it can be of another moment than the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.errors import Problem, StorageError
from lorasweep.core.outcomes import StepReport, TrialState
from lorasweep.core.plans import TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.engines.lane import Lane
from lorasweep.engines.lane_file import UnfitError, fill_lane, lane_content, read_lane
from lorasweep.model.base import Base
from lorasweep.model.checkpoint import save_adapter, storing, write_whole, writing_path
from lorasweep.model.lane_weights import LaneState

_log = logging.getLogger(__name__)

# Part of every fingerprint. Another number for a change of the file, and for any change of
# the engine after which the same plan trains otherwise (masks, order, arithmetic).
_FORMAT = 6
_SHARE = 0.005  # of the time may go into writing all lanes every so often


class LaneCheckpoints:
    """Writes the lanes of a pack to their trials' folders, and sets new lanes to what lies there.

    Args:
        base: The frozen base.
        train, validation: The rows.
        precision: In which the base multiplies.
        every: Seconds between two checkpoints of all lanes; 0 for one after every step.
    """

    def __init__(
        self,
        base: Base,
        train: EncodedSplit,
        validation: EncodedSplit,
        precision: str,
        every: float,
    ) -> None:
        self._base = base
        self._splits = (train, validation)
        self._precision = precision
        self._every = every
        self._next = 0.0

    def begin(self, took: float = 0.0) -> None:
        """Count the seconds to the next checkpoint of all lanes from now on.

        Args:
            took: Seconds that the last one took: lanes that are large, or on a slow disk, are
                written seldom enough to cost next to nothing.
        """
        wait = max(self._every, took / _SHARE) if self._every else 0.0
        self._next = time.perf_counter() + wait

    @property
    def due(self) -> bool:
        """Whether it is time to write all lanes."""
        return time.perf_counter() >= self._next

    def save_all(self, lanes: Iterable[Lane], state_of: Callable[[Lane], LaneState]) -> None:
        """Do :meth:`save` for all lanes of a pack, and wait for the next time."""
        began = time.perf_counter()
        self.save(lanes, state_of)
        self.begin(time.perf_counter() - began)

    def save(self, lanes: Iterable[Lane], state_of: Callable[[Lane], LaneState]) -> None:
        """Write every running lane that is further than its checkpoint.

        Args:
            lanes: Those to be written.
            state_of: From a lane to its weights and moments now.

        Raises:
            StorageError: The disk is full or can't be written. The older checkpoint is as it was.
        """
        for lane in lanes:
            if lane.outcome is None and lane.mark != lane.saved:
                content = lane_content(lane, state_of(lane), self.fingerprint(lane.plan))
                write_whole(lane.plan.checkpoint, content, "the checkpoint")
                lane.saved = lane.mark

    def take_up(self, lane: Lane) -> None:
        """Set a lane that was just built to where its plan's checkpoint left it, if one fits.

        One that is damaged, or of another plan, base or data, is ignored with a sentence.

        Raises:
            StorageError: The adapter of the best epoch can't be written.
        """
        path = lane.plan.checkpoint
        if not path.exists():
            return
        try:
            fill_lane(lane, *read_lane(path), self.fingerprint(lane.plan))
        except (OSError, SafetensorError, UnfitError) as error:
            _log.warning(
                "trial %d begins at its first step: its checkpoint %s is not used: %s",
                lane.plan.number,
                path,
                error,
            )
            return
        if lane.kept is not None:
            save_adapter(lane.adapter, lane.plan.adapter_folder)

    def fingerprint(self, plan: TrialPlan) -> str:
        """SHA-256 (hex) of all that decides the plan's trajectory."""
        decides = dataclasses.asdict(plan)
        for key in ("number", "folder", "begins", "parameters"):  # the last is in others, resolved
            del decides[key]
        text = json.dumps([_FORMAT, self._shared, decides], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _shared(self) -> str:
        """What all trials of the engine have in common."""
        base, digest = self._base, hashlib.sha256()
        config = {
            key: value
            for key, value in base.config.to_dict().items()
            # Where it lies and who wrote it down.
            if not key.startswith("_") and key != "transformers_version"
        }
        parts = [base.digest, base.base_dropout, base.label_names, config, self._precision]
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
        for split in self._splits:
            for array in (split.tokens, split.offsets, split.labels):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def tell_again(lane: Lane, reporter: Reporter) -> None:
    """Tell the reporter what it was told of the trial that was cut off, in the same order.

    The trial has a number of its own now; its scores, its curves and its best epoch come
    out as if it had never been cut off.
    """
    kept = None
    for entry in lane.told:
        if isinstance(entry, StepReport):
            reporter.stepped(entry)
            continue
        verdict = reporter.evaluated(entry)
        if verdict.keep:
            kept = entry.epoch
        if not verdict.go_on and entry.epoch < entry.epochs:
            lane.end(TrialState.PRUNED, f"stopped after epoch {entry.epoch} of {entry.epochs}")
            return
    if kept != lane.kept:
        # Scores are a function of the logits, so this is another version's scoring.
        lane.end(
            TrialState.FAILED,
            f"it went on from a checkpoint whose best epoch was {lane.kept}, and now it is {kept}, "
            "whose adapter is gone; train it under a new name",
        )
    elif lane.progress.ended and not lane.due:
        lane.end(TrialState.COMPLETED)  # it was cut off between its last epoch and its outcome


def discard(path: Path) -> None:
    """Remove a checkpoint, and what a kill may have left of writing one.

    Raises:
        StorageError: It is there and can't be removed.
    """
    for old in (path, writing_path(path)):
        try:
            old.unlink(missing_ok=True)
        except NotADirectoryError:
            return  # a file where the folder should be: whoever writes there will say so
        except OSError as error:
            raise StorageError(
                Problem(
                    str(old),
                    f"this checkpoint can't be removed: {error.strerror or error}",
                    "Make the folder writable, then run the same command again.",
                )
            ) from error


def hand_over(earlier: Path, path: Path) -> bool:
    """Move the checkpoint of a trial that was cut off to the trial that takes up its point.

    Returns:
        Whether there was one.

    Raises:
        StorageError: It can't be moved there.
    """
    if not earlier.exists():
        discard(earlier)
        return False
    with storing(path, "the checkpoint"):
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier.replace(path)
    discard(earlier)
    return True
