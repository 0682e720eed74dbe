"""What a sweep refuses before it begins, and what it says of trials that failed."""

import pytest

from lorasweep import load_spec, report_sweep, run_sweep
from lorasweep.core.errors import ConflictError, InputError, NothingToReportError
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths


def test_overrides_of_a_loaded_spec_are_refused_and_not_dropped(small_sweep):
    with pytest.raises(InputError, match="load_spec"):
        run_sweep(load_spec(small_sweep), ["search.trials=1"])


def test_a_changed_spec_under_the_same_name_is_refused(small_sweep):
    run_sweep(small_sweep, ["search.trials=1"], report=False)
    with pytest.raises(ConflictError, match=r"training\.batch_size"):
        run_sweep(small_sweep, ["training.batch_size=4"])
    with pytest.raises(ConflictError, match="data"):
        run_sweep(small_sweep, ["data.limit.train=40"])


def test_a_sweep_held_by_another_process_is_refused(small_sweep):
    from filelock import FileLock

    paths = sweep_paths("mlruns", "small")
    paths.sweep.mkdir(parents=True)
    with FileLock(paths.lock), pytest.raises(ConflictError, match="is being worked on"):
        run_sweep(small_sweep)


def test_bad_data_and_a_bad_model_are_told_together_before_anything_is_made(small_sweep):
    overrides = ["data.text=nope", "model.name=./nowhere"]
    with pytest.raises(InputError) as caught:
        run_sweep(small_sweep, overrides)
    told = str(caught.value)
    assert "nope" in told
    assert "nowhere" in told
    assert not (small_sweep.parent / "mlruns/optuna.db").exists()
    assert not (small_sweep.parent / "mlruns/mlflow.db").exists()


def test_a_report_without_a_run_says_so(small_sweep):
    with pytest.raises(NothingToReportError, match="has not been run"):
        report_sweep(small_sweep)
    assert not (small_sweep.parent / "mlruns").exists()


def test_a_diverging_trial_fails_alone_and_says_why(small_sweep, runs_by_name):
    # A decay of 1000 at rate 1 multiplies every weight by -999 a step, until it overflows.
    points = "[{learning_rate: 0.01}, {learning_rate: 1.0, weight_decay: 1000}, {rank: 2}]"
    text = small_sweep.read_text(encoding="utf-8")
    text = text[: text.index("search:")] + "training: {epochs: 3, precision: fp32}\n"
    text = text.replace("training: {batch_size: 8, precision: fp32, log_every: 5}\n", "")
    text += f"search: {{trials: 3, sampler: {{kind: points, points: {points}}}}}\n"
    small_sweep.write_text(text, encoding="utf-8")
    result, _ = run_sweep(small_sweep, report=False)
    assert [r.state for r in result.records] == [
        TrialState.COMPLETED,
        TrialState.FAILED,
        TrialState.COMPLETED,
    ]
    assert "step" in result.records[1].reason
    runs = runs_by_name(load_spec(small_sweep))
    assert [runs[f"000{n}"].info.status for n in range(3)] == ["FINISHED", "FAILED", "FINISHED"]


def test_a_sweep_of_which_every_trial_failed_says_the_last_reason(small_sweep, runs_by_name):
    points = "[{learning_rate: 1.0, weight_decay: 1000}]"
    text = small_sweep.read_text(encoding="utf-8")
    text = text[: text.index("search:")]
    text += f"search: {{trials: 1, sampler: {{kind: points, points: {points}}}}}\n"
    small_sweep.write_text(text, encoding="utf-8")
    with pytest.raises(NothingToReportError, match=r"None of the trials.*step"):
        run_sweep(small_sweep)
    assert runs_by_name(load_spec(small_sweep))["small"].info.status == "FAILED"
