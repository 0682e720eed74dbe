"""Whichever engine trains, users see the same of each trial, and what the engine did."""

import json
import re
from pathlib import Path

import pytest
import torch

from lorasweep import load_report, load_spec, run_sweep
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths
from lorasweep.model.packed_lora import PackedModel
from lorasweep.sweep.engine_ledger import kept
from lorasweep.sweep.events import LanesShrank, Said, SweepStarted, TrialEvaluated
from lorasweep.tracking.mlflow_tracker import MlflowTracker

POINTS = """\
search:
  trials: 4
  pruner: {kind: none}
  sampler:
    kind: points
    points:
      - {learning_rate: 0.01, epochs: 1, rank: 2}
      - {learning_rate: 0.02, epochs: 2, rank: 4}
      - {learning_rate: 1, epochs: 2, rank: 2, alpha: 1000000, weight_decay: 1000}
      - {learning_rate: 0.015, epochs: 2, rank: 4, warmup: 0.3}
"""


@pytest.fixture
def four_points(small_sweep):
    """The third of them diverges."""
    text = small_sweep.read_text(encoding="utf-8")
    head = text[: text.index("search:")].replace("training: {", "training: {scheduler: constant, ")
    small_sweep.write_text(head + POINTS, encoding="utf-8")
    return small_sweep


def runs_of(spec):
    paths = sweep_paths(spec.output, spec.name)
    tracker = MlflowTracker.open(paths.tracking_uri("sqlite"), spec.name, paths.mlflow_artifacts)
    found = tracker.client.search_runs([tracker.experiment_id])
    return tracker, {run.info.run_name: run for run in found}


def steps_of(tracker, run):
    history = tracker.client.get_metric_history
    return {key: [one.step for one in history(run.info.run_id, key)] for key in run.data.metrics}


def test_a_trials_run_has_the_same_keys_and_steps_with_either_engine(four_points, monkeypatch):
    shown = {}
    for engine in ("trainer", "packed"):
        place = four_points.parent / engine
        place.mkdir()
        monkeypatch.chdir(place)
        spec = load_spec(four_points, [f"engine={engine}", "lanes=2"])
        result, _ = run_sweep(spec, report=False)
        assert [r.state for r in result.records].count(TrialState.FAILED) == 1
        tracker, runs = runs_of(spec)
        shown[engine] = {
            name: {
                "params": set(run.data.params),
                "tags": set(run.data.tags),
                "status": run.info.status,
                "steps": steps_of(tracker, run),
                "files": {
                    file.path for file in tracker.client.list_artifacts(run.info.run_id)
                },
            }
            for name, run in runs.items()
            if name != "small"
        }  # fmt: skip
    assert sorted(shown["packed"]) == ["0000", "0001", "0002", "0003"]
    # When a trial diverged is said at its own step; the packed engine looks at every loss.
    failed = [shown[engine].pop("0002") for engine in shown]
    assert failed[0]["status"] == failed[1]["status"] == "FAILED"
    assert failed[0]["tags"] == failed[1]["tags"]
    assert failed[0]["params"] == failed[1]["params"]
    assert "reason.txt" in failed[0]["files"] & failed[1]["files"]
    for name, run in shown["packed"].items():
        assert run == shown["trainer"][name]
        assert {"train_loss", "learning_rate", "grad_norm", "val_f1", "seconds"} <= set(
            run["steps"]
        )


