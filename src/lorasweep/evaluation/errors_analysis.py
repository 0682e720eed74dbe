"""Where a model is wrong: every error, the kinds of text it fails on, how sure it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from lorasweep.core.outcomes import Predictions
from lorasweep.evaluation.calibration import Calibration, calibration
from lorasweep.evaluation.patterns import Kind, kinds_of
from lorasweep.evaluation.significance import holm
from lorasweep.evaluation.suggestions import suggest

CONFIDENT = 0.9


@dataclass(frozen=True, slots=True)
class Mistake:
    """One row that the model gets wrong.

    Attributes:
        id, text: The row.
        label, predicted: The truth and the answer, by name.
        confidence: Probability of the answer.
        patterns: Names of the kinds of text that it belongs to, lengths aside.
    """

    id: str
    text: str
    label: str
    predicted: str
    confidence: float
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Errors inside a kind of text against errors outside it.

    Attributes:
        name: The kind.
        source: ``tag``, ``cue`` or ``length``.
        rows, errors: Inside.
        error_rate: ``errors / rows``.
        other_rows, other_errors: Outside.
        other_error_rate: 0 when no row is outside.
        rate_ratio: ``error_rate / other_error_rate``; None when no error is outside.
        p_value: Fisher's exact test, two-sided.
        p_adjusted: The same by Holm's method over all patterns of the analysis, so that the
            worst of many small kinds isn't over-read.
        remedy: What helps when the model is bad at it.
    """

    name: str
    source: str
    rows: int
    errors: int
    error_rate: float
    other_rows: int
    other_errors: int
    other_error_rate: float
    rate_ratio: float | None
    p_value: float
    p_adjusted: float
    remedy: str


@dataclass(frozen=True, slots=True)
class Confusion:
    """Rows of ``label`` that were taken for ``predicted``: ``count`` of the label's ``rows``."""

    label: str
    predicted: str
    count: int
    rows: int


@dataclass(frozen=True, slots=True)
class Confidence:
    """Confidence of a group of answers; the numbers are None when there is none.

    Attributes:
        rows: Answers in the group.
        mean, median, lower_quartile, upper_quartile: Of their confidence.
        confident: Answers with a confidence of 0.9 or more.
    """

    rows: int
    mean: float | None
    median: float | None
    lower_quartile: float | None
    upper_quartile: float | None
    confident: int


@dataclass(frozen=True, slots=True)
class Abstention:
    """What leaving the least confident answers to a person would do.

    Attributes:
        threshold: Answers below this confidence are handed over.
        rows: How many those are.
        errors: How many of them are wrong.
    """

    threshold: float
    rows: int
    errors: int


@dataclass(frozen=True, slots=True)
class ErrorAnalysis:
    """All that is known about a model's errors on one split.

    Attributes:
        rows, errors: In all.
        mistakes: Every error, the most confident first.
        patterns: By kind of text; tags or cues first, then lengths.
        confusions: Pairs of labels that were mixed up, the most frequent first.
        right, wrong: Confidence of right and of wrong answers.
        calibration: Confidence against accuracy.
        abstention: The thresholds that were looked at.
        suggestions: Sentences that follow from the numbers above; may be empty.
    """

    rows: int
    errors: int
    mistakes: tuple[Mistake, ...]
    patterns: tuple[Pattern, ...]
    confusions: tuple[Confusion, ...]
    right: Confidence
    wrong: Confidence
    calibration: Calibration
    abstention: tuple[Abstention, ...]
    suggestions: tuple[str, ...]


