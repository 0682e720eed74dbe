"""Predictions as a table: one row per test row and model, in CSV that anything can read."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lorasweep.core.errors import DataError, Problem
from lorasweep.core.outcomes import Predictions

COLUMNS = ("model", "id", "text", "label", "predicted")


def probability_columns(label_names: Sequence[str]) -> tuple[str, ...]:
    """Return one column name per label; label names are distinct, and no other column has ``p_``.

    >>> probability_columns(("negative", "positive"))
    ('p_negative', 'p_positive')
    """
    return tuple(f"p_{name}" for name in label_names)


def write_predictions(
    path: Path, models: Iterable[Predictions], texts: Sequence[str], label_names: Sequence[str]
) -> Path:
    """Write a table of predictions; a reader sees the old file or the whole new one.

    Texts are written as they are: quoted, with their newlines and carriage returns.
    Probabilities keep all their digits.

    Args:
        path: The CSV to write.
        models: Predictions of each model on the same rows.
        texts: The rows' texts.
        label_names: In order of index.

    Raises:
        ValueError: A model has another number of rows than there are texts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A lone surrogate can't be encoded; it is written escaped rather than losing the file.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            # All texts are quoted: minimal quoting leaves a lone CR bare, which ends a row.
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow([*COLUMNS, *probability_columns(label_names)])
            for one in models:
                truth = [label_names[label] for label in one.labels]
                said = [label_names[label] for label in one.predicted]
                likely = one.probabilities.tolist()
                for row in zip(one.ids, texts, truth, said, likely, strict=True):
                    writer.writerow([one.model, *row[:4], *row[4]])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_predictions(
    path: Path, label_names: Sequence[str], split: str = "test"
) -> tuple[tuple[Predictions, ...], tuple[str, ...]]:
    """Read what :func:`write_predictions` wrote: the predictions of each model, and the texts.

    Raises:
        DataError: The file isn't such a table for these labels.
    """
    expected = [*COLUMNS, *probability_columns(label_names)]
    try:
        # Text stays text: the words nan and null are no missing values.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(Problem(str(path), f"is no table of predictions ({error})")) from error
    if list(table.columns) != expected:
        what = f"expected the columns {', '.join(expected)}, got {', '.join(table.columns)}"
        raise DataError(Problem(str(path), what))
    index = {name: place for place, name in enumerate(label_names)}
    found = []
    texts: tuple[str, ...] = ()
    for model, rows in table.groupby("model", sort=False):
        strange = sorted(set(rows["label"]) - set(index))
        if strange:
            raise DataError(Problem(str(path), f"unknown labels {', '.join(strange)}"))
        texts = tuple(rows["text"])
        found.append(
            Predictions(
                model=str(model),
                split=split,
                ids=tuple(rows["id"]),
                labels=np.array([index[name] for name in rows["label"]], dtype=np.int64),
                # NumPy's parser gives every digit back; pandas' default does not.
                probabilities=rows[expected[len(COLUMNS) :]].to_numpy(str).astype(np.float64),
            )
        )
    return tuple(found), texts
