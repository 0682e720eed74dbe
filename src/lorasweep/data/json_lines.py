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
    refuse(problems)
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    refuse(
        [
            missing_column(origin, key, column, columns)
            for key, column in (("text", text), ("label", label))
            if column not in columns
        ]
    )
    texts: list[str] = []
    faults: dict[str, list[int]] = {}
    for line, row in rows:
        value = row.get(text)
        fault = _text_fault(text, row, value)
        if fault:
            faults.setdefault(fault, []).append(line)
        texts.append(value if isinstance(value, str) else "")
    problems = [located(origin, "line", at, f"{what} ({{places}})") for what, at in faults.items()]
    labels: list[LabelValue | None] = []
    wrong: list[int] = []
    for line, row in rows:
        value = row.get(label)
        if isinstance(value, dict | list):
            wrong.append(line)
        labels.append(None if isinstance(value, dict | list) else value)
    if wrong:
        what = f"the label {label!r} is a list or an object ({{places}})"
        problems.append(located(origin, "line", wrong, what, "Give one label a text."))
    refuse(problems)
    places = tuple(line for line, _ in rows)
    return RawTable(origin, path.stem, "line", places, tuple(texts), tuple(labels))


def _text_fault(column: str, row: dict[str, Any], value: object) -> str:
    """Say why a JSON value can't serve as a text, or return an empty string."""
    if column not in row:
        return f"no text {column!r}"
    if value is None:
        return f"the text {column!r} is null"
    if not isinstance(value, str):
        return f"the text {column!r} is a {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"the text {column!r} holds half of a surrogate pair"
    return ""


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
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
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
