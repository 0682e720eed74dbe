"""What to do next, where the counts warrant it: each rule is a condition on numbers.

A rule's sentence carries the numbers that led to it. Where no rule's condition holds,
nothing is suggested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from lorasweep.evaluation.significance import holm, state_p

if TYPE_CHECKING:
    from lorasweep.evaluation.calibration import Calibration
    from lorasweep.evaluation.errors_analysis import Abstention, Confusion, Pattern

ALPHA = 0.05
FEWEST_ERRORS = 5  # fewer errors than this in a group are anecdotes
WORSE_BY = 1.5  # a kind of text must fail at this many times the rate elsewhere
CONFIDENT_SHARE = 0.25
MISCALIBRATED = 0.05
CAUGHT, HANDED_OVER = 0.5, 0.2


def suggest(
    *,
    rows: int,
    errors: int,
    patterns: Sequence[Pattern],
    confusions: Sequence[Confusion],
    confident_errors: int,
    calibration: Calibration,
    abstention: Sequence[Abstention],
) -> tuple[str, ...]:
    """Return the sentences that the numbers warrant, possibly none."""
    return (
        *_hard_kinds(patterns),
        *_lopsided_pairs(confusions),
        *_sure_and_wrong(errors, confident_errors),
        *_miscalibrated(rows, calibration),
        *_leave_to_a_person(rows, errors, abstention),
    )


def _hard_kinds(patterns: Sequence[Pattern]) -> Iterator[str]:
    """A kind of text fails more often than the rest, beyond chance among so many kinds."""
    hard = [
        one
        for one in patterns
        if one.errors >= FEWEST_ERRORS
        and one.p_adjusted < ALPHA
        and one.error_rate >= WORSE_BY * one.other_error_rate
    ]
    for one in sorted(hard, key=lambda pattern: (pattern.p_adjusted, pattern.name)):
        yield (
            f"{one.error_rate:.1%} of the texts with “{one.name}” are wrong "
            f"({one.errors} of {one.rows}), against {one.other_error_rate:.1%} of the others "
            f"({one.other_errors} of {one.other_rows}; {state_p(one.p_adjusted)}, adjusted for "
            f"{len(patterns)} kinds): adding {one.remedy} is the first thing to try."
        )


def _lopsided_pairs(confusions: Sequence[Confusion]) -> Iterator[str]:
    """Two labels are mixed up in one direction far more than in the other.

    Beyond chance among so many pairs: of twenty labels there are 190.
    """
    counts = {(one.label, one.predicted): one.count for one in confusions}
    returned = {pair: counts.get(pair[::-1], 0) for pair in counts}
    # One direction of each pair: the more frequent one, or the first of two equal ones.
    ahead = [
        pair
        for pair, there in counts.items()
        if there > returned[pair] or (there == returned[pair] and pair < pair[::-1])
    ]
    p_values = holm(
        {
            pair: float(binomtest(counts[pair], counts[pair] + returned[pair]).pvalue)
            for pair in ahead
        }
    )
    among = f", adjusted for {len(ahead)} pairs" if len(ahead) > 1 else ""
    for (label, predicted), p_value in p_values.items():
        there, back = counts[label, predicted], returned[label, predicted]
        if p_value < ALPHA and there >= FEWEST_ERRORS:
            yield (
                f"“{label}” is taken for “{predicted}” {there} times, the other way round "
                f"{back} times ({state_p(p_value)}{among}): the model leans to “{predicted}”. "
                f"Weigh “{label}” more in the loss, or choose the decision threshold on validation."
            )


def _sure_and_wrong(errors: int, confident: int) -> Iterator[str]:
    """Many errors are made with high confidence: wrong labels, or texts unlike the training's."""
    if confident >= FEWEST_ERRORS and confident >= CONFIDENT_SHARE * errors:
        yield (
            f"{confident} of {errors} errors are made with a confidence of 0.9 or more: read "
            "those first. Some of their labels may be wrong, and no threshold catches the rest."
        )


def _miscalibrated(rows: int, calibration: Calibration) -> Iterator[str]:
    """Confidence and accuracy disagree by more than the noise of so few rows."""
    noise = 1 / (2 * rows**0.5)  # largest standard error of an accuracy on so many rows
    gap = calibration.expected_error
    if gap > MISCALIBRATED and abs(calibration.overconfidence) > 2 * noise:
        way = "higher" if calibration.overconfidence > 0 else "lower"
        yield (
            f"Confidence is {abs(calibration.overconfidence):.1%} {way} than accuracy (expected "
            f"calibration error {gap:.3f}): fit a temperature on the validation split before "
            "thresholds are set on probabilities."
        )


def _leave_to_a_person(rows: int, errors: int, abstention: Sequence[Abstention]) -> Iterator[str]:
    """Few unsure answers hold most of the errors."""
    if errors < FEWEST_ERRORS:
        return
    for one in abstention:
        if one.errors >= CAUGHT * errors and 0 < one.rows <= HANDED_OVER * rows:
            yield (
                f"Leaving answers with a confidence below {one.threshold:g} to a person hands "
                f"over {one.rows / rows:.1%} of the texts and catches {one.errors} of {errors} "
                "errors."
            )
            return
