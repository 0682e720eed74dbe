"""An engine's event becomes metrics, goes to the tracker and the study, and comes back a decision.

Both engines report logits and both are scored here, by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialFacts, Verdict
from lorasweep.core.plans import ParameterValue
from lorasweep.core.protocols import Tracker
from lorasweep.evaluation.metrics import score
from lorasweep.search.study import Study
from lorasweep.sweep.events import (
    LanesShrank,
    Listener,
    TrialEvaluated,
    TrialReady,
    TrialStepped,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SweepReporter:
    """Implements :class:`lorasweep.core.protocols.Reporter` for one sweep.

    Args:
        study: Keeps scores, decides on pruning.
        tracker: Where metrics go.
        run_ids: Trial number to MLflow run; the worker fills it as trials start.
        labels: Truth of the validation rows, ``(rows,)``.
        label_names: In order of label index.
        objective: Name of the metric that decides.
        listener: Told of everything.
    """

    def __init__(
        self,
        study: Study,
        tracker: Tracker,
        run_ids: Mapping[int, str],
        labels: NDArray[np.int64],
        label_names: tuple[str, ...],
        objective: str,
        listener: Listener,
    ) -> None:
        self._study = study
        self._tracker = tracker
        self._run_ids = run_ids
        self._labels = labels
        self._label_names = label_names
        self._objective = objective
        self._listener = listener

    def started(self, trial: int, facts: TrialFacts) -> None:
        self._study.set_facts(trial, facts)
        params: dict[str, ParameterValue] = {
            "trainable_parameters": facts.trainable_parameters,
            "all_parameters": facts.all_parameters,
            "steps": facts.steps,
            "adapted_modules": ",".join(facts.targets),
        }
        if facts.resumed_step:
            params["resumed_step"] = facts.resumed_step
        self._tracker.log_params(self._run_ids[trial], params)
        self._listener(TrialReady(trial, facts))

    def stepped(self, report: StepReport) -> None:
        metrics = {"train_loss": report.loss, "learning_rate": report.learning_rate}
        if report.grad_norm is not None:
            metrics["grad_norm"] = report.grad_norm
        self._tracker.log_metrics(self._run_ids[report.trial], metrics, step=report.step)
        self._study.renew(report.trial)
        self._listener(TrialStepped(report.trial, report.step, report.steps, report.loss))

    def shrank(self, lanes: int, why: str) -> None:
        self._listener(LanesShrank(lanes, why))

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        metrics = score(evaluation.logits, self._labels, self._label_names)
        value = metrics.get(self._objective, float("nan"))
        verdict = self._study.report(evaluation.trial, evaluation, value, metrics)
        # epoch/…: every epoch as it was. val_…: the best epoch so far, so that the value
        # that MLflow shows for a run is the score that the trial is compared by.
        series = {f"epoch/val_{name}": number for name, number in metrics.items()}
        if verdict.keep:
            series |= {f"val_{name}": number for name, number in metrics.items()}
            series["best_epoch"] = evaluation.epoch
        self._tracker.log_metrics(
            self._run_ids[evaluation.trial], series, step=evaluation.step, epoch=evaluation.epoch
        )
        self._listener(
            TrialEvaluated(
                evaluation.trial, evaluation.epoch, evaluation.epochs, value, verdict.keep, metrics
            )
        )
        return verdict