def test_what_the_pack_did_reaches_console_run_results_and_page(four_points):
    events = []
    spec = load_spec(four_points, ["engine=packed", "lanes=2"])
    _, report = run_sweep(spec, listener=events.append)
    (started,) = (event for event in events if isinstance(event, SweepStarted))
    assert re.fullmatch(r"packed, 2 lanes, about \d+(\.\d)? MiB each", started.engine)
    said = [event.message for event in events if isinstance(event, Said)]
    assert sum(message.startswith("The pack trained") for message in said) == 1

    (use,) = kept(sweep_paths(spec.output, spec.name).engine)
    assert (use.engine, use.trials, use.lanes, use.halvings) == (started.engine, 4, 2, 0)
    assert use.bytes_per_lane > 10_000
    _, runs = runs_of(spec)
    parent = runs["small"].data.metrics
    assert parent["engine/bytes_per_lane"] == use.bytes_per_lane
    assert parent["engine/busy_share"] == use.busy_share
    assert parent["engine/real_token_share"] == pytest.approx(use.real_share)
    assert parent["engine/step_time_share"] == pytest.approx(use.step_time_share)
    assert 0 < use.step_time_share < 1
    assert runs["0000"].data.tags["lorasweep.engine"] == started.engine

    (written,) = load_report(report.page.parent)["environment"]["engine"]
    assert written["bytes_per_lane"] == use.bytes_per_lane
    assert written["busy_share"] == use.busy_share
    page = report.page.read_text(encoding="utf-8")
    assert "How the trials were trained" in page
    assert started.engine in page


def test_each_command_that_trained_is_kept_and_no_other(four_points):
    def cut(event):
        if isinstance(event, TrialEvaluated) and event.number == 1:
            raise KeyboardInterrupt

    spec = load_spec(four_points, ["engine=packed", "lanes=2"])
    ledger = sweep_paths(spec.output, spec.name).engine
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, listener=cut, report=False)
    assert [use.trials for use in kept(ledger)] == [2]
    run_sweep(spec, report=False)
    begun = [use.trials for use in kept(ledger)]
    assert len(begun) == 2
    assert sum(begun) >= 4
    run_sweep(spec, report=False)  # nothing is left to train
    assert [use.trials for use in kept(ledger)] == begun
    assert all(json.loads(line) for line in ledger.read_text().splitlines())


def test_whoever_listens_is_told_that_there_are_fewer_lanes(four_points, monkeypatch):
    forward, events, calls = PackedModel.forward, [], []

    def once_full(self, batch, *, training):
        if self.lanes == 2 and training:
            calls.append(batch)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, training=training)

    monkeypatch.setattr(PackedModel, "forward", once_full)
    spec = load_spec(four_points, ["engine=packed", "lanes=2"])
    result, _ = run_sweep(spec, listener=events.append, report=False)
    assert [e for e in events if isinstance(e, LanesShrank)] == [LanesShrank(1, "out of memory")]
    states = [record.state.value for record in result.records]
    assert states == ["completed", "completed", "failed", "completed"]
    (use,) = kept(sweep_paths(spec.output, spec.name).engine)
    assert (use.lanes, use.halvings) == (1, 1)


def test_a_trials_own_error_in_a_step_of_the_pack_is_kept_with_its_traceback(
    four_points, monkeypatch
):
    forward = PackedModel.forward

    def odd(self, batch, *, training):
        second = (batch.row_spans.lane + batch.lanes.start == 1).any()
        if training and self.lanes == 2 and second:
            raise ZeroDivisionError("nothing to divide by")
        return forward(self, batch, training=training)

    monkeypatch.setattr(PackedModel, "forward", odd)
    spec = load_spec(four_points, ["engine=packed", "lanes=2", "search.trials=2"])
    result, _ = run_sweep(spec, report=False)
    first, second = result.records
    assert first.state is TrialState.COMPLETED
    assert (second.state, second.reason) == (
        TrialState.FAILED,
        "ZeroDivisionError: nothing to divide by",
    )
    tracker, _ = runs_of(spec)
    client, run = tracker.client, second.run_id
    assert client.get_run(run).info.status == "FAILED"
    text = Path(client.download_artifacts(run, "traceback.txt")).read_text(encoding="utf-8")
    assert text.count("Traceback") == 1
    assert text.rstrip().endswith("ZeroDivisionError: nothing to divide by")
