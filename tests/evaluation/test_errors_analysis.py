from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import fisher_exact

from lorasweep.evaluation.errors_analysis import analyse_errors

NAMES = ("negative", "positive")


def test_every_error_is_listed_with_what_is_known_of_it(make_predictions) -> None:  # type: ignore[no-untyped-def]
    labels, said = [0, 1] * 200, [0, 1] * 100 + [1, 0] * 100
    sure = np.linspace(0.55, 0.99, 400).tolist()
    texts = [f"not text {row}" for row in range(400)]
    found = analyse_errors(make_predictions(labels, said, sure), texts, NAMES)
    assert (found.rows, found.errors, len(found.mistakes)) == (400, 200, 200)
    first = found.mistakes[0]
    assert (first.id, first.text, first.label, first.predicted) == (
        "test:400", "not text 399", "positive", "negative",
    )  # fmt: skip
    assert first.confidence == pytest.approx(0.99)
    assert first.patterns == ("negation",)
    assert [one.confidence for one in found.mistakes] == sorted(
        (one.confidence for one in found.mistakes), reverse=True
    )
    assert {(one.label, one.predicted, one.count, one.rows) for one in found.confusions} == {
        ("negative", "positive", 100, 200), ("positive", "negative", 100, 200),
    }  # fmt: skip


def test_patterns_compare_inside_with_outside(make_predictions) -> None:  # type: ignore[no-untyped-def]
    tags = [("negation",)] * 40 + [()] * 160
    said = [1] * 20 + [0] * 20 + [1] * 8 + [0] * 152
    found = analyse_errors(make_predictions([0] * 200, said), ["five words are in here"] * 200,
                           NAMES, tags)  # fmt: skip
    negation = found.patterns[0]
    assert (negation.name, negation.source) == ("negation", "tag")
    assert (negation.rows, negation.errors, negation.other_rows, negation.other_errors) == (
        40, 20, 160, 8,
    )  # fmt: skip
    assert negation.rate_ratio == pytest.approx(0.5 / 0.05)
    assert negation.p_value == pytest.approx(fisher_exact([[20, 20], [8, 152]]).pvalue)
    assert negation.p_adjusted == pytest.approx(2 * negation.p_value)
    # All rows have the same length: nothing is outside, nothing is told apart.
    assert (found.patterns[1].name, found.patterns[1].p_value) == ("5 words or fewer", 1.0)
    hard = [sentence for sentence in found.suggestions if "“negation”" in sentence]
    assert len(hard) == 1
    assert "50.0%" in hard[0]
    assert "(20 of 40)" in hard[0]
    assert "(8 of 160;" in hard[0]


def test_confidence_of_right_and_wrong_answers(make_predictions) -> None:  # type: ignore[no-untyped-def]
    sure = [0.9, 0.8, 0.7, 0.6, 0.95, 0.55]
    found = analyse_errors(make_predictions([0] * 6, [0, 0, 0, 0, 1, 1], sure), ["t"] * 6, NAMES)
    assert found.right.mean == pytest.approx(0.75)
    assert found.right.median == pytest.approx(0.75)
    assert found.right.lower_quartile == pytest.approx(0.675)
    assert found.wrong.mean == pytest.approx(0.75)
    assert (found.right.confident, found.wrong.confident) == (1, 1)


def test_a_perfect_model_gets_no_advice(make_predictions) -> None:  # type: ignore[no-untyped-def]
    found = analyse_errors(make_predictions([0, 1] * 50, [0, 1] * 50, 0.99), ["not a"] * 100, NAMES)
    assert found.errors == 0
    assert found.mistakes == found.confusions == found.suggestions == ()
    assert found.wrong.mean is None
    assert all(one.p_value == 1.0 and one.rate_ratio is None for one in found.patterns)


def test_a_few_errors_without_a_pattern_get_no_advice(make_predictions) -> None:  # type: ignore[no-untyped-def]
    said = [1] * 2 + [0] * 38
    sure = [0.8] * 40
    found = analyse_errors(make_predictions([0] * 40, said, sure), ["words " * 8] * 40, NAMES)
    assert found.errors == 2
    assert found.suggestions == ()


def test_advice_follows_from_the_counts(make_predictions) -> None:  # type: ignore[no-untyped-def]
    # 30 negatives taken for positives and 2 the other way, all of them at 0.97.
    labels = [0] * 150 + [1] * 150
    said = [1] * 30 + [0] * 120 + [0] * 2 + [1] * 148
    found = analyse_errors(make_predictions(labels, said, 0.97), ["words " * 8] * 300, NAMES)
    advice = " ".join(found.suggestions)
    assert "“negative” is taken for “positive” 30 times, the other way round 2 times" in advice
    assert "32 of 32 errors are made with a confidence of 0.9 or more" in advice
    assert "Confidence is 7.7% higher than accuracy" in advice
    assert "to a person" not in advice  # no threshold tells these errors apart


def test_of_many_pairs_of_labels_some_are_lopsided_by_chance(make_predictions) -> None:  # type: ignore[no-untyped-def]
    """15 of 20 has p = 0.04 alone, and 0.4 as the least of ten pairs; 30 of 32 stays."""
    names = [f"label {n}" for n in range(5)]
    pairs = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    labels, said = [], []
    for n, (a, b) in enumerate(pairs):
        there, back = (15, 5) if n == 0 else (30, 2) if n == 1 else (10, 10)
        labels += [a] * there + [b] * back
        said += [b] * there + [a] * back
    made = make_predictions(labels, said, count=5)
    advice = " ".join(analyse_errors(made, ["words " * 8] * len(labels), names).suggestions)
    assert "“label 0” is taken for “label 1”" not in advice
    assert "“label 0” is taken for “label 2” 30 times, the other way round 2 times" in advice
    assert "adjusted for 10 pairs" in advice


def test_unsure_errors_are_worth_handing_over(make_predictions) -> None:  # type: ignore[no-untyped-def]
    labels = [0, 1] * 100
    said = [1, 0] * 8 + [0, 1] * 92
    sure = [0.55] * 16 + [0.95] * 184
    found = analyse_errors(make_predictions(labels, said, sure), ["words " * 8] * 200, NAMES)
    assert any("below 0.6 to a person hands over 8.0%" in one for one in found.suggestions)
    assert any("catches 16 of 16 errors" in one for one in found.suggestions)


def test_texts_and_predictions_must_agree(make_predictions) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="2 predictions but 1 texts"):
        analyse_errors(make_predictions([0, 1], [0, 1]), ["one"], NAMES)
