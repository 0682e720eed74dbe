"""The frozen records that stages hand each other. Nothing here computes or touches a disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep.core.engine_use import EngineUse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ParameterValue = bool | int | float | str | None


# --------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Texts and labels of one split; the four tuples are row by row.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        texts: The cleaned texts.
        labels: Index of each row's label in :attr:`Corpus.label_names`.
        ids: Stable name of each row, ``<source>:<row number counted from 1>``.
        tags: What each text is known to contain (``("negation", "irony")``); empty tuple
            for a corpus that doesn't say.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    ids: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """What cleaning did to one split, so that nothing is dropped without a word.

    Attributes:
        split: The split's name.
        read: Rows found in the source.
        kept: Rows left.
        changed: Rows whose text was altered, by reason (``whitespace collapsed``).
        dropped: Rows left out, by reason (``fewer than 3 words``).
        notes: Whole sentences about what was found but left alone, such as texts that
            occur twice with different labels.
    """

    split: str
    read: int
    kept: int
    changed: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """How much of ``held_out`` is known from ``train``.

    Attributes:
        held_out: Name of the split that should be unseen.
        rows: Rows in it.
        contained: Rows whose normalised words lie inside, or contain, a training text of
            three words or more.
        duplicated: Rows whose normalised words equal a training text.
    """

    held_out: str
    rows: int
    contained: int
    duplicated: int

    @property
    def share(self) -> float:
        """Share of the held-out rows that are contained, 0 to 1."""
        return self.contained / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Corpus:
    """A data set ready for use: cleaned, labelled, split.

    Attributes:
        name: Short name for people and for MLflow.
        label_names: In order of label index; two or more.
        train, validation, test: The splits; ``test`` is None when the spec names none.
        cleaning: One report a split.
        leakage: Validation against train, and test against train where there is one.
        digests: Split name to the SHA-256 of its texts and labels (hex).
        fingerprint: SHA-256 over the digests and label names: the data's identity.
        source: Where it came from, in words (paths or a Hub id).
    """

    name: str
    label_names: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    test: TextSplit | None
    cleaning: tuple[CleaningReport, ...]
    leakage: tuple[LeakageReport, ...]
    digests: Mapping[str, str]
    fingerprint: str
    source: str


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """A split as token ids, stored without padding: row i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Attributes:
        name: The split's name.
        tokens: int32, ``(total tokens,)``; special tokens included, truncated to the
            model's maximum length.
        offsets: int64, ``(rows + 1,)``.
        labels: int64, ``(rows,)``.
        truncated: Rows that were longer than the maximum and lost their end.
    """

    name: str
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, ``(rows,)``."""
        return self.offsets[1:] - self.offsets[:-1]

    def row(self, index: int) -> NDArray[np.int32]:
        """Token ids of one row, ``(tokens in the row,)``."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


# --------------------------------------------------------------------------------------
# Trials
# --------------------------------------------------------------------------------------


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
    """

    precision: Precision = "auto"
    eval_batch_size: int = 64
    log_every: int = 10
    device: str = "auto"
    checkpoint_seconds: float = 30.0


class TrialState(StrEnum):
    """How a trial stands. The last four are final."""

    RUNNING = "running"
    COMPLETED = "completed"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_final(self) -> bool:
        return self is not TrialState.RUNNING


@dataclass(frozen=True, slots=True)
class TrialFacts:
    """What an engine knows of a trial once its model is built.

    Attributes:
        trainable_parameters: LoRA weights, head and newly initialised modules.
        all_parameters: Those and the frozen base.
        steps: Optimizer steps of the whole budget.
        targets: Full names of the adapted modules.
        lane: The trial's place in a pack; None where trials run alone.
        resumed_step: Optimizer steps that it takes over from the trial that was cut off, whose
            checkpoint it goes on from; 0 where it begins with its first step.
    """

    trainable_parameters: int
    all_parameters: int
    steps: int
    targets: tuple[str, ...] = ()
    lane: int | None = None
    resumed_step: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """A training loss on its way to the tracker.

    Attributes:
        trial: Number of the trial.
        step: Optimizer steps done, ≥ 1.
        steps: Steps of the whole budget.
        loss: Mean training loss over the steps since the last report.
        learning_rate: The rate of this step.
        grad_norm: Norm before clipping; None where the engine doesn't compute one.
    """

    trial: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float | None = None


