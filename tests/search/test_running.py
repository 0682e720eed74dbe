"""Trials under way: which scores count, and how a trial can end."""

from __future__ import annotations

import math

import pytest

from lorasweep.core.outcomes import Outcome, TrialState


def test_scores_that_arent_numbers_are_never_kept_and_dont_hide_the_best(search, open_study, epoch):
    study = open_study(search(pruner={"kind": "none"}))
    asked = study.ask()
    keeps = [
        epoch(study, asked.number, at, of=4, score=score).keep
        for at, score in enumerate((math.nan, 0.5, math.nan, 0.6), start=1)
    ]
    assert keeps == [False, True, False, True]
    study.tell(Outcome(asked.number, TrialState.COMPLETED, 40, 1.0))
    assert study.best().score == 0.6
    assert math.isnan(study.history(asked.number)[0][1])


def test_a_trial_that_completed_without_a_finite_score_has_failed(search, open_study, epoch):
    study = open_study(search(pruner={"kind": "none"}))
    asked = study.ask()
    epoch(study, asked.number, 1, of=1, score=math.nan)
    assert study.tell(Outcome(asked.number, TrialState.COMPLETED, 10, 1.0))
    record = study.record(asked.number)
    assert record.state == "failed"
    assert "finite score" in record.reason
    assert study.best() is None


def test_only_ends_can_be_told(search, open_study):
    study = open_study(search())
    asked = study.ask()
    with pytest.raises(ValueError, match="running"):
        study.tell(Outcome(asked.number, TrialState.RUNNING, 1, 1.0))
    with pytest.raises(KeyError, match="no trial 99"):
        study.tell(Outcome(99, TrialState.COMPLETED, 1, 1.0))
