"""Every pruner gives up what is clearly bad, keeps what is clearly good, and compares fairly."""

from __future__ import annotations

import optuna
import pytest

from lorasweep.core.outcomes import Outcome, TrialState
from lorasweep.search.pruners import build_pruner, rung_reached, rungs
from lorasweep.spec.schema import PrunerSpec

PRUNERS = {
    "median": {"kind": "median", "startup_trials": 2},
    "percentile": {"kind": "percentile", "percentile": 50.0, "startup_trials": 2},
    "successive_halving": {"kind": "successive_halving", "reduction_factor": 2},
    "hyperband": {"kind": "hyperband", "reduction_factor": 2},
}


@pytest.fixture
def begin(search, open_study):
    """A study with a pruner, and its first trials: ``study, trials = begin("median", 4)``."""

    def make(kind: str, count: int):
        pruner = PRUNERS.get(kind, {"kind": kind})
        study = open_study(search("random", trials=40, pruner=pruner))
        return study, [study.ask() for _ in range(count)]

    return make


@pytest.fixture
def finish(epoch):
    """Train a trial of some epochs to its end, a constant below or above its neighbours."""

    def make(study, number, scores):
        for at, score in enumerate(scores, start=1):
            if not epoch(study, number, at, of=len(scores), score=score).go_on:
                study.tell(Outcome(number, TrialState.PRUNED, 10 * at, 1.0))
                return at
        study.tell(Outcome(number, TrialState.COMPLETED, 10 * len(scores), 1.0))
        return None

    return make


@pytest.mark.parametrize("kind", ["median", "percentile", "successive_halving"])
def test_a_clearly_bad_trial_is_pruned_and_a_clearly_good_one_is_not(kind, begin, finish):
    study, trials = begin(kind, 6)
    for asked, base in zip(trials[:4], (0.80, 0.81, 0.82, 0.83), strict=True):
        finish(study, asked.number, [base, base + 0.01, base + 0.02, base + 0.03])
    assert finish(study, trials[4].number, [0.3, 0.4, 0.5, 0.6]) == 1
    assert finish(study, trials[5].number, [0.90, 0.91, 0.92, 0.93]) is None
    bad, good = study.records()[4:6]
    assert bad.state == "pruned"
    assert "25 % of its budget" in bad.reason
    assert good.state == "completed"
    assert study.best().number == good.number


def test_hyperband_prunes_bad_trials_by_bracket_and_no_good_one():
    spec = PrunerSpec.model_validate(PRUNERS["hyperband"])
    pruner = build_pruner(spec, 42)
    study = optuna.create_study(direction="maximize")
    ended: dict[int, set[int | None]] = {0: set(), 1: set(), 2: set(), 3: set()}
    for slot in range(40):
        # The first half gets better and better, the second half is worse every time.
        good = slot < 20
        value = 0.7 + 0.01 * slot if good else 0.5 - 0.01 * slot
        reports = dict.fromkeys(rungs(spec), value)
        pruned_at = None
        for at in range(1, len(reports) + 1):
            so_far = dict(list(reports.items())[:at])
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                user_attrs={"slot": slot},
                intermediate_values=so_far,
            )
            trial.number = slot
            if pruner.prune(study, trial):
                pruned_at = list(so_far)[-1]
                break
        study.add_trial(trial)
        if good:
            assert pruned_at is None
        else:
            ended[pruner.bracket(slot)].add(pruned_at)
    # Each bracket begins one rung later; the last one lets all of its trials train to the end.
    assert ended == {0: {12}, 1: {25}, 2: {50}, 3: {None}}


def test_hyperband_prunes_in_a_study(begin, finish):
    study, trials = begin("hyperband", 12)
    pruner = build_pruner(PrunerSpec.model_validate(PRUNERS["hyperband"]), 42)
    rivals = [asked.number for asked in trials if pruner.bracket(asked.number) == 0]
    assert finish(study, rivals[0], [0.9] * 8) is None
    assert finish(study, rivals[1], [0.2] * 8) == 1


def test_no_pruner_prunes_nothing(begin, finish):
    study, trials = begin("none", 6)
    for asked, base in zip(trials, (0.9, 0.9, 0.9, 0.9, 0.1, 0.1), strict=True):
        assert finish(study, asked.number, [base] * 4) is None


def test_successive_halving_sees_trials_that_run_in_lock_step(begin, epoch):
    study, trials = begin("successive_halving", 4)
    verdicts = {}
    for asked, score in zip(trials, (0.8, 0.5, 0.9, 0.4), strict=True):
        verdicts[asked.number] = epoch(study, asked.number, 1, of=4, score=score).go_on
    # No trial has ended. 0.8 has no rival; 0.5 and 0.4 are behind; 0.9 leads.
    assert verdicts == {0: True, 1: False, 2: True, 3: False}
    assert epoch(study, 0, 2, of=4, score=0.81).go_on
    assert epoch(study, 2, 2, of=4, score=0.91).go_on


def test_what_a_resumed_trial_tells_again_counts_and_is_not_judged_again(begin, epoch):
    study, trials = begin("successive_halving", 4)
    first, second, third, fourth = (asked.number for asked in trials)
    assert epoch(study, first, 1, of=2, score=0.5).go_on  # it had no rival
    study.interrupt(first, "cut")
    assert epoch(study, second, 1, of=2, score=0.8).go_on
    assert not epoch(study, fourth, 1, of=2, score=0.3).go_on
    retry = study.ask()
    assert retry.retry_of == first
    # Judged now, it would be given up; uninterrupted, it was let go on.
    verdict = epoch(study, retry.number, 1, of=2, score=0.5)
    assert (verdict.keep, verdict.go_on) == (True, True)
    assert study.history(retry.number) == ((1, 0.5),)
    # For the others it stands where it stood: second of four goes on, second of three would not.
    assert epoch(study, third, 1, of=2, score=0.6).go_on
    study.tell(Outcome(retry.number, TrialState.COMPLETED, 20, 1.0))
    assert study.record(retry.number).best_epoch == 1


