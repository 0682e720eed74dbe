"""A whole sweep on the packed engine: the same trials, the same scores, safe to cut off."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from lorasweep import load_report, load_spec, run_sweep
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths
from lorasweep.search.study import Study
from lorasweep.sweep import worker
from lorasweep.sweep.events import (
    TrialEnded,
    TrialEvaluated,
    TrialReady,
    TrialStarted,
    TrialStepped,
)
from lorasweep.tracking.mlflow_tracker import MlflowTracker

POINTS = """\
  sampler:
    kind: points
    points:
      - {learning_rate: 0.01, epochs: 1, rank: 2}
      - {learning_rate: 0.02, epochs: 3, rank: 4}
      - {learning_rate: 0.005, epochs: 2, rank: 2, batch_size: 16, scheduler: cosine}
      - {learning_rate: 0.03, epochs: 1, rank: 8, weight_decay: 0.1, seed: 5}
      - {learning_rate: 0.015, epochs: 2, rank: 4, warmup: 0.3}
"""


@pytest.fixture
def five_points(small_sweep):
    text = small_sweep.read_text(encoding="utf-8")
    head = text[: text.index("search:")].replace("model: {", "model: {base_dropout: 0, ")
    text = f"{head}lora: {{dropout: 0}}\nsearch:\n  trials: 5\n  pruner: {{kind: none}}\n{POINTS}"
    small_sweep.write_text(text, encoding="utf-8")
    return small_sweep


def histories(events):
    found = {}
    for event in events:
        if isinstance(event, TrialEvaluated):
            found.setdefault(event.number, []).append(event.metrics["loss"])
    return found


def test_both_engines_tell_the_same_story(five_points, monkeypatch):
    told = {}
    for engine in ("trainer", "packed"):
        place = five_points.parent / engine
        place.mkdir()
        monkeypatch.chdir(place)
        events = []
        overrides = [f"engine={engine}", "lanes=3"]
        result, report = run_sweep(five_points, overrides, listener=events.append)
        assert [r.state for r in result.records] == [TrialState.COMPLETED] * 5
        told[engine] = (result, histories(events), report.finished, events)
    one, two = told["trainer"], told["packed"]
    assert set(one[1]) == set(two[1]) == set(range(5))
    for number, losses in one[1].items():
        np.testing.assert_allclose(two[1][number], losses, atol=1e-3)
    assert one[0].best.number == two[0].best.number
    np.testing.assert_allclose(
        one[2].test["finetuned"].probabilities, two[2].test["finetuned"].probabilities, atol=1e-3
    )
    # Three at once, and a free place is filled while the longest of them still trains.
    lanes = [event.facts.lane for event in two[3] if isinstance(event, TrialReady)]
    assert set(lanes) == {0, 1, 2}
    started = [at for at, e in enumerate(two[3]) if isinstance(e, TrialStarted)]
    ended = {e.record.number: at for at, e in enumerate(two[3]) if isinstance(e, TrialEnded)}
    assert started[2] < min(ended.values()) < started[3] < ended[1]


class Cut:
    """A listener that stops the sweep once, as Ctrl-C would."""

    def __init__(self, when):
        self.when = when

    def __call__(self, event):
        if self.when(event):
            raise KeyboardInterrupt


def counted(result):
    return [r for r in result.records if r.state is not TrialState.INTERRUPTED]


def elsewhere(spec_file, name, monkeypatch):
    place = spec_file.parent / name
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def checkpoints(place):
    return list(place.rglob("*checkpoint*"))


def curves(spec, number):
    """All that MLflow has of a trial's training: metric to ((step, value), …)."""
    paths = sweep_paths(spec.output, spec.name)
    tracker = MlflowTracker.open(paths.tracking_uri("sqlite"), spec.name, paths.mlflow_artifacts)
    study = Study.peek(paths.optuna_database, spec.name)
    run_id = study.record(number).run_id
    run = tracker.client.get_run(run_id)
    return run.data.params, {
        name: [(m.step, m.value) for m in tracker.client.get_metric_history(run_id, name)]
        for name in run.data.metrics
        if name != "seconds"
    }


