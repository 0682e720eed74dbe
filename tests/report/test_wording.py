from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from lorasweep.core.corpora import LeakageReport
from lorasweep.core.outcomes import TrialState
from lorasweep.report import drawing, wording
from lorasweep.report.collect import collect


def said(sweep) -> str:  # type: ignore[no-untyped-def]
    return " ".join(collect(sweep).cautions)


@pytest.mark.parametrize(
    ("finetuned", "baseline", "sentence", "verdict"),
    [
        (0.95, 0.3, "It beats tfidf", "better"),
        (0.3, 0.95, "It is worse than tfidf", "worse"),
        (0.8, 0.8, "There is no evidence of a difference from tfidf", "undecided"),
    ],
)
def test_the_conclusion_says_what_the_test_allows(  # type: ignore[no-untyped-def]
    make_sweep, finetuned: float, baseline: float, sentence: str, verdict: str
) -> None:
    found = collect(make_sweep(skills={"finetuned": finetuned, "tfidf": baseline}, test_rows=100))
    assert found.test is not None
    assert found.test.comparisons["tfidf"].verdict == verdict
    assert sentence in found.conclusion
    assert "McNemar p" in found.conclusion


def test_the_strongest_baseline_is_the_one_to_beat(make_sweep) -> None:  # type: ignore[no-untyped-def]
    found = collect(make_sweep())
    assert found.test is not None
    assert found.test.reference is not None
    assert found.test.reference.name == "untrained"
    assert "the strongest baseline, tfidf" in found.conclusion
    # A baseline alone is also what improvement is measured from.
    alone = collect(make_sweep(skills={"finetuned": 0.9, "majority": 0.0})).test
    assert alone is not None
    assert alone.reference is not None
    assert alone.reference.name == "majority"


def test_significance_is_judged_after_adjusting_for_several_baselines(make_sweep) -> None:  # type: ignore[no-untyped-def]
    found = collect(make_sweep()).test
    assert found is not None
    for one in found.comparisons.values():
        assert one.p_adjusted >= one.mcnemar.p_value
        assert (one.verdict != "undecided") == (one.p_adjusted < 0.05)


def test_openings_for_several_winners_weaken_the_conclusion(make_sweep) -> None:  # type: ignore[no-untyped-def]
    assert "opened" not in said(make_sweep(openings=1))
    assert "opened 3 times, for 3 different winners" in said(make_sweep(openings=3))
    sweep = make_sweep(openings=1)
    added = {"time": "later", "trial": 0, "models": ["majority"], "reason": "a baseline was added"}
    again = said(replace(sweep, openings=(*sweep.openings, added)))
    assert "opened 2 times, always for the same winner" in again
    assert "flatter" not in again
    # Trials of one number, of a study and of the one that was begun when it was deleted.
    studies = tuple(sweep.openings[0] | {"study": number} for number in (1, 2, 2))
    told = said(replace(sweep, openings=studies))
    assert "opened 3 times, for 2 different winners" in told


def test_leakage_is_said_where_there_is_more_than_one_in_a_hundred(make_sweep) -> None:  # type: ignore[no-untyped-def]
    assert "lie in" not in said(make_sweep(leaked=2))
    told = said(make_sweep(leaked=9))
    assert "On validation, 9 of 200 texts (4.5%) lie in, or contain, a training text" in told
    sweep = make_sweep()
    same = LeakageReport("test", 400, contained=0, duplicated=40, known=40)  # of one or two words
    told = said(replace(sweep, corpus=replace(sweep.corpus, leakage=(same,))))
    assert "On test, 40 of 400 texts (10.0%) are the same as a training text" in told


def test_few_rows_seed_noise_and_troubled_trials(make_sweep) -> None:  # type: ignore[no-untyped-def]
    assert "only 50 texts" in said(make_sweep(test_rows=50))
    assert "only" not in said(make_sweep(test_rows=2000))
    sweep = make_sweep(trials=6)
    close = replace(sweep.trials[1], score=0.925)
    noisy = said(replace(sweep, trials=(sweep.trials[0], close, *sweep.trials[2:])))
    assert "trained with one seed" in noisy
    assert "within it of the winner: trial 1." in noisy
    assert "1 trial failed: the loss is <NaN> (1)." in noisy
    assert "failed" not in said(make_sweep(trials=2))


