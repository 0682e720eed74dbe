"""Runs packs on the simulated device, and tries the device itself; prints what happened as JSON.

    python simulated_report.py FOLDER '{"bert 0.1": ["/a/base", 0.1], …}'

A script, since the device is for a whole process; ``test_simulated_device.py`` starts it once.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from simulated_device import DEVICE, SimulatedDevice

from conftest import tokens_split
from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialFacts, Verdict
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines import packed
from lorasweep.engines.pack_steps import PackSteps
from lorasweep.model.base import Base, open_base
from lorasweep.model.lane_weights import LaneWeights
from lorasweep.spec.schema import ModelSpec

SETTINGS = EngineSettings(precision="fp32", device="cpu", log_every=1, eval_batch_size=16)
SPLITS = tokens_split("train", 30, 1), tokens_split("validation", 14, 2)
ADAPTERS = (
    AdapterPlan(4, 8.0, 0.2),
    AdapterPlan(2, 8.0, 0.3, ("all-linear",), top_layers=1),
    AdapterPlan(16, 4.0, 0.5, ("all-linear",)),
    AdapterPlan(1, 1.0),
    AdapterPlan(2, 2.0, 0.1, top_layers=1),
)


class Recorder:
    """Keeps every number that a pack tells."""

    def __init__(self) -> None:
        self.steps: dict[int, list[tuple[float, float, float]]] = {}
        self.logits: dict[int, list[Any]] = {}

    def started(self, trial: int, facts: TrialFacts) -> None:
        self.steps[trial], self.logits[trial] = [], []

    def stepped(self, report: StepReport) -> None:
        numbers = report.loss, report.learning_rate, report.grad_norm
        self.steps[report.trial].append(numbers)

    def shrank(self, lanes: int, why: str) -> None:
        raise AssertionError(f"{why}: {lanes} lanes")  # told as the pack's error

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        self.logits[evaluation.trial].append(evaluation.logits.tolist())
        return Verdict(keep=True, go_on=True)


def mixed_plans(folder: Path) -> list[TrialPlan]:
    """Five plans that differ in all that may differ; the last begins where another ended."""
    return [
        TrialPlan(
            number=number,
            seed=11 + number,
            adapter=adapter,
            learning_rate=3e-3,
            epochs=epochs,
            batch_size=batch_size,
            weight_decay=0.1 * number,
            warmup=0.3,
            scheduler="linear",
            max_grad_norm=0.5 * (number % 2),
            folder=folder / f"{number:04d}",
        )
        for number, (adapter, epochs, batch_size) in enumerate(
            zip(ADAPTERS, (2, 1, 2, 1, 1), (8, 7, 16, 3, 5), strict=True)
        )
    ]


def run_pack(base: Base, device: torch.device, folder: Path, plans: int = 5) -> dict[str, Any]:
    """Train on a device, three lanes at once; what went wrong is told, not raised."""
    recorder = Recorder()
    packed.pick_device = lambda _: device
    told: dict[str, Any] = {"error": "", "steps": recorder.steps, "logits": recorder.logits}
    try:
        engine = packed.PackedEngine(base, *SPLITS, SETTINGS, 3)
        outcomes = list(engine.run(mixed_plans(folder)[:plans], recorder))
        told["outcomes"] = sorted((o.trial, o.state.value, o.steps, o.reason) for o in outcomes)
    except Exception:
        told["error"] = traceback.format_exc()
    return told


def run_simulated(base: Base, folder: Path, plans: int = 5) -> dict[str, Any]:
    """Train on the simulated device, and tell where the host waited, and when."""
    steps, original = 0, PackSteps.take

    def step(self: PackSteps, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        with simulated.during("step"):
            return original(self, *args, **kwargs)

    with SimulatedDevice() as simulated:
        PackSteps.take = step  # type: ignore[method-assign]
        try:
            told = run_pack(base, DEVICE, folder, plans)
        finally:
            PackSteps.take = original  # type: ignore[method-assign]
    for name, during in (("waits_in_steps", "step"), ("waits_elsewhere", "")):
        found = {f"{w.kind}, {w.place}" for w in simulated.waits if w.during == during}
        told[name] = sorted(found)
    return {**told, "pack_steps": steps}


def run_with_a_wait(base: Base, folder: Path) -> dict[str, Any]:
    """Train with a wait put into the step, which must be told."""
    original = LaneWeights.gradient_norms

    def waiting(self: LaneWeights) -> torch.Tensor:
        norms = original(self)
        assert norms.sum().item() >= 0
        return norms

    LaneWeights.gradient_norms = waiting  # type: ignore[method-assign]
    try:
        return run_simulated(base, folder, plans=1)
    finally:
        LaneWeights.gradient_norms = original  # type: ignore[method-assign]


class WaitsInBackward(torch.autograd.Function):
    """Reads a number where autograd's own thread computes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * grads[0].sum().item()