@pytest.mark.parametrize("lanes", [3, 2])
def test_a_pack_cut_off_goes_on_as_if_it_was_not(lanes, five_points, monkeypatch):
    spec = load_spec(five_points, ["engine=packed", "lanes=3", "training.log_every=2"])
    straight, _ = run_sweep(spec, report=False)
    expected = {r.number: (r, curves(spec, r.number)) for r in straight.records}
    place = elsewhere(five_points, "cut", monkeypatch)
    events = []

    def when(event):
        events.append(event)
        return isinstance(event, TrialStepped) and (event.number, event.step) == (1, 16)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, listener=Cut(when), report=False)
    ended = {e.record.number for e in events if isinstance(e, TrialEnded)} - {1}
    assert len(checkpoints(place)) == 3
    # As if a kill had come after the study was told, and before the folder was tidied.
    (sweep_paths("mlruns", "small").checkpoint(min(ended))).write_bytes(b"left behind")
    again = load_spec(five_points, ["engine=packed", f"lanes={lanes}", "training.log_every=2"])
    events.clear()
    resumed, _ = run_sweep(again, listener=events.append, report=False)
    ready = {e.number: e.facts for e in events if isinstance(e, TrialReady)}
    taken_up = [r for r in resumed.records if r.retry_of is not None]
    assert len(taken_up) == 3
    assert {ready[r.number].resumed_step for r in taken_up} >= {16}
    assert min(ready[r.number].resumed_step for r in taken_up) > 0
    assert ended  # some of the five had ended before, or this shows less than it should
    exact = 0 if lanes == 3 else 1e-4

    for record in counted(resumed):
        first, (params, metrics) = expected[record.retry_of or record.number]
        assert record.parameters == first.parameters
        assert (record.state, record.best_epoch) == (first.state, first.best_epoch)
        assert record.score == pytest.approx(first.score, abs=exact)
        found_params, found = curves(again, record.number)
        steps = str(ready[record.number].resumed_step) if record.number in ready else "0"
        assert found_params.pop("resumed_step", "0") == steps
        assert found_params == params
        assert found.keys() == metrics.keys()
        for name, values in metrics.items():
            assert [step for step, _ in found[name]] == [step for step, _ in values]
            np.testing.assert_allclose(
                [value for _, value in found[name]], [value for _, value in values], atol=exact
            )
    assert checkpoints(place) == []
    assert not [r for r in resumed.records if r.state is TrialState.RUNNING]


