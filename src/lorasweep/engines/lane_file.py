"""A lane as a file: safetensors, with a digest over every byte of it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorasweep.core.outcomes import EpochEvaluation, StepReport
from lorasweep.engines.lane import Lane
from lorasweep.model.lane_adapter import trained_parameters
from lorasweep.model.lane_weights import LaneState

_KEY = "lorasweep"
_PARTS = ("weights", "first", "second")  # as LaneState calls them


class UnfitError(Exception):
    """Why a checkpoint can't be gone on from."""


def lane_content(lane: Lane, state: LaneState, fingerprint: str) -> bytes:
    """All of a lane as the bytes of a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for part in _PARTS:
        for name, value in getattr(state, part).items():
            tensors[f"{part}.{name}"] = value.cpu().contiguous()
    if lane.kept is not None:
        for name, parameter, _ in trained_parameters(lane.adapter):
            tensors[f"best.{name}"] = parameter.data.contiguous()
    reports = [entry for entry in lane.told if isinstance(entry, StepReport)]
    epochs = [entry for entry in lane.told if isinstance(entry, EpochEvaluation)]
    tensors["losses"] = torch.tensor(lane.losses, dtype=torch.float64)
    tensors["reports"] = torch.tensor(
        [[r.step, r.loss, r.learning_rate, r.grad_norm or 0.0] for r in reports],
        dtype=torch.float64,
    ).view(-1, 4)
    for evaluation in epochs:
        tensors[f"logits.{evaluation.epoch}"] = torch.from_numpy(evaluation.logits).contiguous()
    about = json.dumps(
        {
            "fingerprint": fingerprint,
            "step": lane.progress.step,
            "kept": lane.kept,
            "seconds": lane.seconds,
            "clock": lane.clock,
            "places": lane.places,
            "evaluations": [[one.epoch, one.step, one.seconds] for one in epochs],
        }
    )
    return bytes(save(tensors, {_KEY: about, "digest": _digest(about, tensors)}))


def read_lane(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint, each byte of it held to the digest that was written with it."""
    with safe_open(str(path), framework="pt") as stored:
        metadata = stored.metadata() or {}
        # Copies: what safe_open gives are views of a file that will be replaced.
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
    about = metadata.get(_KEY, "")
    if metadata.get("digest") != _digest(about, tensors):
        raise UnfitError("it is damaged")
    return json.loads(about), tensors


def _digest(about: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()


def fill_lane(
    lane: Lane, about: dict[str, Any], tensors: dict[str, Tensor], fingerprint: str
) -> None:
    """Give a lane that was just built everything that a file holds; or change nothing of it.

    Args:
        lane: The lane.
        about: From :func:`read_lane`.
        tensors: From there, too.
        fingerprint: What the lane's own would be.

    Raises:
        UnfitError: It is another trial's.
    """
    if about["fingerprint"] != fingerprint:
        raise UnfitError("it is of another plan, base or data")
    shapes = {name: value.shape for name, value, _ in trained_parameters(lane.adapter)}
    for name, shape in shapes.items():
        for part in _PARTS:
            found = tensors.get(f"{part}.{name}")
            if found is None or found.shape != shape:
                raise UnfitError(f"its {part} don't fit {name}")
    plan, progress = lane.plan, lane.progress
    lane.parked = LaneState(
        *({name: tensors[f"{part}.{name}"] for name in shapes} for part in _PARTS)
    )
    lane.kept = about["kept"]
    if lane.kept is not None:
        for name, parameter, _ in trained_parameters(lane.adapter):
            parameter.data = tensors[f"best.{name}"]
    progress.step = lane.resumed = about["step"]
    lane.clock, lane.places = about["clock"], about["places"]
    lane.began = time.perf_counter() - about["seconds"]
    lane.losses = tensors["losses"].tolist()
    told: list[StepReport | EpochEvaluation] = [
        StepReport(plan.number, int(step), progress.steps, loss, rate, norm)
        for step, loss, rate, norm in tensors["reports"].tolist()
    ]
    told += [
        EpochEvaluation(
            trial=plan.number,
            epoch=epoch,
            epochs=plan.epochs,
            step=step,
            steps=progress.steps,
            logits=tensors[f"logits.{epoch}"].numpy(),
            seconds=seconds,
        )
        for epoch, step, seconds in about["evaluations"]
    ]
    # As it happened: of one step, the loss was told before the epoch.
    lane.told = sorted(told, key=lambda entry: (entry.step, isinstance(entry, EpochEvaluation)))
    lane.evaluated = len(about["evaluations"])
    lane.saved = lane.mark