def analyse_errors(
    predictions: Predictions,
    texts: Sequence[str],
    label_names: Sequence[str],
    tags: Sequence[Sequence[str]] = (),
) -> ErrorAnalysis:
    """Look at every error of one model on one split.

    Args:
        predictions: Of the model; at least one row.
        texts: The rows' texts.
        label_names: In order of index.
        tags: What each text is known to contain; empty to look for cues in the words.

    Raises:
        ValueError: There are not as many texts as predictions.
    """
    if len(texts) != len(predictions.labels):
        raise ValueError(f"{len(predictions.labels)} predictions but {len(texts)} texts")
    wrong = predictions.predicted != predictions.labels
    confidence = predictions.probabilities.max(axis=1)
    kinds = kinds_of(texts, tags)
    patterns = _patterns(kinds, wrong)
    confusions = _confusions(predictions, label_names)
    right, mistaken = _confidence(confidence[~wrong]), _confidence(confidence[wrong])
    calibrated = calibration(predictions)
    handed_over = _abstention(confidence, wrong)
    return ErrorAnalysis(
        rows=len(wrong),
        errors=int(wrong.sum()),
        mistakes=_mistakes(predictions, texts, label_names, kinds),
        patterns=patterns,
        confusions=confusions,
        right=right,
        wrong=mistaken,
        calibration=calibrated,
        abstention=handed_over,
        suggestions=suggest(
            rows=len(wrong),
            errors=int(wrong.sum()),
            patterns=patterns,
            confusions=confusions,
            confident_errors=mistaken.confident,
            calibration=calibrated,
            abstention=handed_over,
        ),
    )


def _mistakes(
    predictions: Predictions, texts: Sequence[str], names: Sequence[str], kinds: tuple[Kind, ...]
) -> tuple[Mistake, ...]:
    confidence = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    # Stable: equally confident errors stay in row order, so that two reports are the same.
    order = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return tuple(
        Mistake(
            id=predictions.ids[row],
            text=texts[row],
            label=names[predictions.labels[row]],
            predicted=names[predictions.predicted[row]],
            confidence=float(confidence[row]),
            patterns=tuple(k.name for k in kinds if k.source != "length" and k.rows[row]),
        )
        for row in order.tolist()
    )


def _patterns(kinds: tuple[Kind, ...], wrong: NDArray[np.bool_]) -> tuple[Pattern, ...]:
    counts = []
    for kind in kinds:
        inside, outside = int(kind.rows.sum()), int((~kind.rows).sum())
        errors, others = int((kind.rows & wrong).sum()), int((~kind.rows & wrong).sum())
        table = [[errors, inside - errors], [others, outside - others]]
        # A kind that every text or no error is in tells nothing apart: p is 1, not NaN.
        p_value = float(fisher_exact(table).pvalue) if outside and errors + others else 1.0
        counts.append((kind, inside, errors, outside, others, min(1.0, p_value)))
    adjusted = holm({str(place): count[-1] for place, count in enumerate(counts)})
    found = []
    for place, (kind, inside, errors, outside, others, p_value) in enumerate(counts):
        rate, other_rate = errors / inside, others / outside if outside else 0.0
        found.append(
            Pattern(
                name=kind.name,
                source=kind.source,
                rows=inside,
                errors=errors,
                error_rate=rate,
                other_rows=outside,
                other_errors=others,
                other_error_rate=other_rate,
                rate_ratio=rate / other_rate if other_rate else None,
                p_value=p_value,
                p_adjusted=adjusted[str(place)],
                remedy=kind.remedy,
            )
        )
    return tuple(found)


def _confusions(predictions: Predictions, names: Sequence[str]) -> tuple[Confusion, ...]:
    found = []
    for truth in range(len(names)):
        of_label = predictions.labels == truth
        for said in range(len(names)):
            count = int((of_label & (predictions.predicted == said)).sum())
            if truth != said and count:
                found.append(Confusion(names[truth], names[said], count, int(of_label.sum())))
    return tuple(sorted(found, key=lambda one: -one.count))


def _confidence(values: NDArray[np.float64]) -> Confidence:
    if not len(values):
        return Confidence(0, None, None, None, None, 0)
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    confident = int((values >= CONFIDENT).sum())
    return Confidence(len(values), float(values.mean()), median, lower, upper, confident)


def _abstention(
    confidence: NDArray[np.float64], wrong: NDArray[np.bool_]
) -> tuple[Abstention, ...]:
    thresholds = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    return tuple(
        Abstention(at, int((confidence < at).sum()), int((wrong & (confidence < at)).sum()))
        for at in thresholds
    )
