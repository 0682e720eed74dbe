"""The shipped SST-2 spec on the real sentences: one epoch is enough to beat what counts words."""

from pathlib import Path

from lorasweep import load_report, run_sweep

SPEC = Path(__file__).parents[2] / "sweeps/sst2-minilm.yaml"


def test_one_epoch_on_real_sentences_generalises(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASWEEP_DATA", str(real_data))
    point = "{learning_rate: 1.5e-3, epochs: 1, rank: 8, alpha: 8}"
    overrides = [
        "search.trials=1",
        f"search.sampler={{kind: points, points: [{point}]}}",
        "search.space={}",
        "baselines=[untrained, tfidf]",
    ]
    _, report = run_sweep(SPEC, overrides)
    results = load_report(report.page.parent)
    assert results["project_info"]["dataset_size"]["test"] == 872
    performance = results["final_performance"]
    # A whole sweep reaches 0.86; a single epoch of one point, a few points less.
    assert performance["test_accuracy"] >= 0.83
    assert performance["test_accuracy"] > results["comparisons"]["tfidf"]["accuracy"]
    assert results["comparisons"]["untrained"]["mcnemar"]["p_value"] < 1e-20
    leaked = {leak["held_out"]: leak["share"] for leak in results["data"]["leakage"]}
    assert leaked["validation"] == 0
    assert leaked["test"] <= 0.01
