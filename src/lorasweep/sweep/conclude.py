"""After the last trial: the winner is named, scored once on the test split, and made champion."""

from __future__ import annotations

from dataclasses import replace

from lorasweep.core.errors import NothingToReportError, Problem, StorageError
from lorasweep.core.outcomes import FinishedSweep, TrialRecord
from lorasweep.model.checkpoint import load_finetuned, merge
from lorasweep.search.study import Study
from lorasweep.sweep.engine_ledger import kept
from lorasweep.sweep.events import Listener, Said
from lorasweep.sweep.finalists import Finalists, adapter_exists
from lorasweep.sweep.prepare import Prepared, to_be_shown
from lorasweep.sweep.runs import trial_run
from lorasweep.tracking.champion import log_champion
from lorasweep.tracking.environment import describe
from lorasweep.tracking.mlflow_tracker import MlflowTracker
from lorasweep.tracking.wording import redacted

_EXAMPLES = 3


def winner_of(prepared: Prepared, study: Study) -> TrialRecord:
    """The best trial by validation, with its adapter still there.

    Raises:
        NothingToReportError: When no trial completed.
        StorageError: When the winner's adapter was removed.
    """
    best = study.best()
    if best is None:
        failed = [record for record in study.records() if record.reason]
        why = f" The last one said: {failed[-1].reason}" if failed else ""
        message = f"No trial of {prepared.spec.name} has completed, so there is no winner yet.{why}"
        raise NothingToReportError(message)
    folder = prepared.paths.adapter(best.number)
    if not adapter_exists(folder):
        what = f"the adapter of the best trial {best.number} is not there any more"
        advice = "Restore the folder, or run the sweep under a new name."
        raise StorageError(Problem(str(folder), what, advice))
    return best


def conclude(
    prepared: Prepared, study: Study, tracker: MlflowTracker, parent: str, listener: Listener
) -> FinishedSweep:
    """Score the winner and the baselines, register the champion, and gather what a report needs.

    Raises:
        NothingToReportError: When no trial completed.
    """
    spec, corpus = prepared.spec, prepared.corpus
    best = winner_of(prepared, study)
    best = replace(best, run_id=trial_run(prepared, study, tracker, parent, best))
    finalists = Finalists(prepared, study.id, best, listener)
    test = finalists.test_predictions()
    samples = finalists.samples()
    facts = study.facts(best.number)
    assert facts is not None, "a completed trial was started, and then its facts were stored"
    _register(prepared, best, tracker, listener)
    return FinishedSweep(
        name=spec.name,
        task=f"text classification, {len(corpus.label_names)} labels",
        objective=spec.search.objective,
        spec=to_be_shown(spec).model_dump(mode="json"),
        spec_fingerprint=prepared.fingerprint,
        corpus=corpus,
        base={
            "name": prepared.base.name,
            "digest": prepared.base.digest,
            "architecture": str(prepared.base.config.model_type),
        },
        seeds={"sweep": spec.seed, "best_trial": best.seed},
        trials=tuple(best if one.number == best.number else one for one in study.records()),
        best=best,
        facts=facts,
        test=test,
        samples=samples,
        openings=finalists.openings,
        history={record.number: study.history(record.number) for record in study.records()},
        environment=describe(),
        engine_uses=kept(prepared.paths.engine, study.id),
        tracking={"uri": redacted(tracker.uri), "experiment": tracker.experiment, "run_id": parent},
    )


def _register(
    prepared: Prepared, best: TrialRecord, tracker: MlflowTracker, listener: Listener
) -> None:
    base, spec = prepared.base, prepared.spec
    listener(Said(f"Registering trial {best.number} as {spec.name}@champion"))
    model = merge(load_finetuned(base, prepared.paths.adapter(best.number)))
    log_champion(
        tracker,
        best.run_id,
        model_name=spec.name,
        model=model,
        tokenizer=base.tokenizer,
        example_texts=prepared.corpus.validation.texts[:_EXAMPLES],
        label_names=prepared.corpus.label_names,
        metadata={
            "trial": best.number,
            "base": base.name,
            "base_digest": base.digest,
            "spec_fingerprint": prepared.fingerprint,
            "max_length": base.max_length,
        },
    )
