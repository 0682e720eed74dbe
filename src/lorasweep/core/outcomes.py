"""Records of what comes out: of a trial while it runs, of a trial at its end, of a sweep.

Stages hand each other these; nothing here computes or touches a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from lorasweep.core.corpora import Corpus
from lorasweep.core.engine_use import EngineUse
from lorasweep.core.plans import ParameterValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
            trial number, reason; ``study`` where trials are of several, all but the last of them
            deleted. More than one weakens the conclusion, and is said.
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
