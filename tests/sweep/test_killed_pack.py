"""A pack that is killed ends like one that ran through, also where the sampler learns.

A kill is an exception that nothing may tidy up after; ``test_packed_sweep.py`` kills a process.
"""

import itertools

import pytest

from lorasweep import load_spec, run_sweep
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths
from lorasweep.engines import lane_checkpoint, pack_run
from lorasweep.engines.lane_checkpoint import LaneCheckpoints
from lorasweep.engines.pack_run import PackRun
from lorasweep.search.study import Study
from lorasweep.sweep.worker import Worker

OVERRIDES = [
    "engine=packed",
    "lanes=3",
    "search.trials=9",
    "search.objective=auc",  # finer than F1 on few rows
    "search.sampler={kind: tpe, startup_trials: 2}",
    "search.pruner={kind: successive_halving}",
    "search.space.epochs={choices: [1, 2, 3, 4]}",
    "search.space.batch_size={choices: [4, 8, 16]}",
]
PLACES = {
    "file": (lane_checkpoint, "write_whole"),
    "asked": (Study, "ask"),
    "epoch": (Study, "report"),
    "outcome": (Study, "tell"),
    "tidied": (pack_run, "discard"),
}


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def kill(monkeypatch):
    """Kill after (or before) so many calls of one of ``PLACES``: ``kill("file", 3)``."""
    calls, rounds = {}, itertools.count(1)
    fatal = {}

    def watch(name, owner, attribute):
        original = getattr(owner, attribute)

        def watched(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            if fatal == {"before": (name, calls[name])}:
                raise Killed
            result = original(*args, **kwargs)
            if fatal == {"after": (name, calls[name])}:
                raise Killed
            return result

        monkeypatch.setattr(owner, attribute, watched)

    for name, (owner, attribute) in PLACES.items():
        watch(name, owner, attribute)
    monkeypatch.setattr(PackRun, "_save_before_stopping", lambda self: None)
    monkeypatch.setattr(Worker, "_interrupt_running", lambda self, reason, parent: None)
    # Rounds of checkpoints come by counting, not by the watch, and only where one is to be cut.
    monkeypatch.setattr(
        LaneCheckpoints,
        "due",
        property(lambda self: fatal.get("after", "")[:1] == ("file",) and next(rounds) % 7 == 0),
    )

    def arm(name, nth, when="after"):
        calls.clear()
        fatal.clear()
        if name:
            fatal[when] = (name, nth)

    return arm


_STRAIGHT = {}


@pytest.fixture
def straight(small_sweep, monkeypatch, kill):
    """How the sweep ends when nobody kills it, done once for all tests."""
    if not _STRAIGHT:
        place = small_sweep.parent / "straight"
        place.mkdir()
        with monkeypatch.context() as patch:
            patch.chdir(place)
            _STRAIGHT["ends"] = ends(run_sweep(small_sweep, OVERRIDES, report=False)[0])
    return _STRAIGHT["ends"]


def ends(result):
    """Every point in its place in the sweep, and what became of it."""
    records = {record.number: record for record in result.records}

    def place(record):
        while record.retry_of is not None:
            record = records[record.retry_of]
        return record.number

    counted = [r for r in result.records if r.state is not TrialState.INTERRUPTED]
    return [
        (r.parameters, r.state, r.best_epoch, pytest.approx(r.score, abs=1e-6))
        for r in sorted(counted, key=place)
    ]


MOMENTS = {
    "between two files of one round": ("file", 6),
    "after an epoch was told, before its checkpoint": ("epoch", 7),
    "after an outcome was told": ("outcome", 2),
    "before the checkpoint of an ended trial was removed": ("tidied", 2, "before"),
    "after a free place was asked for": ("asked", 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_pack_ends_like_one_that_ran_through(moment, small_sweep, straight, kill):
    assert {state for _, state, _, _ in straight} == {TrialState.COMPLETED, TrialState.PRUNED}
    kill(*MOMENTS[moment])
    with pytest.raises(Killed):
        run_sweep(small_sweep, OVERRIDES, report=False)
    kill(None, 0)
    spec = load_spec(small_sweep, OVERRIDES)
    left = Study.peek(sweep_paths(spec.output, spec.name).optuna_database, spec.name)
    assert TrialState.RUNNING in [record.state for record in left.records()]
    left.close()
    resumed, _ = run_sweep(small_sweep, OVERRIDES, report=False)
    assert ends(resumed) == straight