def tried() -> dict[str, Any]:
    """Do single operations on the device: which waits each is noted for, or how it is refused."""
    with SimulatedDevice() as simulated:
        near = torch.arange(6.0)
        far, whole = near.to(DEVICE), torch.arange(6, device=DEVICE)
        mask, lengths = far > 2, torch.full((3,), 2, device=DEVICE)
        leaf = torch.ones(6, device=DEVICE, requires_grad=True)

        def reduced(**how: Any) -> torch.Tensor:
            return torch.segment_reduce(far, "sum", lengths=lengths, **how)

        trials: dict[str, Callable[[], Any]] = {
            "item": lambda: far[0].item(),
            "if": lambda: bool((far > 1).all()),
            "tolist": lambda: far.tolist(),
            "nonzero": lambda: mask.nonzero(),
            "where": lambda: torch.where(mask),
            "equal": lambda: torch.equal(far, far),
            "masked_select": lambda: far.masked_select(mask),
            "unique": lambda: whole.unique(),
            "unique_consecutive": lambda: whole.unique_consecutive(),
            "bincount": lambda: whole.bincount(),
            "index by mask": lambda: far[mask],
            "write by mask": lambda: far.clone().index_put_((mask,), far[:3]),
            "repeats": lambda: whole[:3].repeat_interleave(lengths),
            "to the host": lambda: far.cpu(),
            "write to the host": lambda: near.clone().copy_(far),
            "to the device": lambda: near.to(DEVICE),
            "write to the device": lambda: far.clone().copy_(near),
            "list to the device": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
            "index by list": lambda: far[[0, 1]],
            "segments": lambda: reduced(),
            "backward": lambda: WaitsInBackward.apply(leaf).sum().backward(),
            "two devices": lambda: far + near,
            "two devices in a product": lambda: torch.outer(near, far),
            "fine: fill by mask": lambda: far.clone().masked_fill_(mask, 0.0),
            "fine: write one value by mask": lambda: far.clone().__setitem__(mask, 0.0),
            "fine: index": lambda: far[whole],
            "fine: repeats": lambda: whole[:3].repeat_interleave(lengths, output_size=6),
            "fine: segments": lambda: reduced(unsafe=True),
            "fine: to the host": lambda: far.to("cpu", non_blocking=True),
            "fine: to the device": lambda: near.to(DEVICE, non_blocking=True),
            "fine: a number of the host": lambda: far * torch.tensor(2.0),
            "fine: type": lambda: far.to(torch.float64),
            "fine: gradient": lambda: (leaf * far).sum().backward(),
        }
        found: dict[str, Any] = {}
        for name, attempt in trials.items():
            simulated.waits.clear()
            try:
                attempt()
            except RuntimeError as error:
                found[name] = str(error)
            else:
                found[name] = sorted({wait.kind for wait in simulated.waits})
    return found


def main(folder: Path, bases: dict[str, tuple[str, float]]) -> None:
    """Print the report of some bases, each by the name given to it: its path and its dropout."""
    report: dict[str, Any] = {"tried": tried(), "packs": {}}
    for name, (path, base_dropout) in bases.items():
        base = open_base(
            ModelSpec(name=path, max_length=64, base_dropout=base_dropout), ("no", "yes")
        )
        report["packs"][name] = {
            "cpu": run_pack(base, torch.device("cpu"), folder / name / "cpu"),
            "simulated": run_simulated(base, folder / name / "simulated"),
        }
    report["with_a_wait"] = run_with_a_wait(base, folder / "with_a_wait")
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
