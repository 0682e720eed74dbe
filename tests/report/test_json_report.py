from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from lorasweep.core.engine_use import EngineUse
from lorasweep.core.errors import DataError
from lorasweep.core.outcomes import Predictions
from lorasweep.report.collect import collect
from lorasweep.report.json_report import SCHEMA_FILE, load_report, results, to_text

CASES: dict[str, dict[str, Any]] = {
    "two labels": {},
    "three labels": {"names": ("negative", "neutral", "positive"), "tagged": True},
    "one trial": {"trials": 1},
    "many trials": {"trials": 60},
    "no test split": {"test_rows": None},
    "no baselines": {"skills": {"finetuned": 0.9}},
    "perfect": {"skills": {"finetuned": 1.0, "untrained": 1.0}, "test_rows": 4},
    "several openings": {"openings": 3},
}


def validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA_FILE.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def document(sweep: Any) -> dict[str, Any]:
    file = "predictions.csv" if sweep.test else None

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = to_text(results(collect(sweep), file))
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_kind_of_sweep_fits_the_schema(make_sweep, case) -> None:  # type: ignore[no-untyped-def]
    errors = [error.message for error in validator().iter_errors(document(make_sweep(**case)))]
    assert errors == []


@pytest.mark.parametrize(
    "path",
    [
        ("project_info", "dataset_size", "test"),
        ("hyperparameter_experiments", 0, "config", "rank"),
        ("final_performance", "improvement"),
        ("comparisons", "tfidf", "mcnemar", "both_wrong"),
        ("provenance", "data_digests"),
        ("error_analysis", "all_errors"),
    ],
)
def test_the_schema_notices_what_is_missing(make_sweep, path) -> None:  # type: ignore[no-untyped-def]
    found = document(make_sweep())
    inner: Any = found
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    assert not validator().is_valid(found)


def test_the_schema_refuses_a_p_value_of_zero(make_sweep) -> None:  # type: ignore[no-untyped-def]
    found = document(make_sweep())
    found["comparisons"]["tfidf"]["mcnemar"]["p_value"] = 0
    assert not validator().is_valid(found)


