"""CSV and TSV: a strict look of our own, then `datasets` loads.

Neither `datasets` nor pandas says on which line a file goes wrong; both pad short rows, read
``nan`` as missing and let one stray quote swallow a hundred lines. So the file is first walked
through with the standard library, which finds every fault with its line; then
``Dataset.from_csv`` loads, told to leave every cell as it is written.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.tables import RawTable, located, missing_column, refuse, throw_away_cache


@contextmanager
def _any_field_size() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a field, and put it back."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows_with_lines(
    origin: str, content: str, delimiter: str
) -> tuple[list[tuple[int, list[str]]], list[Problem]]:
    """Split strictly into ``(line on which the row begins, its fields)``, and tell bad quotes."""
    rows: list[tuple[int, list[str]]] = []
    problems = []
    with _any_field_size():
        # newline="" splits lines at \n, \r\n and a lone \r, and translates none of them.
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        while True:
            begin = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error:
                swallowed = reader.line_num - begin
                what = "the row that begins here has an unbalanced quote"
                if swallowed > 0:
                    what += f" that swallows the lines up to {reader.line_num}"
                advice = 'Close it, and write a quote inside a quoted field twice ("").'
                problems.append(located(origin, "line", [begin], what, advice))
                continue
            if fields:
                rows.append((begin, fields))
    return rows, problems


def _ragged(origin: str, rows: Sequence[tuple[int, list[str]]], width: int) -> list[Problem]:
    """Tell rows with more or fewer fields than the header."""
    problems = []
    for kind, advice, wrong in (
        ("fewer", "Add the missing fields.", [r for r in rows if len(r[1]) < width]),
        ("more", "Quote fields that hold the separator.", [r for r in rows if len(r[1]) > width]),
    ):
        if wrong:
            what = (
                f"{len(wrong)} row{'s' * (len(wrong) > 1)} with {kind} fields than the header's "
                f"{width} ({{places}}; the first has {len(wrong[0][1])})"
            )
            problems.append(located(origin, "line", [line for line, _ in wrong], what, advice))
    return problems


def read_separated(
    origin: str, path: Path, content: str, text: str, label: str, delimiter: str
) -> RawTable:
    """Read CSV or TSV: rows are checked here, and loaded by `datasets` as plain strings."""
    rows, problems = _rows_with_lines(origin, content, delimiter)
    if not rows:
        raise DataError(problems)
    header_line, header = rows[0]
    body = rows[1:]
    for key, column in (("text", text), ("label", label)):
        if column not in header:
            problems.append(missing_column(origin, key, column, header, header_line))
            other = next(
                (mark for mark in ";\t|," if mark != delimiter and mark in header[0]), None
            )
            if len(header) == 1 and other:
                what = f"the header has no {delimiter!r}, but {other!r}"
                advice = "Separate a .csv by commas and a .tsv by tabs."
                raise DataError(located(origin, "line", [header_line], what, advice))
        elif header.count(column) > 1:
            what = f"the header names the {key} column {column!r} {header.count(column)} times"
            problems.append(located(origin, "line", [header_line], what, "Rename the others."))
    problems += _ragged(origin, body, len(header))
    if not body and not problems:
        problems.append(Problem(origin, "has a header but no rows"))
    refuse(problems)
    with throw_away_cache() as cache:
        table = datasets.Dataset.from_csv(
            str(path),
            features=datasets.Features(
                {text: datasets.Value("string"), label: datasets.Value("string")}
            ),
            cache_dir=cache,
            sep=delimiter,
            usecols=[text, label],
            index_col=False,
            na_filter=False,
            encoding="utf-8-sig",
        )
        texts, labels = table[text][:], table[label][:]
    at = header.index(text), header.index(label)
    if [(f[at[0]], f[at[1]]) for _, f in body] != list(zip(texts, labels, strict=True)):
        raise DataError(
            Problem(origin, "is read differently by two CSV readers", "Save it as JSON lines.")
        )
    places = tuple(line for line, _ in body)
    return RawTable(origin, path.stem, "line", places, tuple(texts), tuple(labels))
