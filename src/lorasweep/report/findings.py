"""What a report says, as records; the documents only write it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorasweep.core.outcomes import FinishedSweep
from lorasweep.evaluation.errors_analysis import ErrorAnalysis
from lorasweep.evaluation.intervals import Interval
from lorasweep.evaluation.metrics import ClassificationDetail
from lorasweep.evaluation.significance import McNemarResult

FINETUNED = "finetuned"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The winner against one baseline on the test split.

    Attributes:
        name: The baseline.
        metrics: The baseline's own.
        mcnemar: Exact test on the same rows.
        p_adjusted: Its p-value by Holm's method over all baselines.
        f1_gain: Paired bootstrap interval of the winner's F1 minus the baseline's.
        verdict: ``better``, ``worse`` or ``undecided``: what the adjusted p-value allows to say
            about the winner.
    """

    name: str
    metrics: Mapping[str, float]
    mcnemar: McNemarResult
    p_adjusted: float
    f1_gain: Interval
    verdict: str


@dataclass(frozen=True, slots=True)
class TestResult:
    """The winner on the test split.

    Attributes:
        rows: Rows of the split.
        metrics: As :func:`lorasweep.evaluation.metrics.score` names them.
        accuracy_interval: 95 %.
        detail: Per class, and the confusion matrix.
        comparisons: By baseline, in the spec's order.
        reference: The baseline from which improvement is measured; None without baselines.
        strongest: The baseline with the best test accuracy; None without baselines.
        errors: Every error of the winner.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    rows: int
    metrics: Mapping[str, float]
    accuracy_interval: Interval
    detail: ClassificationDetail
    comparisons: Mapping[str, Comparison]
    reference: Comparison | None
    strongest: Comparison | None
    errors: ErrorAnalysis


@dataclass(frozen=True, slots=True)
class Sample:
    """A text before and after training.

    Attributes:
        text: The text.
        label: The truth, by name; empty when it isn't known.
        before, after: Probability of each label, in the order of the labels.
    """

    text: str
    label: str
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a report says.

    Attributes:
        sweep: What it is about.
        configs: Of each trial, by number: sampled and fixed values together.
        test: None when the spec names no test split.
        samples: Texts before and after training.
        conclusion: One paragraph: who won, against what, with which certainty.
        cautions: Sentences that a reader must know before believing the numbers.
    """

    sweep: FinishedSweep
    configs: Mapping[int, Mapping[str, Any]]
    test: TestResult | None
    samples: tuple[Sample, ...]
    conclusion: str
    cautions: tuple[str, ...]