def test_a_model_that_always_says_the_same_is_found_out(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    ours = sweep.test["finetuned"]
    constant = replace(ours, probabilities=ours.probabilities * 0 + [0.4, 0.6])
    assert "answers “positive” to every test text" in said(
        replace(sweep, test=dict(sweep.test) | {"finetuned": constant})
    )


def test_where_test_has_one_label_nobody_is_blamed_for_one_answer(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    ours = sweep.test["finetuned"]
    negative = replace(
        ours, labels=ours.labels * 0, probabilities=ours.probabilities * 0 + [0.6, 0.4]
    )
    told = said(replace(sweep, test=dict(sweep.test) | {"finetuned": negative}))
    assert "learned nothing" not in told
    assert (
        "No test text is labelled “positive”: precision, recall and F1 are 0 whatever the model "
        "answers." in told
    )


def test_a_validation_score_far_above_test_is_said(make_sweep) -> None:  # type: ignore[no-untyped-def]
    weak = make_sweep(skills={"finetuned": 0.3, "untrained": 0.1})
    assert "by more than chance on so few rows explains" in said(weak)
    assert "by more than chance" not in said(make_sweep(skills={"finetuned": 0.97}))


def test_a_score_of_few_validation_texts_may_well_be_above_that_of_many(make_sweep) -> None:  # type: ignore[no-untyped-def]
    """Six points are more than four errors of 5,000 test texts, and a whole one of 40 others."""
    sweep = make_sweep(test_rows=5000, skills={"finetuned": 0.55, "untrained": 0.1})
    tested = collect(sweep).test
    assert tested is not None
    best = replace(sweep.best, score=tested.metrics["f1"] + 0.06)
    sweep = replace(sweep, best=best)
    whole = sweep.corpus.validation
    validation = replace(
        whole, texts=whole.texts[:40], labels=whole.labels[:40], ids=whole.ids[:40]
    )
    few = replace(sweep.corpus, validation=validation)
    assert "by more than chance" not in said(replace(sweep, corpus=few))
    best = replace(sweep.best, score=tested.metrics["f1"] + 0.17)
    assert "by more than chance" in said(replace(sweep, best=best, corpus=few))


def test_the_winner_of_several_perfect_trials_is_not_the_only_one(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(trials=2)
    perfect = tuple(replace(trial, score=1.0) for trial in sweep.trials)
    told = said(replace(sweep, trials=perfect, best=perfect[0]))
    assert "within it of the winner: trial 1." in told


def test_interrupted_trials_are_counted(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(trials=2)
    stopped = replace(sweep.trials[1], state=TrialState.INTERRUPTED, score=None, reason="Ctrl-C")
    left_there = replace(sweep, trials=(sweep.trials[0], stopped))
    assert "1 trial interrupted: Ctrl-C (1)." in said(left_there)
    again = replace(sweep.trials[1], number=2, retry_of=1)
    taken_up = replace(sweep, trials=(sweep.trials[0], stopped, again))
    # A sweep that was cut off and went on says what an uninterrupted one would say.
    assert "interrupted" not in said(taken_up)
    assert wording.conclusion(taken_up, None).startswith("Of 2 trials, trial ")


def test_samples_have_the_label_of_the_split_that_they_are_from(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    validation, test = sweep.corpus.validation, sweep.corpus.test
    other = replace(
        test,
        texts=validation.texts + test.texts,
        labels=tuple(1 - label for label in validation.labels) + test.labels,
    )
    labels = dict(zip(validation.texts, validation.labels, strict=True))
    found = collect(replace(sweep, corpus=replace(sweep.corpus, test=other), test={})).samples
    names = sweep.corpus.label_names
    assert [sample.label for sample in found] == [names[labels[sample.text]] for sample in found]


@pytest.mark.parametrize("module", [wording, drawing])
def test_examples_in_docstrings(module) -> None:  # type: ignore[no-untyped-def]
    assert doctest.testmod(module).failed == 0


def test_who_searched_seeds_is_not_told_that_there_was_one(make_sweep):  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    trials = tuple(
        replace(one, parameters={**one.parameters, "seed": one.number}) for one in sweep.trials
    )
    told = said(replace(sweep, trials=trials))
    assert "Seeds were searched too" in told
    assert "trained with one seed" not in told
    assert "Seeds were searched" not in said(sweep)
