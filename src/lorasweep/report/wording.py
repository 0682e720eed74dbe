"""The sentences of a report: what was found, and what a reader must know before believing it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lorasweep.core.outcomes import FinishedSweep, TrialState
from lorasweep.data.summary import known_texts
from lorasweep.evaluation.significance import state_p
from lorasweep.report.findings import FINETUNED, Comparison, TestResult

_FEW_ROWS = 300  # the 95 % interval of an accuracy of 0.9 is ± 3.4 points here
_LEAK = 0.01
_OPTIMISM = 2.0  # standard errors by which validation may exceed test before it is said


def conclusion(sweep: FinishedSweep, test: TestResult | None) -> str:
    """Return who won, against what, and how certain that is, in one paragraph."""
    best = sweep.best
    score = "no score" if best.score is None else f"{best.score:.4f}"
    chosen = (
        f"Of {count(tried(sweep), 'trial')}, trial {best.number} has the best validation "
        f"{sweep.objective} ({score})."
    )
    if test is None:
        return f"{chosen} No test split was named, so nothing is known about unseen texts."
    interval = test.accuracy_interval
    told = (
        f"{chosen} On {count(test.rows, 'test text')} it reaches an F1 of "
        f"{test.metrics['f1']:.4f} and an accuracy of {test.metrics['accuracy']:.4f} "
        f"(95 % interval {interval.low:.3f} to {interval.high:.3f})."
    )
    if test.strongest is None:
        return f"{told} The spec names no baseline to compare it with."
    return f"{told} {verdict_sentence(test.strongest, strongest=len(test.comparisons) > 1)}"


def verdict_sentence(comparison: Comparison, *, strongest: bool = False) -> str:
    """Return what McNemar's test allows to say about one baseline, with the numbers."""
    name = f"the strongest baseline, {comparison.name}" if strongest else comparison.name
    opening = {
        "better": f"It beats {name}",
        "worse": f"It is worse than {name}",
        "undecided": f"There is no evidence of a difference from {name}",
    }[comparison.verdict]
    test = comparison.mcnemar
    return (
        f"{opening} (accuracy {comparison.metrics['accuracy']:.4f}, "
        f"F1 {comparison.metrics['f1']:.4f}): {count(test.finetuned_only, 'text')} only the "
        f"fine-tuned model gets right, {test.baseline_only:,} only {comparison.name} "
        f"({describe_p(comparison)})."
    )


def cautions(sweep: FinishedSweep, test: TestResult | None) -> tuple[str, ...]:
    """Return what weakens the conclusions, worst first."""
    return (
        *_openings(sweep),
        *_leakage(sweep),
        *_few_rows(test),
        *_one_label(sweep, test),
        *_selection(sweep, test),
        *_seed_noise(sweep),
        *_troubled_trials(sweep),
    )


def _openings(sweep: FinishedSweep) -> Iterator[str]:
    if len(sweep.openings) < 2:
        return
    # A study that was begun anew counts its trials from 0 again.
    winners = {
        (entry.get("study"), entry["trial"])
        for entry in sweep.openings
        if FINETUNED in _models(entry) and entry.get("trial") is not None
    }
    told = f"The test split was opened {len(sweep.openings)} times"
    if len(winners) > 1:
        yield (
            f"{told}, for {len(winners)} different winners: it has begun to choose among them, "
            "and its p-values flatter the winner. Confirm the result on fresh data."
        )
    else:
        yield f"{told}, always for the same winner; the reasons are listed under provenance."


def _models(entry: Any) -> tuple[str, ...]:
    """The models scored at an opening; an entry that doesn't say is taken to mean the winner."""
    return tuple(entry.get("models", (FINETUNED,)))


def _leakage(sweep: FinishedSweep) -> Iterator[str]:
    for report in sweep.corpus.leakage:
        if report.known > _LEAK * report.rows:
            told = known_texts(report).partition(": ")[2]
            yield f"On {report.held_out}, {told}: its scores are too high."


def _few_rows(test: TestResult | None) -> Iterator[str]:
    if test is not None and test.rows < _FEW_ROWS:
        half = (test.accuracy_interval.high - test.accuracy_interval.low) / 2
        yield (
            f"The test split has only {count(test.rows, 'text')}: its accuracy is known to about "
            f"± {half:.1%}, and only large differences can be told from chance."
        )


