from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.core.errors import DataError
from lorasweep.core.outcomes import Predictions
from lorasweep.evaluation.predictions import read_predictions, write_predictions

NAMES = ("nega,tive", 'posi"tive', "null")
NASTY = (
    'a "quoted" word', "two\nlines", "lone\rreturn", "crlf\r\nend", "nan", "NA", "null", "",
    " spaces ", "comma, semicolon; tab\t", "'", '"', "😀 żółć 你好", "\ufeffbom", "=1+1", "#", "\\",
)  # fmt: skip


def predictions(model: str, rows: int, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    likely = generator.dirichlet(np.ones(3) * 0.1, rows)
    ids = tuple(f"file.csv:{row + 1}" for row in range(rows))
    return Predictions(model, "test", ids, generator.integers(0, 3, rows), likely)


def equal(one: Predictions, other: Predictions) -> bool:
    return (
        (one.model, one.split, one.ids) == (other.model, other.split, other.ids)
        and np.array_equal(one.labels, other.labels)
        and np.array_equal(one.probabilities, other.probabilities)
    )


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    models = [predictions("finetuned", len(NASTY)), predictions("tfidf", len(NASTY), 1)]
    path = write_predictions(tmp_path / "sub" / "predictions.csv", models, NASTY, NAMES)
    read, texts = read_predictions(path, NAMES)
    assert texts == NASTY
    assert len(read) == 2
    assert all(map(equal, read, models))
    assert [file.name for file in path.parent.iterdir()] == ["predictions.csv"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "predictions.csv"
    write_predictions(path, [predictions("finetuned", len(texts))], texts, NAMES)
    assert read_predictions(path, NAMES)[1] == tuple(texts)


def test_the_columns_are_the_issues_and_plain_readers_agree(tmp_path: Path) -> None:
    model = predictions("finetuned", len(NASTY))
    path = write_predictions(tmp_path / "p.csv", [model], NASTY, NAMES)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    columns = ["model", "id", "text", "label", "predicted", *[f"p_{name}" for name in NAMES]]
    assert rows[0] == columns
    assert [row[2] for row in rows[1:]] == list(NASTY)
    assert [row[4] for row in rows[1:]] == [NAMES[said] for said in model.predicted]
    table = pd.read_csv(path, keep_default_na=False)
    assert table[columns[5:]].sum(axis=1).to_numpy() == pytest.approx(1)


def test_a_lone_surrogate_does_not_lose_the_file(tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "p.csv", [predictions("m", 1)], ["a\ud800"], NAMES)
    assert read_predictions(path, NAMES)[1] == ("a\\ud800",)


def test_a_failed_write_keeps_the_old_table(tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "p.csv", [predictions("m", 2)], ["a", "b"], NAMES)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_predictions(path, [predictions("m", 2)], ["a"], NAMES)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no table"),
        ("a,b\n1,2\n", "expected the columns"),
        ("model,id,text,label,predicted,p_x\nm,1,t,zzz,x,1.0\n", "unknown labels zzz"),
    ],
)
def test_other_files_are_refused_with_a_sentence(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "other.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_predictions(path, ("x",))
    with pytest.raises(DataError, match="no table"):
        read_predictions(tmp_path / "absent.csv", ("x",))
