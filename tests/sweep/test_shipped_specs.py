"""Every spec in sweeps/ is valid, and runs: cut small, on stand-ins of the same layout.

A Hub id is first looked for as a folder below the current one, so a folder called
``nyu-mll/glue`` (with parquet files, as the Hub has them) and one called
``distilbert-base-uncased`` take the place of the real ones, and the specs stay as they are.
"""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from lorasweep import load_report, load_spec, run_sweep
from lorasweep.core.outcomes import TrialState
from lorasweep.data.embedded import generate_reviews

SPECS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
PROMISED = {
    "quickstart",
    "sst2-minilm",
    "sst2-distilbert",
    "sst2-three-configs",
    "imdb-distilbert",
    "three-class",
    "custom-csv",
}


def test_the_promised_specs_are_there():
    assert {path.stem for path in SPECS} == PROMISED


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_is_valid_and_bears_its_files_name(path):
    spec = load_spec(path, environment={"LORASWEEP_DATA": "/data"})
    assert spec.name == path.stem


def _hub_dataset(folder: Path, config: str, frames: dict[str, pd.DataFrame]) -> None:
    """Write a data set as a Hub repository holds it: parquet files and a card that names them."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    (folder / config).mkdir(parents=True)
    for split, frame in frames.items():
        name = f"{config}/{split}-00000-of-00001.parquet"
        frame.to_parquet(folder / name)
        lines += [f"  - split: {split}", f"    path: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


@pytest.fixture
def stand_ins(tmp_path, tiny_base_folder, monkeypatch) -> None:
    """Make the current folder hold all that the shipped specs name."""
    reviews = generate_reviews(400, 1)
    train, test = (
        pd.DataFrame({"text": [r.text for r in part], "label": [r.label for r in part]})
        for part in (reviews.train, reviews.test)
    )
    data = tmp_path / "data"
    (data / "sst2").mkdir(parents=True)
    (data / "three_class").mkdir()
    train.to_csv(data / "train.csv", index=False)
    train.to_csv(data / "sst2/sentences_train.csv", index=False)
    test.to_csv(data / "sst2/sentences_validation.csv", index=False)
    names = ["negative", "neutral", "positive"]
    for name, frame in (("train", train), ("test", test)):
        labels = [names[at % 3] for at in range(len(frame))]
        tweets = frame.assign(label=labels)
        tweets.to_csv(data / f"three_class/tse_tweets_{name}.csv", index=False)
    phrases = {"text": "sentence"}
    _hub_dataset(
        tmp_path / "nyu-mll/glue",
        "sst2",
        {"train": train.rename(columns=phrases), "validation": test.rename(columns=phrases)},
    )
    _hub_dataset(tmp_path / "stanfordnlp/imdb", "plain_text", {"train": train, "test": test})
    shutil.copytree(tiny_base_folder("distilbert"), tmp_path / "distilbert-base-uncased")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASWEEP_DATA", str(data))


CUT = [
    "data.limit={train: 96, validation: 40, test: 40}",
    "model.max_length=64",
]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_runs_to_its_report(path, stand_ins):
    spec = load_spec(path, CUT)
    points = spec.search.sampler.points
    cut = [*CUT, f"search.trials={len(points) if points else 1}"]
    if points is None:
        cut.append("search.space.epochs={choices: [1]}")
    result, report = run_sweep(path, cut)
    assert {record.state for record in result.records} <= {
        TrialState.COMPLETED,
        TrialState.PRUNED,
    }
    results = load_report(report.page.parent)
    assert set(results["comparisons"]) == set(spec.baselines)
    for figure in ("hyperparameter_comparison", "confusion_matrix", "before_after"):
        assert (report.page.parent / f"{figure}.png").stat().st_size > 1000


def test_the_three_configurations_are_the_promised_ones():
    spec = load_spec(next(path for path in SPECS if path.stem == "sst2-three-configs"))
    found = [(p["learning_rate"], p["epochs"]) for p in spec.search.sampler.points]
    assert found == [(2e-5, 3), (3e-5, 3), (5e-5, 2)]
    assert (spec.training.batch_size, spec.training.weight_decay) == (16, 0.01)
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout) == (8, 32, 0.1)
    assert "untrained" in spec.baselines


def test_the_imdb_spec_keeps_the_seeds_numbers():
    spec = load_spec(next(path for path in SPECS if path.stem == "imdb-distilbert"))
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout) == (8, 32, 0.1)
    assert spec.lora.targets == ("q_lin", "v_lin")
    assert (spec.training.epochs, spec.training.batch_size) == (3, 8)
    assert {"learning_rate": 5e-5} in spec.search.sampler.points
    assert None not in (spec.data.limit.train, spec.data.limit.validation, spec.data.limit.test)