def _one_label(sweep: FinishedSweep, test: TestResult | None) -> Iterator[str]:
    if test is None:
        return
    answered = [sum(row[label] for row in test.detail.confusion) for label in _labels(sweep)]
    asked = sum(bool(one.support) for one in test.detail.per_class)
    # Where the texts have one label only, one answer may be all that there is to say.
    if sum(map(bool, answered)) == 1 < asked:
        only = sweep.corpus.label_names[max(_labels(sweep), key=answered.__getitem__)]
        yield f"The fine-tuned model answers “{only}” to every test text: it has learned nothing."
    for one in test.detail.per_class:
        if not one.support:
            yield f"No test text is labelled “{one.name}”: {_counted_as_zero(sweep, one.name)}."


def _counted_as_zero(sweep: FinishedSweep, name: str) -> str:
    names = sweep.corpus.label_names
    if len(names) == 2 and name == names[-1]:
        return "precision, recall and F1 are 0 whatever the model answers"
    return "its scores count as 0 in macro averages"


def _labels(sweep: FinishedSweep) -> range:
    return range(len(sweep.corpus.label_names))


def _selection(sweep: FinishedSweep, test: TestResult | None) -> Iterator[str]:
    """The best of many trials on validation is partly the luckiest one."""
    score = sweep.best.score
    if test is None or score is None or sweep.objective not in test.metrics:
        return
    tested = test.metrics[sweep.objective]
    # Both splits are samples: what is between the two scores has the noise of both.
    noise = math.hypot(
        standard_error(score, len(sweep.corpus.validation)), standard_error(tested, test.rows)
    )
    if score - tested > _OPTIMISM * noise:
        yield (
            f"Validation {sweep.objective} of the winner ({score:.4f}) is above its test value "
            f"({tested:.4f}) by more than chance on so few rows explains: it was chosen on "
            "validation, or the two splits differ."
        )


def _seed_noise(sweep: FinishedSweep) -> Iterator[str]:
    scored = [trial for trial in sweep.trials if trial.score is not None]
    if sweep.best.score is None or len(scored) < 2:
        return
    noise = standard_error(sweep.best.score, len(sweep.corpus.validation))
    close = [
        trial
        for trial in scored
        if trial.number != sweep.best.number
        and trial.state is TrialState.COMPLETED
        and sweep.best.score - (trial.score or 0.0) <= noise
    ]
    told = "Every configuration was trained with one seed, whose noise isn't in these numbers."
    if any("seed" in trial.parameters for trial in scored):
        told = "Seeds were searched too: the winner's score is that of the luckiest, so too high."
    if close:
        others = ", ".join(str(trial.number) for trial in close[:8])
        more = ", …" if len(close) > 8 else ""
        told += (
            f" One standard error of a validation score is about {noise:.3f}; within it of the "
            f"winner: trial{'s' if len(close) > 1 else ''} {others}{more}."
        )
    yield told


def _troubled_trials(sweep: FinishedSweep) -> Iterator[str]:
    # An interrupted trial whose point was taken up again weakens nothing.
    taken_up = {trial.retry_of for trial in sweep.trials}
    for state in (TrialState.FAILED, TrialState.INTERRUPTED):
        found = [t for t in sweep.trials if t.state is state and t.number not in taken_up]
        if found:
            reasons = Counter(trial.reason or "no reason given" for trial in found)
            told = "; ".join(f"{reason} ({times})" for reason, times in reasons.most_common(3))
            yield f"{count(len(found), 'trial')} {state.value}: {told}."


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "text"), count(1200, "text")
    ('1 text', '1,200 texts')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tried(sweep: FinishedSweep) -> int:
    """Return how many trials count: interrupted ones are tried again under another number."""
    return sum(trial.state is not TrialState.INTERRUPTED for trial in sweep.trials)


def standard_error(share: float, rows: int) -> float:
    """Standard error of a share measured on so many rows.

    By Agresti and Coull's interval at one standard error (1998, Am. Stat. 52): half a right and
    half a wrong answer are added, since without them 200 right answers of 200 would be certain.

    >>> round(standard_error(0.9, 100), 4), round(standard_error(1.0, 100), 4)
    (0.0304, 0.007)
    """
    added = (share * rows + 0.5) / (rows + 1)
    return math.sqrt(added * (1 - added) / (rows + 1))


def describe_p(comparison: Comparison) -> str:
    """Return ``McNemar p = …``, and the adjusted value where it differs."""
    text = f"McNemar {state_p(comparison.mcnemar.p_value)}"
    if comparison.p_adjusted != comparison.mcnemar.p_value:
        text += f", adjusted for several baselines {state_p(comparison.p_adjusted)}"
    return text