def test_a_trial_that_was_to_be_pruned_when_the_kill_came_is_pruned(begin, epoch):
    study, trials = begin("successive_halving", 2)
    first, second = (asked.number for asked in trials)
    assert epoch(study, first, 1, of=4, score=0.8).go_on
    assert not epoch(study, second, 1, of=4, score=0.3).go_on
    for number in (first, second):
        study.interrupt(number, "killed before its outcome was told")
    one, other = study.ask(), study.ask()
    assert (one.retry_of, other.retry_of) == (first, second)
    # It comes to that epoch before its rival, and so it would lead; and again, cut off once more.
    assert not epoch(study, other.number, 1, of=4, score=0.3).go_on
    study.interrupt(other.number, "killed again")
    again = study.ask()
    assert not epoch(study, again.number, 1, of=4, score=0.3).go_on
    # What was not told before is judged as ever.
    assert epoch(study, one.number, 1, of=4, score=0.8).go_on
    assert epoch(study, one.number, 2, of=4, score=0.9).go_on
    study.tell(Outcome(again.number, TrialState.PRUNED, 10, 1.0))
    assert "others were ahead of 0.3" in study.record(again.number).reason


@pytest.mark.parametrize("kind", ["median", "percentile", "successive_halving", "hyperband"])
def test_short_trials_that_are_finished_dont_beat_long_ones_that_are_half_way(
    kind, begin, finish, epoch
):
    study, trials = begin(kind, 12)
    for asked in trials[:10]:  # one epoch each: annealed, and high at once
        assert finish(study, asked.number, [0.9]) is None
    for at, score in enumerate((0.5, 0.7, 0.95), start=1):
        assert epoch(study, trials[10].number, at, of=3, score=score).go_on


@pytest.mark.parametrize("kind", ["median", "percentile", "successive_halving"])
def test_trials_are_compared_at_the_same_share_of_their_budgets(kind, begin, finish, epoch):
    study, trials = begin(kind, 12)
    # Two epochs: their first evaluation is at half of the budget.
    for asked in trials[:6]:
        finish(study, asked.number, [0.80 + 0.01 * asked.number, 0.9])
    # Four epochs: a quarter of the budget is not compared with those halves …
    assert epoch(study, trials[6].number, 1, of=4, score=0.6).go_on
    # … but half of the budget is, whatever the number of epochs or steps.
    assert not epoch(study, trials[6].number, 2, of=4, score=0.7).go_on
    assert epoch(study, trials[7].number, 2, of=4, score=0.95).go_on


def test_a_trial_is_counted_once_at_each_rung(begin, epoch):
    study, trials = begin("successive_halving", 2)
    for at in range(1, 4):  # 10, 20, 30 % of the budget: rungs 0, 12 and 25
        assert epoch(study, trials[0].number, at, of=10, score=0.5 + 0.1 * at).go_on
    assert epoch(study, trials[1].number, 1, of=10, score=0.0).go_on
    # At its rung the other stood at 0.7; at 40 % the same rung is not asked again.
    assert epoch(study, trials[1].number, 2, of=10, score=0.71).go_on
    assert epoch(study, trials[0].number, 4, of=10, score=0.1).go_on


def test_the_last_epoch_never_prunes(begin, finish, epoch):
    study, trials = begin("successive_halving", 6)
    for asked in trials[:5]:
        finish(study, asked.number, [0.9, 0.9])
    assert epoch(study, trials[5].number, 1, of=1, score=0.0).go_on


def test_a_trial_without_a_finite_score_falls_behind(begin, finish, epoch):
    study, trials = begin("successive_halving", 3)
    finish(study, trials[0].number, [0.9, 0.9])
    assert not epoch(study, trials[1].number, 1, of=2, score=float("nan")).go_on
    study.tell(Outcome(trials[1].number, TrialState.PRUNED, 1, 1.0, "stopped after epoch 1 of 2"))
    assert study.record(trials[1].number).reason == (
        "stopped after epoch 1 of 2: at 50 % of its budget its f1 was no number"
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"kind": "none"}, ()),
        ({"kind": "median"}, (25, 50, 75)),
        ({"kind": "successive_halving", "reduction_factor": 2}, (12, 25, 50)),
        ({"kind": "successive_halving", "reduction_factor": 3}, (11, 33)),
        ({"kind": "hyperband", "reduction_factor": 4}, (25,)),
        ({"kind": "successive_halving", "reduction_factor": 50}, (2,)),
    ],
)
def test_the_rungs(spec, expected):
    assert rungs(PrunerSpec.model_validate(spec)) == expected


def test_a_third_of_the_budget_reaches_the_rung_of_a_third_in_spite_of_rounding():
    spec = PrunerSpec(kind="successive_halving", reduction_factor=3)
    assert rung_reached(spec, 33 / 101, set()) == 33
    assert rung_reached(spec, 33 / 101, {33}) is None
    assert rung_reached(spec, 0.05, set()) is None


def test_early_brackets_get_most_trials():
    pruner = build_pruner(PrunerSpec(kind="hyperband"), 42)
    dealt = [pruner.bracket(slot) for slot in range(400)]
    counts = [dealt.count(bracket) for bracket in range(4)]
    assert counts[0] > counts[1] > counts[2]
    assert counts[3] > 0
