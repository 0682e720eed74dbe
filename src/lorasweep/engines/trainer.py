"""The trainer engine: one Hugging Face Trainer per trial, one trial after another.

This is the reference that other engines are held to, so its arithmetic is plain:

* the loss of a step is the mean cross-entropy of the batch's rows, in float32;
* gradients are clipped to ``max_grad_norm`` by the norm over *all* trainable parameters,
  adapter, new modules and head together (``accelerate``'s clipping);
* AdamW (betas 0.9 and 0.999, epsilon 1e-8), decay on all but biases and norms;
* warm-up over ``ceil(warmup × steps)`` steps, then the schedule that transformers knows by
  that name (``constant`` has no warm-up, ``constant_with_warmup`` has);
* batches as :func:`lorasweep.data.order.epoch_batches` orders them, padded to their longest.

Every random number comes from the plan's seed, each use with a stream of its own: the head,
the adapter, the data order, and dropout. A trial that runs alone and one that runs fifth give
the same numbers.
"""

from __future__ import annotations

import gc
import random
import shutil
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainingArguments

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.errors import DivergedError, ModelError, Problem, StorageError
from lorasweep.core.outcomes import Outcome, TrialState
from lorasweep.core.plans import NOTHING_BEFORE, EngineSettings, Resumption, TrialPlan
from lorasweep.core.protocols import Reporter
from lorasweep.core.seeding import derive_seed
from lorasweep.data.order import steps_per_epoch
from lorasweep.engines.lane_checkpoint import discard
from lorasweep.engines.memory_lack import needs_too_much
from lorasweep.engines.trial_trainer import TrialTrainer, TrialWatch
from lorasweep.model.adapter import attach
from lorasweep.model.base import Base, fresh_classifier, random_state_kept
from lorasweep.model.checkpoint import storing
from lorasweep.model.precision import pick_device, resolve
from lorasweep.model.scoring import predict_logits
from lorasweep.model.torch_errors import is_out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrainerEngine:
    """Trains each plan on a model of its own, freshly loaded. Implements ``core.protocols.Engine``.

    Args:
        base: The frozen base.
        train: Rows to learn from, already as tokens; they are never tokenised again.
        validation: Rows to score after each epoch.
        settings: What all trials share.

    Raises:
        ModelError: The device isn't there.
    """

    def __init__(
        self, base: Base, train: EncodedSplit, validation: EncodedSplit, settings: EngineSettings
    ) -> None:
        self.base = base
        self.train = train
        self.validation = validation
        self.settings = settings
        self.device = pick_device(settings.device)
        if self.device.type == "cuda" and self.device.index:
            # The Trainer takes the first device that it sees, and all of them if it may.
            raise ModelError(
                Problem(
                    "device",
                    f"the trainer engine runs on the first CUDA device, got {settings.device}",
                    f"Set CUDA_VISIBLE_DEVICES={self.device.index} and use cuda:0.",
                )
            )
        self.precision = resolve(settings.precision, self.device)

    @property
    def capacity(self) -> int:
        """One: trials run one after another."""
        return 1

    def run(
        self,
        plans: Iterable[TrialPlan],
        reporter: Reporter,
        resumption: Resumption = NOTHING_BEFORE,
    ) -> Generator[Outcome, None, None]:
        """Train every plan and yield each outcome; see ``core.protocols.Engine``."""
        del resumption  # one after another, the order is that of the plans
        for plan in plans:
            yield self._run_trial(plan, reporter)

    def _run_trial(self, plan: TrialPlan, reporter: Reporter) -> Outcome:
        """Train one plan and turn whatever goes wrong with it into a failed outcome."""
        steps = plan.epochs * steps_per_epoch(len(self.train), plan.batch_size)
        watch = TrialWatch(plan, steps, self._score, reporter)
        # A folder of the same number may be left from a sweep that was killed.
        shutil.rmtree(plan.adapter_folder, ignore_errors=True)
        discard(plan.checkpoint)  # of a pack: a Trainer can't go on from it
        reason = trace = ""
        try:
            with _own_randomness():
                self._train(plan, watch)
        except StorageError:
            raise  # the disk concerns all trials
        except DivergedError as error:
            reason = str(error)
        except Exception as error:
            if error is watch.reporter_error:
                raise  # the study's or the tracker's error, not this trial's
            reason, trace = _describe(error, plan), traceback.format_exc()
        finally:
            # The Trainer and its model refer to each other; without this the weights of a
            # finished trial stay until Python's collector happens to run.
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if reason:
            state = TrialState.FAILED
        else:
            state = TrialState.PRUNED if watch.stopped else TrialState.COMPLETED
            reason = watch.stopped
        return Outcome(
            trial=plan.number,
            state=state,
            steps=watch.steps_done,
            seconds=watch.seconds,
            reason=reason,
            traceback=trace,
        )

    def _train(self, plan: TrialPlan, watch: TrialWatch) -> None:
        fresh = fresh_classifier(self.base, derive_seed(plan.seed, "head"))
        model = attach(fresh, plan.adapter, derive_seed(plan.seed, "adapter"))
        with _scratch_beside(plan.adapter_folder) as scratch:
            trainer = TrialTrainer(
                model=model,
                args=self._arguments(plan, scratch),
                train_split=self.train,
                order_seed=plan.seed,
                base=self.base,
                watch=watch,
            )
            trainer.remove_callback(PrinterCallback)  # stdout is for results
            trainer.train()

    def _score(self, model: Any) -> NDArray[np.float32]:
        return predict_logits(
            model,
            self.validation,
            pad_id=self.base.pad_id,
            batch_size=self.settings.eval_batch_size,
            device=self.device,
            precision=self.precision,
        )

    def _arguments(self, plan: TrialPlan, scratch: Path) -> TrainingArguments:
        arguments = TrainingArguments(
            output_dir=str(scratch),  # nothing is written there: the watch saves the adapter itself
            num_train_epochs=plan.epochs,
            per_device_train_batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            weight_decay=plan.weight_decay,
            warmup_steps=plan.warmup,  # below 1: a share of the steps
            lr_scheduler_type=plan.scheduler,
            max_grad_norm=plan.max_grad_norm,
            optim="adamw_torch",
            bf16=self.precision == "bf16",
            use_cpu=self.device.type == "cpu",
            # Its own seeding is overridden where it matters; see TrialWatch.on_train_begin.
            seed=derive_seed(plan.seed, "dropout"),
            logging_strategy="steps",
            logging_steps=self.settings.log_every,
            logging_nan_inf_filter=False,  # it would hide a diverging loss
            eval_strategy="no",  # the watch evaluates: in length order, in one scoring code
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # else the Trainer spreads each batch over all devices
        return arguments


@contextmanager
def _scratch_beside(folder: Path) -> Iterator[Path]:
    """Make the folder that a Trainer insists on, on the sweep's own disk.

    Raises:
        StorageError: The disk is full or can't be written, which concerns all trials.
    """
    scratch = folder.with_name(f".{folder.name}.trainer")
    with storing(scratch, "the Trainer's folder"):
        scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Give back the global random states as they were; the Trainer seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    with random_state_kept():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _describe(error: Exception, plan: TrialPlan) -> str:
    if is_out_of_memory(error):
        return needs_too_much(plan)
    return f"{type(error).__name__}: {error}"
