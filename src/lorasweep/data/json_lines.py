"""JSON lines: `datasets` loads the lines, each of them is parsed here.

Its own JSON loader (Arrow's) turns strings that look like dates into timestamps, guesses a
column's type block by block, and doesn't say on which line a file goes wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.tables import (
    LabelValue,
    RawTable,
    located,
    missing_column,
    refuse,
    throw_away_cache,
)


def read_json_lines(origin: str, path: Path, content: str, text: str, label: str) -> RawTable:
    """Read JSON lines, texts and labels with the types that they are written in.

    Raises:
        DataError: Every line that can't be used.
    """
    if content.lstrip()[0] == "[":
        advice = "Write one object a line: {...} without brackets or commas between."
        raise DataError(Problem(origin, "is a JSON list, expected JSON lines", advice))
    with throw_away_cache() as cache:
        lines = datasets.Dataset.from_text(str(path), cache_dir=cache, encoding="utf-8-sig")["text"]
        rows, problems = _parsed(origin, lines[:])
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    missing = [
        missing_column(origin, key, column, columns)
        for key, column in (("text", text), ("label", label))
        if column not in columns
    ]
    if rows and not missing:
        missing = _faults(origin, rows, text, label)
    refuse(problems + missing)
    texts = tuple(str(row[text]) for _, row in rows)
    labels: tuple[LabelValue | None, ...] = tuple(row.get(label) for _, row in rows)
    return RawTable(origin, path.stem, "line", tuple(line for line, _ in rows), texts, labels)


def _faults(
    origin: str, rows: Sequence[tuple[int, dict[str, Any]]], text: str, label: str
) -> list[Problem]:
    """Tell values that can't serve as text or label, the lines of each fault together."""
    faults: dict[str, list[int]] = {}
    for line, row in rows:
        for fault in (_text_fault(text, row), _label_fault(label, row.get(label))):
            if fault:
                faults.setdefault(fault, []).append(line)
    advice = "Mend or remove what is told."
    return [
        located(origin, "line", lines, f"{what} ({{places}})", advice)
        for what, lines in faults.items()
    ]


def _label_fault(column: str, value: object) -> str:
    """Say why a JSON value can't serve as a label, or return an empty string."""
    if isinstance(value, dict | list):
        return f"the label {column!r} is a list or an object, expected one label a text"
    if isinstance(value, str) and not _encodable(value):
        return f"the label {column!r} holds half of a surrogate pair"
    return ""


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_fault(column: str, row: dict[str, Any]) -> str:
    """Say why a JSON value can't serve as a text, or return an empty string."""
    if column not in row:
        return f"no text {column!r}"
    value = row[column]
    if value is None:
        return f"the text {column!r} is null"
    if not isinstance(value, str):
        return f"the text {column!r} is a {type(value).__name__}, not a string"
    return "" if _encodable(value) else f"the text {column!r} holds half of a surrogate pair"


def _parsed(
    origin: str, lines: Sequence[str]
) -> tuple[list[tuple[int, dict[str, Any]]], list[Problem]]:
    """Parse every line that isn't blank, and tell those that aren't a JSON object."""
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number too long to read
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            shown = line if len(line) <= 60 else f"{line[:57]}..."
            what = f"isn't JSON ({reason}): {shown}"
            problems.append(located(origin, "line", [number], what, "Mend or remove the line."))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            what = f"is a JSON {type(row).__name__}, expected an object"
            problems.append(located(origin, "line", [number], what))
    return rows, problems
