"""The sweep's runs in MLflow: what each of them bears, and which of them a command goes on with."""

from __future__ import annotations

from lorasweep.core.outcomes import TrialRecord
from lorasweep.core.plans import ParameterValue, TrialPlan
from lorasweep.search.study import Study
from lorasweep.spec.resolve import plan_trial
from lorasweep.sweep.prepare import Prepared
from lorasweep.tracking.environment import describe
from lorasweep.tracking.mlflow_tracker import MlflowTracker


def identity_tags(prepared: Prepared, study: Study) -> dict[str, str]:
    """What ties a run to this spec and to this study, and to no earlier one of the same name."""
    return {"lorasweep.spec": prepared.fingerprint, "lorasweep.study_id": study.id}


def run_tags(prepared: Prepared, study: Study, engine: str) -> dict[str, str]:
    """What every run of the sweep bears, so that each can be understood by itself."""
    environment = describe()
    versions = environment.get("versions", {})
    return {
        **_sweep_tags(prepared, study),
        "lorasweep.engine": engine,
        "mlflow.source.git.commit": str(environment.get("git_commit") or "none"),
        **{f"lorasweep.version.{name}": str(version) for name, version in versions.items()},
    }


def run_params(plan: TrialPlan, sweep_seed: int) -> dict[str, ParameterValue]:
    """The trial's parameters as MLflow shows them: sampled or fixed, all of them, short names."""
    adapter = plan.adapter
    return {
        "learning_rate": plan.learning_rate,
        "epochs": plan.epochs,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "scaling": adapter.scaling,
        "dropout": adapter.dropout,
        "targets": ",".join(adapter.targets),
        "top_layers": adapter.top_layers,
        "batch_size": plan.batch_size,
        "weight_decay": plan.weight_decay,
        "warmup": plan.warmup,
        "scheduler": plan.scheduler,
        "max_grad_norm": plan.max_grad_norm,
        "trial_seed": plan.seed,
        "sweep_seed": sweep_seed,
    }


def parent_run(prepared: Prepared, study: Study, tracker: MlflowTracker) -> str:
    """The sweep's parent run, left as it stands; a new one if the tracker was changed since."""
    name, tags = prepared.spec.name, identity_tags(prepared, study)
    return tracker.find_sweep(name, tags) or tracker.open_sweep(name, tags)


def trial_run(
    prepared: Prepared, study: Study, tracker: MlflowTracker, parent: str, record: TrialRecord
) -> str:
    """The run of a trial that has ended; a new one if the tracker was changed since.

    The new one has the parameters and the scores, and nothing of what was told on the way.
    """
    run_id = tracker.find_trial(parent, record.number)
    if run_id is None:
        spec, folder = prepared.spec, prepared.paths.trial(record.number)
        plan = plan_trial(spec, record.number, record.seed, record.parameters, folder)
        params, tags = run_params(plan, spec.seed), _sweep_tags(prepared, study)
        run_id = tracker.start_trial(parent, record.number, params, tags)
        scores = {f"val_{name}": value for name, value in record.metrics.items()}
        tracker.log_metrics(
            run_id, {**scores, "seconds": record.seconds}, step=0, epoch=record.best_epoch
        )
    # Whatever cut an earlier command off while it made this run left it open.
    tracker.finish(run_id, record.state)
    return run_id


def _sweep_tags(prepared: Prepared, study: Study) -> dict[str, str]:
    return {
        **identity_tags(prepared, study),
        "lorasweep.study": prepared.spec.name,
        "lorasweep.objective": prepared.spec.search.objective,
    }
