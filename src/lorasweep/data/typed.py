"""Tables whose columns carry types: Parquet files, and whatever ``load_dataset`` returns."""

from __future__ import annotations

from pathlib import Path

import datasets

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.tables import RawTable, located, missing_column, refuse, throw_away_cache


def read_parquet(origin: str, path: Path, text: str, label: str) -> RawTable:
    """Read Parquet, whose cells carry their own types."""
    with throw_away_cache() as cache:
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise DataError(Problem(origin, f"can't be read as Parquet: {reason}")) from error
        return typed_table(table, origin, path.stem, text, label)


def typed_table(table: datasets.Dataset, origin: str, stem: str, text: str, label: str) -> RawTable:
    """Take the two columns of a data set whose columns have types.

    Raises:
        DataError: A column is missing, a text isn't text, or there are no rows.
    """
    refuse(
        [
            missing_column(origin, key, column, table.column_names)
            for key, column in (("text", text), ("label", label))
            if column not in table.column_names
        ]
    )
    problems = []
    if not len(table):
        problems.append(Problem(origin, "has no rows"))
    kind = table.features[text]
    if not (isinstance(kind, datasets.Value) and "string" in kind.dtype):
        shown = getattr(kind, "dtype", None) or type(kind).__name__
        what = f"the column {text!r} holds {shown}, expected text"
        problems.append(Problem(origin, what, "Name the column of the texts in data.text."))
    named = table.features[label]
    plain = isinstance(named, datasets.Value) and named.dtype.startswith(
        ("string", "large_string", "bool", "int", "uint", "float")
    )
    if not (plain or isinstance(named, datasets.ClassLabel)):
        what = f"the column {label!r} holds {type(named).__name__}, expected one label a text"
        problems.append(Problem(origin, what, "Name the column of the labels in data.label."))
    refuse(problems)
    texts, labels = table[text][:], table[label][:]
    null = [row + 1 for row, value in enumerate(texts) if value is None]
    if null:
        what = f"{len(null)} text{'s' * (len(null) > 1)} of column {text!r} missing ({{places}})"
        advice = (
            "If the words nan, null or NA are meant, read the CSV itself with kind: files, "
            "which keeps them."
        )
        refuse([located(origin, "row", null, what, advice)])
    class_names = None
    if isinstance(named, datasets.ClassLabel):
        class_names = tuple(named.names)
        labels = [None if value in (None, -1) else value for value in labels]  # -1: unlabelled
    places = tuple(range(1, len(texts) + 1))
    return RawTable(origin, stem, "row", places, tuple(texts), tuple(labels), class_names)
