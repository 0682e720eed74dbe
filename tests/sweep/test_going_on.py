"""The same command again: after a cut, for more trials, and with nothing left to do."""

import pytest

from lorasweep import load_report, load_spec, run_sweep
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths
from lorasweep.search.study import Study
from lorasweep.sweep.events import TrialEnded, TrialEvaluated, TrialStarted


@pytest.mark.parametrize(
    "moment",
    [
        lambda e: isinstance(e, TrialStarted) and e.number == 1,
        lambda e: isinstance(e, TrialEvaluated) and e.number == 1,
        lambda e: isinstance(e, TrialEnded) and e.record.number == 1,
    ],
    ids=["as a trial starts", "after an epoch", "between two trials"],
)
def test_a_sweep_cut_off_anywhere_ends_like_one_that_was_not(
    small_sweep, monkeypatch, moment, hear, runs_by_name
):
    straight, _ = run_sweep(small_sweep, report=False)
    place = small_sweep.parent / "cut"
    place.mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(small_sweep, listener=hear(stop_at=moment), report=False)
    spec = load_spec(small_sweep)
    assert runs_by_name(spec)["small"].info.status == "KILLED"
    study = Study.peek(sweep_paths(spec.output, spec.name).optuna_database, spec.name)
    assert not [r for r in study.records() if r.state is TrialState.RUNNING]

    resumed, _ = run_sweep(small_sweep, report=False)
    counted = [r for r in resumed.records if r.state is not TrialState.INTERRUPTED]
    assert [r.parameters for r in counted] == [r.parameters for r in straight.records]
    assert [r.score for r in counted] == [r.score for r in straight.records]
    assert resumed.finished
    statuses = {name: run.info.status for name, run in runs_by_name(spec).items()}
    assert statuses.pop("small") == "FINISHED"
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    assert list(statuses.values()).count("FINISHED") == 3


def test_running_again_changes_nothing_and_opens_nothing(
    small_sweep, open_tracker, without_times_and_ids
):
    _, first = run_sweep(small_sweep)
    result, second = run_sweep(small_sweep)
    assert len(result.records) == 3
    assert len(second.finished.openings) == 1
    assert without_times_and_ids(load_report(second.page.parent)) == without_times_and_ids(
        load_report(first.page.parent)
    )
    spec = load_spec(small_sweep)
    versions = open_tracker(spec).client.search_model_versions("name = 'small'")
    assert len(list(versions)) == 1


def test_more_trials_go_on_from_those_there_are(small_sweep):
    one, _ = run_sweep(small_sweep, ["search.trials=1"], report=False)
    three, _ = run_sweep(small_sweep, report=False)
    assert three.records[0] == one.records[0]
    assert len(three.records) == 3


def test_a_time_limit_stops_between_trials_and_the_next_command_goes_on(small_sweep):
    result, report = run_sweep(small_sweep, ["search.timeout_minutes=1e-9"])
    assert (result.finished, report) == (False, None)
    result, report = run_sweep(small_sweep)
    assert result.finished
    assert report is not None
