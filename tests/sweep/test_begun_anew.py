"""A study that was deleted and begun anew under its name isn't taken for the one that was."""

import json

import optuna

from lorasweep import load_report, report_sweep, run_sweep
from lorasweep.core.paths import sweep_paths
from lorasweep.sweep.events import Warned


def test_a_winner_of_the_same_number_is_another_winner(small_sweep, hear):
    _, first = run_sweep(small_sweep, ["search.trials=1"])
    assert "study" not in first.finished.openings[0]
    optuna.delete_study(study_name="small", storage="sqlite:///mlruns/optuna.db")
    heard = hear()
    _, second = run_sweep(small_sweep, ["search.trials=1", "training.batch_size=4"], listener=heard)
    assert [(one["study"], one["trial"]) for one in second.finished.openings] == [(1, 0), (2, 0)]
    reason = "the winner changed from trial 0 of a study that was deleted"
    assert second.finished.openings[1]["reason"] == reason
    assert any("another winner" in warning.message for warning in heard.of(Warned))
    document = load_report(second.page.parent)
    assert any("for 2 different winners" in caution for caution in document["cautions"])
    assert len(document["environment"]["engine"]) == 1


def test_ledgers_of_a_version_that_named_no_study_count_as_before(small_sweep):
    run_sweep(small_sweep, ["search.trials=1"])
    paths = sweep_paths("mlruns", "small")
    for ledger in (paths.test / "ledger.jsonl", paths.engine):
        (line,) = map(json.loads, ledger.read_text(encoding="utf-8").splitlines())
        assert line.pop("study")
        ledger.write_text(json.dumps(line) + "\n", encoding="utf-8")
    for opened in (2, 3):
        (paths.test / "finetuned.npz").unlink()
        report = report_sweep(small_sweep, ["search.trials=1"])
        found = report.finished
        assert [(one["trial"], one.get("study")) for one in found.openings] == [(0, None)] * opened
        assert found.openings[-1]["reason"].startswith("the same winner again")
        assert len(found.engine_uses) == 1
        cautions = " ".join(load_report(report.page.parent)["cautions"])
        assert f"opened {opened} times, always for the same winner" in cautions
