"""The study: what it hands out, what it remembers, and which trial is the best."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import optuna
import pytest
import torch

from lorasweep.core.outcomes import Outcome, TrialFacts, TrialState
from lorasweep.core.plans import Resumption
from lorasweep.search.study import Study


def test_a_trial_from_ask_to_tell(search, open_study, epoch, database):
    study = open_study(search(trials=3, pruner={"kind": "none"}))
    asked = study.ask()
    study.set_run_id(asked.number, "run-7")
    facts = TrialFacts(100, 1000, 30, targets=("a.query", "a.value"), lane=2)
    study.set_facts(asked.number, facts)
    assert study.records()[0].state == "running"
    assert study.records()[0].score is None
    assert epoch(study, asked.number, 1, of=3, score=0.7).keep
    assert epoch(study, asked.number, 2, of=3, score=0.9).keep
    assert not epoch(study, asked.number, 3, of=3, score=0.9).keep
    assert study.records()[0].seconds == 4.5
    assert study.tell(Outcome(asked.number, TrialState.COMPLETED, 30, 12.5))

    seen = Study.peek(database, "sweep")
    (record,) = seen.records()
    assert record == study.record(0)
    assert (record.state, record.score, record.best_epoch) == ("completed", 0.9, 2)
    assert record.metrics == {"f1": 0.9, "epoch_was": 2.0}
    assert (record.seconds, record.run_id, record.reason) == (12.5, "run-7", "")
    assert record.parameters == asked.parameters
    assert record.seed == asked.seed
    assert seen.history(0) == ((1, 0.7), (2, 0.9), (3, 0.9))
    assert seen.facts(0) == facts
    assert seen.best() == record
    assert study.remaining == 2
    # Other tools that open the database see the same value.
    stored = optuna.load_study(study_name="sweep", storage=f"sqlite:///{database}").trials[0]
    assert stored.value == 0.9
    assert stored.params["rank"] == asked.parameters["rank"]


def test_every_point_keeps_its_place_on_the_engines_clock(search, open_study, epoch):
    spec = search(trials=6, pruner={"kind": "none"})
    study = open_study(spec)
    assert study.resumption == Resumption(0, 0)
    first, second, third = (study.ask() for _ in range(3))
    assert [asked.begins for asked in (first, second, third)] == [0, 0, 0]
    for asked, clock in ((second, 40), (first, 40)):
        epoch(study, asked.number, 1, of=1, score=0.5)
        study.tell(Outcome(asked.number, TrialState.COMPLETED, 10, 1.0, clock=clock))
    fourth = study.ask()
    assert fourth.begins == 40
    # A kill: the next command finds two trials running and one place free.
    study = open_study(spec)
    study.reconcile(alone=True)
    assert study.resumption == Resumption(trials=2, clock=40)
    again = [study.ask() for _ in range(3)]
    assert [asked.retry_of for asked in again] == [third.number, fourth.number, None]
    assert [asked.begins for asked in again] == [0, 40, 40]


def test_the_total_counts_what_ended_by_itself_and_nothing_that_was_interrupted(
    search, open_study, epoch
):
    study = open_study(search(trials=4))
    completed, pruned, failed, interrupted = (study.ask() for _ in range(4))
    assert study.ask() is None  # all four are running
    assert study.remaining == 0
    epoch(study, completed.number, 1, of=2, score=0.5)
    study.tell(Outcome(completed.number, TrialState.COMPLETED, 10, 1.0))
    epoch(study, pruned.number, 1, of=2, score=0.4)
    study.tell(Outcome(pruned.number, TrialState.PRUNED, 10, 1.0))
    study.tell(Outcome(failed.number, TrialState.FAILED, 3, 1.0, reason="the loss is NaN"))
    assert study.interrupt(interrupted.number, "KeyboardInterrupt")
    assert [record.state for record in study.records()] == [
        "completed",
        "pruned",
        "failed",
        "interrupted",
    ]
    assert [record.reason for record in study.records()][2:] == [
        "the loss is NaN",
        "KeyboardInterrupt",
    ]
    assert study.remaining == 1
    again = study.ask()
    assert again.retry_of == interrupted.number
    assert (again.parameters, again.seed) == (interrupted.parameters, interrupted.seed)
    assert study.record(again.number).retry_of == interrupted.number
    assert study.ask() is None


def test_the_total_may_grow(search, open_study, train):
    study = open_study(search(trials=2))
    while asked := study.ask():
        train(study, asked)
    more = open_study(search(trials=3))
    assert more.remaining == 1
    assert more.ask().number == 2
    assert open_study(search(trials=1)).ask() is None


def test_equal_parameters_have_equal_seeds_in_every_study(search, open_study):
    a = open_study(search("points"), "a")
    b = open_study(search("points"), "b")
    a.ask()
    assert a.ask().seed != b.ask().seed
    assert a.ask().seed != (second := b.ask()).seed
    assert second.seed == a.records()[1].seed
    other = open_study(search("points"), "c", seed=43)
    assert other.ask().seed != b.records()[0].seed


def test_of_equal_scores_the_one_whose_turn_came_first_wins(search, open_study, epoch):
    study = open_study(search(trials=3, pruner={"kind": "none"}))
    first, second = study.ask(), study.ask()
    study.interrupt(first.number, "cut")
    retry = study.ask()
    for asked in (second, retry):
        epoch(study, asked.number, 1, of=1, score=0.8)
        study.tell(Outcome(asked.number, TrialState.COMPLETED, 10, 1.0))
    # Uninterrupted, trial 0 would have been told first and would have won.
    assert study.best().number == retry.number


def test_a_pruned_trial_is_not_the_best(search, open_study, epoch):
    study = open_study(search())
    a, b = study.ask(), study.ask()
    epoch(study, a.number, 1, of=2, score=0.9)
    study.tell(Outcome(a.number, TrialState.PRUNED, 10, 1.0))
    assert study.best() is None
    epoch(study, b.number, 1, of=1, score=0.5)
    study.tell(Outcome(b.number, TrialState.COMPLETED, 10, 1.0))
    assert study.best().number == b.number


def test_workers_that_ask_at_the_same_time_never_get_the_same_point(search, open_study):
    spec = search("grid", trials=12)
    workers = [open_study(spec) for _ in range(3)]

    def ask_all(study):
        found = []
        while (asked := study.ask()) is not None:
            found.append(asked)
        return found

    with ThreadPoolExecutor(len(workers)) as pool:
        asked = [one for found in pool.map(ask_all, workers) for one in found]
    assert sorted(one.number for one in asked) == list(range(12))
    assert len({str(one.parameters) for one in asked}) == 12


@pytest.mark.parametrize("kind", ["tpe", "random", "grid", "qmc", "gp", "cmaes"])
def test_asking_leaves_the_global_random_streams_alone(kind, search, open_study, train):
    study = open_study(search(kind, trials=6))

    def states():
        numbers = np.random.get_state()
        return random.getstate(), numbers[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    while asked := study.ask():
        train(study, asked)
    assert states() == before
