"""The study: what it remembers, who may change it, and what is left when it is killed."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from lorasweep.core.errors import ConflictError, StorageError
from lorasweep.core.records import Outcome, Resumption, TrialFacts, TrialState
from lorasweep.search.lease import LEASE_SECONDS, Owner
from lorasweep.search.study import Study
from lorasweep.spec.schema import SearchSpec


def test_a_study_is_made_where_there_was_none_and_says_nothing(tmp_path, search, capfd):
    database = tmp_path / "a folder" / "with 100% #odd ?signs" / "optuna.db"
    study = Study.open(database, "sweep", search(), 1, {"data": "d"})
    assert study.ask().number == 0
    assert database.is_file()
    study.close()
    assert Study.peek(database, "sweep").records()[0].state == "running"
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_looking_at_a_study_that_isnt_there_makes_nothing(tmp_path, database):
    assert Study.peek(tmp_path / "none" / "optuna.db", "sweep") is None
    assert Study.peek(database, "sweep") is None
    assert not (tmp_path / "none").exists()
    assert optuna.get_all_study_names(f"sqlite:///{database}") == []


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


def test_a_retry_that_is_interrupted_is_retried_again(search, open_study):
    study = open_study(search(trials=3))
    first, other = study.ask(), study.ask()
    study.interrupt(first.number, "cut")
    second = study.ask()
    study.interrupt(second.number, "cut")
    third = study.ask()
    assert third.retry_of == second.number
    assert third.parameters == first.parameters != other.parameters
    assert study.remaining == 1


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


def test_what_comes_too_late_is_dropped(search, open_study, epoch, clock):
    slow = open_study(search(), owner=Owner("elsewhere", 1, 0.0))
    asked = slow.ask()
    epoch(slow, asked.number, 1, of=4, score=0.6)
    clock.now += LEASE_SECONDS + 1
    other = open_study(search())
    (abandoned,) = other.reconcile()
    assert abandoned.number == asked.number
    assert abandoned.state == "interrupted"
    assert "lease expired" in abandoned.reason
    # The slow worker is told to stop, and nothing that it says changes anything.
    before = other.records()
    verdict = epoch(slow, asked.number, 2, of=4, score=0.9)
    assert (verdict.keep, verdict.go_on) == (False, False)
    slow.renew(asked.number)
    slow.set_run_id(asked.number, "late")
    assert slow.tell(Outcome(asked.number, TrialState.COMPLETED, 40, 9.0)) is False
    assert slow.interrupt(asked.number, "late") is False
    assert other.records() == before
    assert other.ask().parameters == asked.parameters


def test_a_trial_at_work_is_left_alone(search, open_study, clock):
    worker = open_study(search(), owner=Owner("elsewhere", 1, 0.0))
    asked = worker.ask()
    for _ in range(5):
        clock.now += 0.9 * LEASE_SECONDS
        worker.renew(asked.number)
    assert open_study(search()).reconcile() == ()
    assert worker.record(asked.number).state == "running"


def test_only_ends_can_be_told(search, open_study):
    study = open_study(search())
    asked = study.ask()
    with pytest.raises(ValueError, match="running"):
        study.tell(Outcome(asked.number, TrialState.RUNNING, 1, 1.0))
    with pytest.raises(KeyError, match="no trial 99"):
        study.tell(Outcome(99, TrialState.COMPLETED, 1, 1.0))


def test_another_spec_or_other_data_are_refused_by_name(search, open_study):
    before = {"data": "d" * 64, "base": "b", "search.space.rank": "[4]", "seed": "1"}
    after = {**before, "data": "e" * 64, "search.space.rank": "[8]"}
    open_study(search(), fingerprint=before)
    open_study(search(), fingerprint=before)
    with pytest.raises(ConflictError) as raised:
        open_study(search(), fingerprint=after)
    data, rank = raised.value.problems
    assert (data.where, rank.where) == ("data", "search.space.rank")
    assert "[4]" in rank.what
    assert "[8]" in rank.what
    assert "another name" in rank.advice
    assert raised.value.exit_code == 2
    open_study(search(), "another", fingerprint=after)


def test_a_study_that_was_deleted_and_begun_again_is_another_one(search, open_study, database):
    first = open_study(search()).id
    assert open_study(search()).id == first
    assert open_study(search(), "other").id != first
    optuna.delete_study(study_name="sweep", storage=f"sqlite:///{database}")
    assert open_study(search()).id != first


def test_a_study_of_another_program_is_refused(search, open_study, database):
    study = optuna.create_study(study_name="sweep", storage=f"sqlite:///{database}")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ConflictError, match="another program"):
        open_study(search())


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look at" * 40])
def test_a_file_that_is_no_database_is_named_in_a_sentence(tmp_path: Path, search, content):
    database = tmp_path / "optuna.db"
    database.write_bytes(content)
    with pytest.raises(StorageError, match="not a database") as raised:
        Study.open(database, "sweep", search(), 1, {})
    assert str(database) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(StorageError):
        Study.peek(database, "sweep")


def test_a_folder_that_cant_be_made_is_named_in_a_sentence(tmp_path: Path, search):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="can't be used"):
        Study.open(tmp_path / "file" / "optuna.db", "sweep", search(), 1, {})


STAGES = ["asked", "tracked", "built", "half-way", "evaluated", "told"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_sweep_abandoned_at_any_stage_goes_on_to_the_same_end(
    stage, search, open_study, epoch, train, gone
):
    spec = search(trials=4)
    straight = open_study(spec, "straight")
    while asked := straight.ask():
        train(straight, asked)

    study = open_study(spec, owner=gone)
    train(study, study.ask())
    asked = study.ask()
    at = STAGES.index(stage)
    if at >= 1:
        study.set_run_id(asked.number, "run")
    if at >= 2:
        study.set_facts(asked.number, TrialFacts(1, 2, 3))
    if at >= 3:
        epoch(study, asked.number, 1, of=4, score=0.99)
    if at == 4:
        epoch(study, asked.number, 4, of=4, score=0.99)
    if at == 5:
        study.interrupt(asked.number, "KeyboardInterrupt")
    study.close()

    resumed = open_study(spec)
    assert len(resumed.reconcile()) == (0 if stage == "told" else 1)
    while asked := resumed.ask():
        train(resumed, asked)
    records = resumed.records()
    assert not [record for record in records if record.state == "running"]
    kept = [record for record in records if record.state != "interrupted"]
    assert len(kept) == 4
    in_turn = sorted(kept, key=lambda r: r.number if r.retry_of is None else r.retry_of)
    for one, other in zip(in_turn, straight.records(), strict=True):
        assert (one.parameters, one.seed, one.state, one.score) == (
            other.parameters,
            other.seed,
            other.state,
            other.score,
        )


def test_a_kill_between_what_is_written_and_the_state_leaves_a_trial_to_retry(
    search, open_study, epoch, monkeypatch, gone
):
    study = open_study(search(), owner=gone)
    asked = study.ask()
    epoch(study, asked.number, 1, of=1, score=0.5)

    def killed(*_args, **_kwargs):
        raise SystemExit("killed")

    monkeypatch.setattr(study._study, "tell", killed)
    with pytest.raises(SystemExit):
        study.tell(Outcome(asked.number, TrialState.COMPLETED, 10, 1.0))
    resumed = open_study(search())
    assert resumed.record(asked.number).state == "running"
    assert [record.number for record in resumed.reconcile()] == [asked.number]
    assert resumed.ask().parameters == asked.parameters


def test_a_killed_process_leaves_nothing_running(database, search, open_study, train):
    program = f"""
        import sys
        from pathlib import Path
        from lorasweep.search.study import Study
        from lorasweep.spec.schema import SearchSpec
        spec = SearchSpec.model_validate_json(sys.argv[1])
        study = Study.open(
            Path({str(database)!r}), "sweep", spec, 42, {{"spec": "s", "data": "d", "base": "b"}}
        )
        study.ask()
        study.ask()
        print("two", flush=True)
        sys.stdin.read()
    """
    spec = search("random", trials=3)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), spec.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"two\n"
    # While it lives, its trials are its own.
    study = open_study(spec)
    assert study.reconcile() == ()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert len(study.reconcile()) == 2
    while asked := study.ask():
        train(study, asked)
    records = study.records()
    assert [record.retry_of for record in records] == [None, None, 0, 1, None]
    points = [str(record.parameters) for record in records if record.state != "interrupted"]
    assert len(set(points)) == len(points) == 3


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


def test_whoever_holds_the_sweep_takes_up_every_running_trial(tmp_path):
    """A restarted container has another host name, and its dead trial looks like a live one."""

    def opened(owner):
        spec = SearchSpec.model_validate(
            {"trials": 2, "pruner": {"kind": "none"}, "space": {"rank": {"choices": [1, 2, 3]}}}
        )
        return Study.open(tmp_path / "o.db", "s", spec, 1, {"data": "x"}, owner=owner)

    first = opened(Owner("a-container-that-is-no-more", 1, 0.0)).ask()
    again = opened(None)
    assert again.reconcile() == ()
    (record,) = again.reconcile(alone=True)
    assert (record.number, record.state) == (first.number, TrialState.INTERRUPTED)
    retry = again.ask()
    assert (retry.retry_of, retry.parameters) == (first.number, first.parameters)
    assert again.reconcile(alone=True) == ()  # its own trial is under way
