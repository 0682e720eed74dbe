"""What `make sweep` left behind: CI runs it before the tests, a developer may have."""

import os

import pytest

from lorasweep import load_report, load_spec

NEEDED_LEAD = 0.08


@pytest.fixture(scope="module")
def results(pytestconfig):
    folder = pytestconfig.rootpath / "mlruns/sweeps/quickstart/report"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must run `make sweep` before the tests; {folder} isn't there")
        pytest.skip("`make sweep` has not been run here")
    return load_report(folder)


def test_counting_words_stays_well_below_the_winner(results):
    winner = results["final_performance"]["test_accuracy"]
    assert winner - results["comparisons"]["tfidf"]["accuracy"] >= NEEDED_LEAD
    assert winner >= 0.85


def test_the_lead_is_not_luck(results):
    for comparison in results["comparisons"].values():
        assert comparison["mcnemar"]["p_value"] < 1e-6


def test_every_trial_of_the_spec_is_there(results, pytestconfig):
    spec = load_spec(pytestconfig.rootpath / "sweeps/quickstart.yaml")
    counted = [t for t in results["hyperparameter_experiments"] if t["state"] != "interrupted"]
    assert len(counted) == spec.search.trials == 6
    assert all(trial["mlflow_run_id"] for trial in counted)
