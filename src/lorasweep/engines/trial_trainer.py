"""What a trial adds to the Hugging Face Trainer: its data order, its loss, and its reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.errors import DivergedError
from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialFacts
from lorasweep.core.plans import TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.core.seeding import derive_seed
from lorasweep.data.order import epoch_batches, steps_per_epoch
from lorasweep.model.adapter import adapted_modules, count_parameters
from lorasweep.model.base import Base
from lorasweep.model.checkpoint import save_adapter
from lorasweep.model.scoring import pad_rows, pads_left

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Answer = TypeVar("_Answer")


class RowNumbers(Dataset[int]):
    """The rows of a split by number; their tokens are looked up when a batch is made."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        return index


class EpochBatches(Sampler[list[int]]):
    """The batches of one epoch in the order that all engines share; :attr:`epoch` counts from 0."""

    def __init__(self, split: EncodedSplit, batch_size: int, seed: int) -> None:
        self.lengths = split.lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        for rows in epoch_batches(self.lengths, self.batch_size, self.seed, self.epoch):
            yield rows.tolist()

    def __len__(self) -> int:
        return steps_per_epoch(len(self.lengths), self.batch_size)


class EpochLoader(DataLoader[int]):
    """A data loader that the Trainer tells which epoch is next."""

    def set_epoch(self, epoch: int) -> None:
        """Take the order of ``epoch`` from now on; the Trainer calls this before each one."""
        batches = self.batch_sampler
        assert isinstance(batches, EpochBatches)
        batches.epoch = epoch


class TrialTrainer(Trainer):
    """A Trainer that takes the data order from the plan and stops at the first loss that is NaN.

    Args:
        model: The PEFT model.
        args: The Trainer's own settings.
        train_split: Tokens and labels.
        order_seed: The trial's seed.
        base: Says how to pad.
        watch: Reports, evaluates and keeps.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        train_split: EncodedSplit,
        order_seed: int,
        base: Base,
        watch: TrialWatch,
    ) -> None:
        self.train_split = train_split
        self.order_seed = order_seed
        self.base = base
        super().__init__(
            model=model,
            args=args,
            train_dataset=RowNumbers(len(train_split)),
            callbacks=[watch],
            compute_loss_func=mean_cross_entropy,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the plan's order, padded to their longest row and no further."""
        left = pads_left(self.base.architecture)
        return EpochLoader(
            RowNumbers(len(self.train_split)),
            batch_sampler=EpochBatches(
                self.train_split, self.args.per_device_train_batch_size, self.order_seed
            ),
            collate_fn=lambda rows: pad_rows(self.train_split, rows, self.base.pad_id, left=left),
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Do the Trainer's step, unless its loss is no finite number.

        Raises:
            DivergedError: Before the optimizer could spread the damage.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the training loss became {loss.item()} at step {self.state.global_step + 1} "
                f"of {self.state.max_steps}; a lower learning rate may help"
            )
        return loss


def mean_cross_entropy(
    outputs: Mapping[str, Any], labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    """Mean over the batch's rows, in float32, whatever the architecture's own loss would be.

    Args:
        outputs: With ``logits``, ``(batch, labels)``.
        labels: Label indices, ``(batch,)``.
        num_items_in_batch: Rows of all accumulated batches: always this one's, so unused.
    """
    del num_items_in_batch
    return F.cross_entropy(outputs["logits"].float(), labels)


class TrialWatch(TrainerCallback):
    """Tells the reporter how a trial goes, and does what it answers.

    Args:
        plan: The trial.
        steps: Optimizer steps of its whole budget.
        score: From the model to the validation logits, ``(rows, labels)``.
        reporter: Who is told, and answers.

    Attributes:
        steps_done: Optimizer steps so far.
        stopped: Why the trial was ended early; empty if it wasn't.
        reporter_error: What the reporter raised, so that it isn't blamed on the trial.
    """

    def __init__(
        self,
        plan: TrialPlan,
        steps: int,
        score: Callable[[Any], NDArray[np.float32]],
        reporter: Reporter,
    ) -> None:
        self.plan = plan
        self.steps = steps
        self.score = score
        self.reporter = reporter
        self.steps_done = 0
        self.stopped = ""
        self.reporter_error: Exception | None = None
        self._began = time.perf_counter()
        self._epochs_done = 0

    @property
    def seconds(self) -> float:
        """Wall time since the trial began, model building included."""
        return time.perf_counter() - self._began

    def on_train_begin(
        self,
        _args: TrainingArguments,
        _state: TrainerState,
        _control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Report the model, and start dropout's random numbers from the plan's seed."""
        model = kwargs["model"]
        trainable, total = count_parameters(model)
        facts = TrialFacts(
            trainable_parameters=trainable,
            all_parameters=total,
            steps=self.steps,
            targets=adapted_modules(model),
        )
        self._ask(lambda: self.reporter.started(self.plan.number, facts))
        # After everything else that draws: what was built before must not shift the masks.
        torch.manual_seed(derive_seed(self.plan.seed, "dropout"))

    def on_step_end(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_kwargs: Any,
    ) -> None:
        """Count, and have the last step logged even where ``log_every`` doesn't divide."""
        self.steps_done = state.global_step
        if state.global_step == self.steps:
            control.should_log = True

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Pass on the Trainer's own log of a training loss; its closing summary has none."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        norm = logs.get("grad_norm")
        report = StepReport(
            trial=self.plan.number,
            step=state.global_step,
            steps=self.steps,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=None if norm is None else float(norm),
        )
        self._ask(lambda: self.reporter.stepped(report))

    def on_epoch_end(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Score the validation rows, ask for a verdict, and carry it out."""
        self._epochs_done += 1
        model = kwargs["model"]
        logits = self.score(model)
        if not np.isfinite(logits).all():
            raise DivergedError(
                f"the validation logits of epoch {self._epochs_done} are not finite numbers "
                f"(step {state.global_step} of {self.steps}); a lower learning rate may help"
            )
        evaluation = EpochEvaluation(
            trial=self.plan.number,
            epoch=self._epochs_done,
            epochs=self.plan.epochs,
            step=state.global_step,
            steps=self.steps,
            logits=logits,
            seconds=self.seconds,
        )
        verdict = self._ask(lambda: self.reporter.evaluated(evaluation))
        if verdict.keep:
            save_adapter(model, self.plan.adapter_folder)
        if not verdict.go_on and self._epochs_done < self.plan.epochs:
            self.stopped = f"stopped after epoch {self._epochs_done} of {self.plan.epochs}"
            control.should_training_stop = True

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        try:
            return question()
        except Exception as error:
            self.reporter_error = error
            raise