@dataclass(frozen=True, slots=True)
class EpochEvaluation:
    """The validation logits at the end of an epoch.

    Attributes:
        trial: Number of the trial.
        epoch: Epochs done, ≥ 1.
        epochs: Epochs of the whole budget.
        step: Optimizer steps done.
        steps: Steps of the whole budget.
        logits: float32, ``(validation rows, labels)``, in the split's own row order.
        seconds: Training and evaluation time of the trial so far.
    """

    trial: int
    epoch: int
    epochs: int
    step: int
    steps: int
    logits: NDArray[np.float32]
    seconds: float

    @property
    def share(self) -> float:
        """Share of the budget spent, in ``(0, 1]``."""
        return self.step / self.steps


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the engine is to do after an evaluation.

    Attributes:
        keep: This is the trial's best epoch so far: save its adapter.
        go_on: Train on; False ends the trial here, as pruned.
    """

    keep: bool
    go_on: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended, as the engine saw it.

    Attributes:
        trial: Number of the trial.
        state: COMPLETED, PRUNED or FAILED.
        steps: Optimizer steps done.
        seconds: Wall time the trial was under way.
        reason: Why it failed or was stopped; empty when completed.
        traceback: Of the failure, for the tracker; empty otherwise.
        clock: The engine's, when it gave this out; 0 where trials run one after another.
    """

    trial: int
    state: TrialState
    steps: int
    seconds: float
    reason: str = ""
    traceback: str = ""
    clock: int = 0


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


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial as the study remembers it: the source of reports, status and the live view.

    Attributes:
        number: The trial's number.
        state: How it stands.
        parameters: The sampled values, by the spec's names.
        score: The objective at the best epoch; None before the first evaluation.
        best_epoch: Epoch of that score; None before the first evaluation.
        metrics: All validation metrics of the best epoch, without the ``val_`` prefix.
        seconds: Wall time it took.
        seed: The trial's seed.
        run_id: Its MLflow run; empty until tracked.
        reason: Why it failed, was pruned or interrupted.
        retry_of: Number of the interrupted trial whose point this one takes up.
    """

    number: int
    state: TrialState
    parameters: Mapping[str, ParameterValue]
    score: float | None = None
    best_epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    seed: int = 0
    run_id: str = ""
    reason: str = ""
    retry_of: int | None = None


# --------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one model says about one split.

    Attributes:
        model: ``finetuned`` or a baseline's name.
        split: The split's name.
        ids: Row names, as in :class:`TextSplit`.
        labels: int64, ``(rows,)``: the truth.
        probabilities: float64, ``(rows, labels)``; each row sums to 1.
    """

    model: str
    split: str
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """Index of the most probable label of each row, ``(rows,)``; the first one on a tie."""
        result: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return result


@dataclass(frozen=True, slots=True)
class FinishedSweep:
    """All that a report is made of; a report reads this and nothing else.

    Attributes:
        name: The sweep's name.
        task: What is learned, in words, such as ``text classification, 2 labels``.
        objective: Name of the validation metric that chose the winner.
        spec: The resolved spec as plain data.
        spec_fingerprint: Of everything in it that decides results.
        corpus: The data, all splits.
        base: About the base: ``name``, ``digest``, ``architecture``.
        seeds: Named seeds, such as ``sweep`` and the winner's ``trial``.
        trials: Every trial, by number.
        best: The winner by validation.
        facts: Parameter counts of the winner.
        test: Predictions on the test split by model: ``finetuned`` first, then the baselines.
        samples: Texts shown before and after training: ``(text, before, after)`` with the
            probabilities of each label, from the untrained and the fine-tuned model.
        openings: Every time that a model was scored on the test split: ISO time, winner's
            trial number, reason. More than one weakens the conclusion, and is said.
        history: Validation scores of every trial by epoch: number -> ``((epoch, score), …)``.
        environment: Versions, machine, git commit.
        engine_uses: How each command trained, the first one first.
        tracking: ``uri``, ``experiment``, ``run_id`` of the parent run.
    """

    name: str
    task: str
    objective: str
    spec: Mapping[str, Any]
    spec_fingerprint: str
    corpus: Corpus
    base: Mapping[str, str]
    seeds: Mapping[str, int]
    trials: tuple[TrialRecord, ...]
    best: TrialRecord
    facts: TrialFacts
    test: Mapping[str, Predictions]
    samples: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]
    openings: tuple[Mapping[str, Any], ...]
    history: Mapping[int, tuple[tuple[int, float], ...]]
    environment: Mapping[str, Any]
    tracking: Mapping[str, str]
    engine_uses: tuple[EngineUse, ...] = ()


JsonValue = Any  # what json.dumps takes; mypy has no good recursive word for it
