"""Records of what goes into a trial: its plan, and what all trials of an engine share.

Stages hand each other these; nothing here computes or touches a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ParameterValue = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What LoRA adds to the base (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        rank: Size of the low-rank update, ≥ 1.
        alpha: Numerator of the scaling.
        dropout: Applied to the adapter's input, in ``[0, 1)``.
        targets: Names of the modules to adapt (suffixes, as PEFT matches them);
            ``("auto",)`` for the architecture's attention query and value,
            ``("all-linear",)`` for every linear layer but the head.
        top_layers: Adapt only the last n transformer layers; None for all.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("auto",)
    top_layers: int | None = None

    @property
    def scaling(self) -> float:
        """``alpha / rank``, the factor before the low-rank update."""
        return self.alpha / self.rank


CHECKPOINT = "checkpoint.safetensors"
"""Name of a running trial's resumable state in its folder."""

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """All that decides a trial's result, besides the data and the base. Equal plans, equal results.

    Attributes:
        number: The trial's number in the study; names its run and its folder, and decides
            nothing else.
        seed: Seeds the head, the adapter, the data order and dropout.
        adapter: The LoRA plan.
        learning_rate: Peak rate of AdamW.
        epochs: Passes over the training split, ≥ 1.
        batch_size: Rows per optimizer step.
        weight_decay: AdamW's decoupled decay, on all but biases and norms.
        warmup: Share of the steps in ``[0, 1)`` over which the rate rises.
        scheduler: Shape of the learning rate after warm-up.
        max_grad_norm: Gradients of the trial are clipped to this norm; 0 for no clipping.
        folder: The trial's own folder; the engine writes ``adapter/`` below it, and while the
            trial runs its checkpoint. One that lies there and fits is gone on from.
        parameters: The sampled values as the spec names them, for people and MLflow.
        begins: The engine's clock when the plan was first asked for: of use where trials run
            side by side, and changes no result.
    """

    number: int
    seed: int
    adapter: AdapterPlan
    learning_rate: float
    epochs: int
    batch_size: int
    weight_decay: float
    warmup: float
    scheduler: Scheduler
    max_grad_norm: float
    folder: Path
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    begins: int = 0

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter of the best epoch is kept."""
        return self.folder / "adapter"

    @property
    def checkpoint(self) -> Path:
        """Where an engine keeps what continues the trial after it was cut off."""
        return self.folder / CHECKPOINT


@dataclass(frozen=True, slots=True)
class LargestTrial:
    """What no trial of a sweep goes beyond; a lane is measured with all of it at once.

    The defaults are for an engine that is given plans without a spec.

    Attributes:
        batch_size: Rows per optimizer step.
        adapters: Every way to adapt the base that a trial may be given; of ranks and dropouts
            the largest counts, of targets and layers all together. Never empty.
    """

    batch_size: int = 16
    adapters: tuple[AdapterPlan, ...] = (AdapterPlan(rank=16, alpha=16.0, dropout=0.1),)


Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What all trials of an engine share.

    Attributes:
        precision: ``bf16`` multiplies the base in bfloat16 and keeps adapters, head and
            moments in float32; ``auto`` takes it where the hardware multiplies it natively.
        eval_batch_size: Rows per forward pass when evaluating.
        log_every: Optimizer steps between two reported training losses.
        device: ``auto``, ``cpu`` or a CUDA device such as ``cuda:0``.
        checkpoint_seconds: Between two checkpoints of a running trial, for engines that write
            any; longer where writing would take more than half a percent of the time. 0 for
            one after every step, whatever it takes.
        largest: What no trial goes beyond.
    """

    precision: Precision = "auto"
    eval_batch_size: int = 64
    log_every: int = 10
    device: str = "auto"
    checkpoint_seconds: float = 30.0
    largest: LargestTrial = LargestTrial()


@dataclass(frozen=True, slots=True)
class Resumption:
    """What earlier commands left to an engine.

    Attributes:
        trials: So many of the plans to come are of trials that were cut off; they come first.
        clock: The engine's, when it gave out the last outcome that was taken; the points that
            come after those trials' are asked for no earlier than that.
    """

    trials: int = 0
    clock: int = 0


NOTHING_BEFORE = Resumption()
"""A sweep that begins."""