def test_the_numbers_are_those_of_the_predictions(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    found = document(sweep)
    ours, theirs = sweep.test["finetuned"], sweep.test["untrained"]
    right, before = (one.predicted == one.labels for one in (ours, theirs))
    final = found["final_performance"]
    assert final["test_accuracy"] == pytest.approx(right.mean())
    assert final["baseline_name"] == "untrained"
    assert final["baseline_accuracy"] == pytest.approx(before.mean())
    assert final["improvement"]["accuracy"] == pytest.approx(right.mean() - before.mean())
    assert final["improvement"]["f1"] == pytest.approx(final["test_f1"] - final["baseline_f1"])
    assert final["strongest_baseline"] == "tfidf"
    assert np.sum(final["confusion_matrix"]) == 400
    assert np.trace(final["confusion_matrix"]) == right.sum()
    assert final["per_class"]["positive"]["support"] == (ours.labels == 1).sum()
    counts = found["comparisons"]["untrained"]["mcnemar"]
    assert counts["both_correct"] == (right & before).sum()
    assert counts["finetuned_only"] == (right & ~before).sum()
    assert counts["baseline_only"] == (~right & before).sum()
    assert counts["both_wrong"] == (~right & ~before).sum()
    assert counts["p_value"] <= counts["p_value_adjusted"] < 0.05
    assert set(found["comparisons"]) == {"untrained", "majority", "tfidf"}
    assert len(found["error_analysis"]["all_errors"]) == (~right).sum()


def test_a_config_is_whole_and_says_what_was_sampled(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep()
    first = document(sweep)["hyperparameter_experiments"][0]
    sampled = sweep.trials[0].parameters
    assert first["config"] == {
        "learning_rate": sampled["learning_rate"],
        "num_train_epochs": sampled["epochs"],
        "batch_size": 16,
        "rank": sampled["rank"],
        "alpha": sampled["alpha"],
        "dropout": 0.1,
        "targets": "auto",
        "scaling": sampled["alpha"] / sampled["rank"],
    }
    assert first["sampled"] == ["alpha", "epochs", "learning_rate", "rank"]
    assert document(sweep)["best_configuration"]["config"] == first["config"]
    fixed = replace(sweep.trials[0], parameters={})
    fixed_sweep = replace(sweep, trials=(fixed,), best=fixed)
    assert document(fixed_sweep)["hyperparameter_experiments"][0]["config"]["rank"] == 8


def test_trials_that_never_scored_have_nulls(make_sweep) -> None:  # type: ignore[no-untyped-def]
    failed = document(make_sweep())["hyperparameter_experiments"][4]
    assert failed["state"] == "failed"
    assert failed["final_metrics"] == {"accuracy": None, "f1": None, "loss": None}
    assert (failed["score"], failed["best_epoch"], failed["reason"]) == (
        None, None, "the loss is <NaN>",
    )  # fmt: skip


def test_without_a_test_split_nothing_is_claimed(make_sweep) -> None:  # type: ignore[no-untyped-def]
    found = document(make_sweep(test_rows=None))
    assert (
        found["final_performance"] is found["error_analysis"] is found["predictions_file"] is None
    )
    assert found["comparisons"] == {}
    assert "No test split was named" in found["conclusion"]


def test_two_runs_give_the_same_document_but_for_times_and_ids(make_sweep) -> None:  # type: ignore[no-untyped-def]
    one, two = make_sweep(), make_sweep()
    assert to_text(results(collect(one), "p")) == to_text(results(collect(two), "p"))
    later = tuple(replace(trial, seconds=trial.seconds * 3, run_id="other") for trial in one.trials)
    changed, before = document(replace(one, trials=later, best=later[0])), document(one)
    for found in (changed, before):
        found["best_configuration"].pop("mlflow_run_id")
        for trial in found["hyperparameter_experiments"]:
            del trial["training_time_seconds"], trial["mlflow_run_id"]
    assert changed == before


def test_numbers_that_are_not_finite_become_null(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(trials=1)
    trial = replace(sweep.trials[0], metrics={"accuracy": 0.5, "f1": math.nan, "loss": math.inf})
    sweep = replace(sweep, trials=(trial,), environment={"path": Path("x"), 3: np.float32(0.5)})
    found = document(sweep)
    assert found["hyperparameter_experiments"][0]["final_metrics"] == {
        "accuracy": 0.5, "f1": None, "loss": None,
    }  # fmt: skip
    assert found["environment"] == {"path": "x", "3": 0.5, "engine": []}
    assert validator().is_valid(found)


def test_how_each_command_trained_is_there(make_sweep) -> None:  # type: ignore[no-untyped-def]
    uses = (
        EngineUse("packed, 4 lanes", 7, 4, 0, 10**8, 50, 150, 50, 900, 1000, 40.0, 30.0),
        EngineUse("trainer (too few trials to train any at once)", 1, 1),
    )
    found = document(make_sweep(engine_uses=uses))
    assert validator().is_valid(found)
    packed, alone = found["environment"]["engine"]
    assert (packed["busy_share"], packed["real_token_share"]) == (0.75, 0.9)
    assert packed["step_time_share"] == 0.75
    assert (packed["trials_at_once"], packed["bytes_per_lane"]) == (3, 10**8)
    assert alone["engine"] == uses[1].engine
    assert alone["bytes_per_lane"] is alone["busy_share"] is None
    assert found["environment"]["git_commit"] == "0123abc"
    del packed["bytes_per_lane"]
    assert not validator().is_valid(found)


def test_an_underflowing_p_value_is_no_zero(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(test_rows=3000, skills={"finetuned": 1.0, "wrong": 0.5})
    labels = sweep.test["finetuned"].labels
    sure = np.eye(2)
    sweep = replace(
        sweep,
        test={
            "finetuned": replace(sweep.test["finetuned"], probabilities=sure[labels]),
            "wrong": Predictions("wrong", "test", sweep.corpus.test.ids, labels, sure[1 - labels]),
        },
    )
    found = document(sweep)
    assert 0 < found["comparisons"]["wrong"]["mcnemar"]["p_value"] < 1e-300
    assert "p < 1e-300" in found["conclusion"]


def test_a_report_is_read_back_and_others_are_refused(make_sweep, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = to_text(results(collect(make_sweep()), "predictions.csv"))
    file = tmp_path / "fine_tuning_results.json"
    file.write_text(text, encoding="utf-8")
    assert load_report(tmp_path) == load_report(file) == json.loads(text)
    file.write_text('{"schema_version": "0.1"}')
    with pytest.raises(DataError, match=r"expected schema_version 1\.0, got 0\.1"):
        load_report(file)
    file.write_text("[]")
    with pytest.raises(DataError, match="got None"):
        load_report(file)
    file.write_text("{")
    with pytest.raises(DataError, match="no report that can be read"):
        load_report(file)