def test_a_kill_before_the_checkpoint_was_handed_over_does_not_cost_it(small_sweep, monkeypatch):
    overrides = ["engine=packed", "lanes=1", "search.trials=1", "search.space={}"]
    overrides += ["search.sampler={kind: points, points: [{epochs: 3}]}"]
    cut = Cut(lambda e: isinstance(e, TrialEvaluated) and e.epoch == 2)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(small_sweep, overrides, listener=cut, report=False)

    def killed(earlier, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "hand_over", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(small_sweep, overrides, report=False)
    events = []
    resumed, _ = run_sweep(small_sweep, overrides, listener=events.append, report=False)
    assert [r.retry_of for r in resumed.records] == [None, 0, 1]
    (ready,) = (e for e in events if isinstance(e, TrialReady))
    assert (ready.number, ready.facts.resumed_step) == (2, 24)
    assert [e.epoch for e in events if isinstance(e, TrialEvaluated)] == [1, 2, 3]
    assert checkpoints(small_sweep.parent) == []


SPACE = "{rank: {choices: [2, 4]}, weight_decay: {low: 0.0, high: 0.2, step: 0.1}}"


@pytest.mark.parametrize("kind", ["qmc", "random", "grid", "points", "tpe"])
def test_a_restart_ends_with_the_trials_of_one_that_ran_through(kind, small_sweep, monkeypatch):
    overrides = ["engine=packed", "lanes=2", "search.trials=4", "training.epochs=2"]
    if kind == "points":
        points = "[{rank: 2}, {rank: 4, epochs: 1}, {rank: 8}, {rank: 2, epochs: 3}]"
        overrides += [
            "search.space={}",
            f"search.sampler={{kind: points, points: {points}}}",
        ]
    else:
        startup = ", startup_trials: 1" if kind == "tpe" else ""
        overrides += [
            f"search.space={SPACE}",
            f"search.sampler={{kind: {kind}{startup}}}",
        ]
    straight, _ = run_sweep(small_sweep, overrides, report=False)
    elsewhere(small_sweep, "cut", monkeypatch)
    for number in (1, 3):
        cut = Cut(lambda e, n=number: isinstance(e, TrialEvaluated) and e.number == n)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(small_sweep, overrides, listener=cut, report=False)
    resumed, _ = run_sweep(small_sweep, overrides, report=False)
    places = sorted(counted(resumed), key=lambda r: origin(r, resumed.records))
    for one, other in zip(straight.records, places, strict=True):
        assert one.parameters == other.parameters
        assert (one.state, one.best_epoch) == (other.state, other.best_epoch)
        assert one.metrics == pytest.approx(dict(other.metrics), abs=1e-6)
    assert len(resumed.records) > len(straight.records)


def origin(record, records):
    """The trial whose point was taken up, and taken up again."""
    while record.retry_of is not None:
        record = next(r for r in records if r.number == record.retry_of)
    return record.number


def close_to(one, other):
    """The same document, its numbers within the tolerance that neighbours make."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close_to(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            close_to(a, b)
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=1e-4)
    else:
        assert one == other


# It kills itself at an instant that no slow machine can shift.
KILLED = """\
import os, signal, sys
from lorasweep.cli.app import main
from lorasweep.sweep.reporter import SweepReporter

tell = SweepReporter.evaluated

def evaluated(self, evaluation):
    verdict = tell(self, evaluation)
    if (evaluation.trial, evaluation.epoch) == (1, 2):  # so the first one is on the disk
        os.kill(os.getpid(), signal.SIGKILL)
    return verdict

SweepReporter.evaluated = evaluated
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_goes_on_in_the_midst_of_a_trial(small_sweep):
    """SIGKILL: whatever is on the disk at that moment must do."""
    words = ["run", str(small_sweep)]
    for override in (
        "engine=packed",
        "lanes=2",
        "search.trials=5",
        "search.space.epochs={choices: [3, 4]}",
        "search.sampler={kind: tpe, startup_trials: 1}",
        "search.pruner={kind: median, startup_trials: 2}",
    ):
        words += ["--set", override]
    documents = []
    for name in ("straight", "killed"):
        place = small_sweep.parent / name
        place.mkdir()
        if name == "killed":
            cut = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=place, check=False)
            assert cut.returncode == -signal.SIGKILL
            assert checkpoints(place)
        done = subprocess.run(
            [sys.executable, "-m", "lorasweep", *words],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert checkpoints(place) == []
        file = place / "mlruns/sweeps/small/report/fine_tuning_results.json"
        documents.append(json.loads(file.read_text(encoding="utf-8")))
    assert "trial 0001 was cut off" in done.stderr.lower()
    resumed = re.findall(r"goes on after step (\d+) of (\d+)", done.stderr)
    assert len(resumed) == 2
    assert all(0 < int(step) < int(steps) for step, steps in resumed)
    straight, killed = documents
    close_to(straight["final_performance"], killed["final_performance"])
    close_to(straight["comparisons"], killed["comparisons"])
    trials = [
        [
            (e["config"], e["state"], e["score"], e["best_epoch"])
            for e in document["hyperparameter_experiments"]
            if e["state"] != "interrupted"
        ]
        for document in documents
    ]
    by_place = sorted(trials[1], key=lambda entry: [e[0] for e in trials[0]].index(entry[0]))
    close_to(list(map(list, trials[0])), list(map(list, by_place)))


def test_a_point_is_repeated_with_other_seeds_and_schedules(small_sweep):
    text = small_sweep.read_text(encoding="utf-8")
    space = "{seed: {choices: [1, 2]}, scheduler: {choices: [linear, constant]}}"
    text = (
        f"{text[: text.index('search:')]}search: {{trials: 4, sampler: {{kind: grid}}, "
        f"pruner: {{kind: none}}, space: {space}}}\nbaselines: [majority]\n"
    )
    small_sweep.write_text(text, encoding="utf-8")
    spec = load_spec(small_sweep, ["engine=packed", "lanes=4"])
    result, report = run_sweep(spec)
    points = {(r.parameters["seed"], r.parameters["scheduler"]): r for r in result.records}
    assert sorted(points) == [(1, "constant"), (1, "linear"), (2, "constant"), (2, "linear")]
    assert len({record.seed for record in result.records}) == 4
    assert len({record.metrics["loss"] for record in result.records}) == 4
    paths = sweep_paths(spec.output, spec.name)
    tracker = MlflowTracker.open(paths.tracking_uri("sqlite"), spec.name, paths.mlflow_artifacts)
    trials = load_report(report.page.parent)["hyperparameter_experiments"]  # held to its schema
    for (seed, scheduler), record in points.items():
        params = tracker.client.get_run(record.run_id).data.params
        assert (params["seed"], params["scheduler"]) == (str(seed), scheduler)
        assert params["trial_seed"] == str(record.seed)
        config = trials[record.number]["config"]
        assert (config["seed"], config["scheduler"]) == (seed, scheduler)
