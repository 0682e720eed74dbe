"""What a study does about trials whose worker died, was slow or was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from lorasweep.core.outcomes import Outcome, TrialFacts, TrialState
from lorasweep.search.lease import LEASE_SECONDS, Owner
from lorasweep.search.study import Study
from lorasweep.spec.schema import SearchSpec


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


def test_silence_is_told_as_an_end_only_where_the_process_is_not_there(search, open_study, clock):
    names = {"here": Owner.current(), "elsewhere": Owner("elsewhere", 1, 0.0)}
    studies = {name: open_study(search(), owner=owner) for name, owner in names.items()}
    numbers = {name: study.ask().number for name, study in studies.items()}
    looking = studies["here"]
    assert looking.abandoned(clock.now) == {}
    late = clock.now + LEASE_SECONDS + 1
    (abandoned,) = looking.abandoned(late).items()
    assert abandoned == (
        numbers["elsewhere"],
        "its lease expired; it belonged to process 1 on elsewhere",
    )
    assert [record.state for record in looking.records()] == ["running", "running"]


def test_a_trial_at_work_is_left_alone(search, open_study, clock):
    worker = open_study(search(), owner=Owner("elsewhere", 1, 0.0))
    asked = worker.ask()
    for _ in range(5):
        clock.now += 0.9 * LEASE_SECONDS
        worker.renew(asked.number)
    assert open_study(search()).reconcile() == ()
    assert worker.record(asked.number).state == "running"


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
