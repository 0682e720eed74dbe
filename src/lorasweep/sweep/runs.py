"""The sweep's runs in MLflow: what each of them bears, and which of them a command goes on with."""

from __future__ import annotations

from lorasweep.core.outcomes import TrialRecord, TrialState
from lorasweep.core.plans import ParameterValue, TrialPlan
from lorasweep.search.study import Study
from lorasweep.spec.loader import dump_spec
from lorasweep.spec.resolve import plan_trial
from lorasweep.sweep import engine_ledger
from lorasweep.sweep.prepare import Prepared, to_be_shown
from lorasweep.tracking.environment import describe
from lorasweep.tracking.mlflow_tracker import MlflowTracker
from lorasweep.tracking.wording import key


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
    repeated = {"seed": plan.parameters["seed"]} if "seed" in plan.parameters else {}
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
        **repeated,
    }


def resolved_spec(prepared: Prepared) -> str:
    """The spec as YAML, with everything that it left open, and without passwords."""
    return dump_spec(to_be_shown(prepared.spec))


def describe_sweep(prepared: Prepared, tracker: MlflowTracker, parent: str) -> None:
    """Write into the parent run what is swept: base, data, search, and the whole spec."""
    spec = prepared.spec
    tracker.log_params(
        parent,
        {
            "model": spec.model.name,
            "base_digest": prepared.base.digest,
            "data": prepared.corpus.name,
            "data_fingerprint": prepared.corpus.fingerprint,
            "seed": spec.seed,
            "sampler": spec.search.sampler.kind,
            "pruner": spec.search.pruner.kind,
            "objective": spec.search.objective,
            "engine": spec.engine,
        },
    )
    tracker.log_text(parent, resolved_spec(prepared), "spec.yaml")
    tracker.log_corpus(parent, prepared.corpus)


def parent_run(prepared: Prepared, study: Study, tracker: MlflowTracker) -> str:
    """The sweep's parent run, ended; a new one if the tracker was changed since."""
    name = prepared.spec.name
    parent = tracker.find_sweep(name, identity_tags(prepared, study))
    if parent is None:
        trained = engine_ledger.kept(prepared.paths.engine, study.id)
        engine = trained[-1].engine if trained else prepared.spec.engine
        parent = tracker.open_sweep(name, run_tags(prepared, study, engine))
    if not tracker.has_corpus(parent):  # which is written last; perhaps a stop came before
        describe_sweep(prepared, tracker, parent)
    # No command trains now. One that was killed, or cut off here, left the run open.
    to_come = study.remaining or any(not record.state.is_final for record in study.records())
    ended = TrialState.COMPLETED if study.best() else TrialState.FAILED
    tracker.finish(parent, TrialState.INTERRUPTED if to_come else ended)
    return parent


def trial_run(
    prepared: Prepared, study: Study, tracker: MlflowTracker, parent: str, record: TrialRecord
) -> str:
    """The run of a trial that has ended; a new one if the tracker was changed since.

    The new one has the parameters and the scores, and nothing of what was told on the way.
    """
    spec, folder = prepared.spec, prepared.paths.trial(record.number)
    plan = plan_trial(spec, record.number, record.seed, record.parameters, folder)
    params = run_params(plan, spec.seed)
    run_id = tracker.find_trial(parent, record.number)
    if run_id is None:
        run_id = tracker.start_trial(parent, record.number, params, _sweep_tags(prepared, study))
    else:
        tracker.log_params(run_id, params)
    # Whatever cut an earlier command off while it made this run left it open, and perhaps empty.
    scores = {f"val_{name}": value for name, value in record.metrics.items()}
    known = tracker.metric_names(run_id)
    if lacking := {
        name: value
        for name, value in {**scores, "seconds": record.seconds}.items()
        if key(name) not in known
    }:
        tracker.log_metrics(run_id, lacking, step=0, epoch=record.best_epoch)
    tracker.finish(run_id, record.state)
    return run_id


def _sweep_tags(prepared: Prepared, study: Study) -> dict[str, str]:
    return {
        **identity_tags(prepared, study),
        "lorasweep.study": prepared.spec.name,
        "lorasweep.objective": prepared.spec.search.objective,
    }
