"""From a finished sweep to its findings."""

from __future__ import annotations

from typing import Any

from lorasweep.core.corpora import TextSplit
from lorasweep.core.outcomes import FinishedSweep, Predictions, TrialRecord
from lorasweep.core.seeding import derive_seed
from lorasweep.evaluation.errors_analysis import analyse_errors
from lorasweep.evaluation.intervals import f1_difference, wilson
from lorasweep.evaluation.metrics import detail, score_predictions
from lorasweep.evaluation.significance import holm, mcnemar
from lorasweep.report.findings import FINETUNED, Comparison, Findings, Sample, TestResult
from lorasweep.report.wording import cautions, conclusion

ALPHA = 0.05
_REFERENCE = "untrained"  # the model before its fine-tuning: what "improvement" is measured from

_TRAINING = {  # key in the spec's training section -> key in the report
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "batch_size",
    "weight_decay": "weight_decay",
    "warmup": "warmup",
    "scheduler": "scheduler",
    "max_grad_norm": "max_grad_norm",
}
_LORA = ("rank", "alpha", "dropout", "targets", "top_layers")


def collect(sweep: FinishedSweep) -> Findings:
    """Compute everything that the documents show; the same sweep gives the same findings."""
    test = _test_result(sweep) if FINETUNED in sweep.test and sweep.corpus.test else None
    return Findings(
        sweep=sweep,
        configs={trial.number: config_of(sweep, trial) for trial in sweep.trials},
        test=test,
        samples=_samples(sweep),
        conclusion=conclusion(sweep, test),
        cautions=cautions(sweep, test),
    )


def config_of(sweep: FinishedSweep, trial: TrialRecord) -> dict[str, Any]:
    """Return a trial's whole configuration: what was sampled over what the spec fixes."""
    training, lora = sweep.spec.get("training", {}), sweep.spec.get("lora", {})
    sampled = trial.parameters
    config = {
        name: sampled.get(key, training.get(key))
        for key, name in _TRAINING.items()
        if key in sampled or key in training
    }
    config |= {
        key: sampled.get(key, lora.get(key)) for key in _LORA if key in sampled or key in lora
    }
    known = {*_TRAINING, *_LORA}
    config |= {key: value for key, value in sampled.items() if key not in known}
    if isinstance(config.get("rank"), int) and isinstance(config.get("alpha"), int | float):
        config["scaling"] = config["alpha"] / config["rank"]
    return config


def _test_result(sweep: FinishedSweep) -> TestResult:
    split = sweep.corpus.test
    assert split is not None
    names = sweep.corpus.label_names
    ours = sweep.test[FINETUNED]
    metrics = score_predictions(ours, names)
    comparisons = _comparisons(sweep, ours, metrics["accuracy"])
    strongest = max(
        comparisons.values(),
        key=lambda one: (one.metrics["accuracy"], one.metrics["f1"]),
        default=None,
    )
    first = next(iter(comparisons.values()), None)
    return TestResult(
        rows=len(ours.labels),
        metrics=metrics,
        accuracy_interval=wilson(int((ours.predicted == ours.labels).sum()), len(ours.labels)),
        detail=detail(ours, names),
        comparisons=comparisons,
        reference=comparisons.get(_REFERENCE, first),
        strongest=strongest,
        errors=analyse_errors(ours, split.texts, names, split.tags),
    )


def _comparisons(sweep: FinishedSweep, ours: Predictions, accuracy: float) -> dict[str, Comparison]:
    names = sweep.corpus.label_names
    baselines = {name: one for name, one in sweep.test.items() if name != FINETUNED}
    tests = {
        name: mcnemar(ours.labels, one.predicted, ours.predicted) for name, one in baselines.items()
    }
    adjusted = holm({name: test.p_value for name, test in tests.items()})
    found = {}
    for name, one in baselines.items():
        metrics = score_predictions(one, names)
        verdict = "undecided"
        if adjusted[name] < ALPHA:
            verdict = "better" if accuracy > metrics["accuracy"] else "worse"
        gain = f1_difference(
            ours.labels,
            one.predicted,
            ours.predicted,
            len(names),
            seed=derive_seed(int(sweep.seeds.get("sweep", 0)), "bootstrap", name),
        )
        found[name] = Comparison(name, metrics, tests[name], adjusted[name], gain, verdict)
    return found


def _samples(sweep: FinishedSweep) -> tuple[Sample, ...]:
    # They are validation texts: test may know the same text by another label.
    labels = _labels_by_text(sweep.corpus.validation, sweep.corpus.label_names)
    return tuple(
        Sample(text, labels.get(text, ""), tuple(before), tuple(after))
        for text, before, after in sweep.samples
    )


def _labels_by_text(split: TextSplit, names: tuple[str, ...]) -> dict[str, str]:
    """Label of each text; empty for a text that occurs with two of them."""
    found: dict[str, str] = {}
    for text, label in zip(split.texts, split.labels, strict=True):
        known = found.setdefault(text, names[label])
        found[text] = known if known == names[label] else ""
    return found
