"""From labels as written to indices: which values are classes, their order and their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.tables import LabelValue, RawTable, did_you_mean, refuse

Kind = Literal["number", "bool", "word"]
Value = int | bool | str

_WHOLE = re.compile(r"[+-]?\d{1,300}(\.0*)?")
_FRACTION = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
# What spreadsheets and pandas write where nothing is. A class of that name must be listed
# in data.labels; guessing here would either lose rows or train on a class "nan".
_NOTHING = {"", "nan", "na", "n/a", "null", "none", "<na>", "#n/a"}


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labels as indices.

    Attributes:
        names: In order of index.
        indices: Split name to one index a row; None where there is no label.
        notes: Whole sentences about what was found.
    """

    names: tuple[str, ...]
    indices: Mapping[str, tuple[int | None, ...]]
    notes: tuple[str, ...] = ()


def read_labels(
    tables: Mapping[str, RawTable], names: tuple[str, ...] | None, drop_unlabelled: bool
) -> Labelled:
    """Interpret the labels of all splits together.

    The classes are those of ``train``. Numbers stand in order of their value, words in order
    of the alphabet, false before true, unless ``names`` lists the same words in another order.

    Args:
        tables: Split name to table; ``train`` must be among them.
        names: ``data.labels`` of the spec.
        drop_unlabelled: Whether rows without a label are allowed.

    Raises:
        DataError: Everything that is wrong with any label.
    """
    problems: list[Problem] = []
    values: dict[str, list[Value | None]] = {}
    kinds: dict[str, Kind | None] = {}
    for split, table in tables.items():
        kinds[split], values[split], found = _interpreted(table, names or ())
        if not drop_unlabelled:
            found += _unlabelled(table, values[split])
        problems += found
    for split, kind in kinds.items():
        if kind and kinds["train"] and kind != kinds["train"] and not problems:
            what = f"its labels are {kind}s, those of {tables['train'].origin} {kinds['train']}s"
            problems.append(Problem(tables[split].origin, what, "Write them alike."))
    carried = {t.class_names for t in tables.values() if t.class_names is not None}
    if len(carried) > 1:
        what = f"the splits name their labels differently: {' / '.join(map(str, sorted(carried)))}"
        problems.append(Problem(tables["train"].origin, what, "Number the labels alike."))
    refuse(problems)
    order, shown, problems, notes = _classes(tables["train"], values["train"], names)
    for split, table in tables.items():
        if split != "train":
            problems += _unseen(table, values[split], order, tables["train"].origin)
    refuse(problems)
    index = {value: at for at, value in enumerate(order)}
    indices = {
        split: tuple(None if value is None else index[value] for value in column)
        for split, column in values.items()
    }
    return Labelled(shown, indices, notes)


def _interpreted(
    table: RawTable, names: tuple[str, ...]
) -> tuple[Kind | None, list[Value | None], list[Problem]]:
    """Bring one split's labels to one kind: whole numbers, truth values or words."""
    written = [_stripped(value, names) for value in table.labels]
    kinds: dict[str, list[int]] = {}
    for row, value in enumerate(written):
        kind = _kind(value)
        if kind:
            kinds.setdefault(kind, []).append(row)
    strings = all(isinstance(value, str) for value in written if value is not None)
    if (
        strings
        and set(kinds) == {"word"}
        and all(
            str(value).casefold() in ("true", "false") for value in written if value is not None
        )
    ):
        truths = [None if v is None else str(v).casefold() == "true" for v in written]
        return "bool", list(truths), []
    if "fraction" in kinds:
        rows = kinds["fraction"]
        what = f"the label {written[rows[0]]!r} is a number but not a whole one ({{places}})"
        advice = "A class needs a whole number or a word; is this the right column?"
        return None, [], [table.problem(rows, what, advice)]
    native = {type(value) is str for value in written if value is not None}
    if len(kinds) > 1 or (len(native) > 1):
        return None, [], [_mixed(table, written, kinds)]
    if not kinds:
        return None, [None] * len(table), []
    only = next(iter(kinds))
    if only == "number":
        # Through text, since a float would round a long identifier.
        numbers = [None if v is None else int(str(v).split(".")[0]) for v in written]
        return "number", list(numbers), []
    if only == "bool":
        return "bool", [None if v is None else bool(v) for v in written], []
    return "word", [None if v is None else str(v) for v in written], []


def _stripped(value: LabelValue | None, names: tuple[str, ...]) -> LabelValue | None:
    """Return None for what stands for nothing; words lose the white space around them."""
    if isinstance(value, float) and value != value:  # NaN, the only value unlike itself
        return None
    if not isinstance(value, str):
        return value
    word = value.strip()
    return None if word.casefold() in _NOTHING and word not in names else word


def _kind(value: LabelValue | None) -> Kind | Literal["fraction"] | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "number"
    if isinstance(value, float):
        return "number" if value.is_integer() and abs(value) < 2**53 else "fraction"
    if _WHOLE.fullmatch(value):
        return "number"
    return "fraction" if _FRACTION.fullmatch(value) else "word"


def _mixed(
    table: RawTable, written: list[LabelValue | None], kinds: Mapping[str, list[int]]
) -> Problem:
    """Tell labels of several kinds, with the rows of the rarer ones."""
    if len(kinds) == 1:  # "1" and 1
        kinds = {
            "number": [r for r, v in enumerate(written) if v is not None and type(v) is not str],
            "number in quotes": [r for r, v in enumerate(written) if type(v) is str],
        }
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    common, rare = ordered[0], ordered[-1]
    counts = " and ".join(
        f"{len(rows)} {kind}s such as {written[rows[0]]!r}" for kind, rows in ordered
    )
    what = f"the labels mix {counts}; the {rare[0]}s are on {{places}}"
    return table.problem(rare[1], what, f"Write all labels as {common[0]}s.")


def _unlabelled(table: RawTable, values: list[Value | None]) -> list[Problem]:
    missing = [row for row, value in enumerate(values) if value is None]
    if not missing:
        return []
    written = {str(table.labels[row] or "").strip() for row in missing}
    spellings = sorted(written - {""})
    what = f"no label in {len(missing)} of {len(table)} rows ({{places}})"
    if spellings:
        what += f"; {', '.join(map(repr, spellings))} count as none"
    advice = "Label them, or set data.clean.drop_unlabelled: true to leave them out."
    if spellings:
        advice += " A class of such a name must be listed in data.labels."
    return [table.problem(missing, what, advice)]


def _classes(
    table: RawTable, values: list[Value | None], names: tuple[str, ...] | None
) -> tuple[list[Value], tuple[str, ...], list[Problem], tuple[str, ...]]:
    """Return the classes in order, their names, what is wrong and what is worth knowing."""
    rows: dict[Value, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None:
            rows.setdefault(value, []).append(row)
    found = sorted(rows)
    if len(found) < 2:
        what = f"has one class only: {found[0]!r}" if found else "has no labelled row"
        return [], (), [Problem(table.origin, what, "Give two classes or more.")], ()
    alike: dict[str, list[Value]] = {}
    for value in found:
        alike.setdefault(str(value).casefold(), []).append(value)
    twins = [group for group in alike.values() if len(group) > 1]
    if twins:
        problems = []
        for group in twins:
            rare = min(group, key=lambda value: len(rows[value]))
            what = f"the labels {' and '.join(map(repr, group))} differ in case only"
            what += f"; {rare!r} is on {{places}}"
            problems.append(table.problem(rows[rare], what, "Write them alike."))
        return [], (), problems, ()
    carried = table.class_names
    if carried is not None:
        return _named_by_source(table, rows, carried, names)
    if names is None:
        return found, tuple(_name(value) for value in found), [], ()
    if set(names) == set(map(_name, found)):
        by_name = {_name(value): value for value in found}
        return [by_name[name] for name in names], names, [], ()
    return _named_by_spec(table, rows, found, names)


def _name(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _named_by_source(
    table: RawTable,
    rows: Mapping[Value, list[int]],
    carried: tuple[str, ...],
    names: tuple[str, ...] | None,
) -> tuple[list[Value], tuple[str, ...], list[Problem], tuple[str, ...]]:
    """Take names that the source carries, or the spec's names in their place."""
    order: list[Value] = [value for value in range(len(carried)) if value in rows]
    unused = [carried[at] for at in range(len(carried)) if at not in rows]
    notes = tuple(
        f"{table.origin} names the class {name!r} but has no row of it." for name in unused
    )
    if names is None:
        return order, tuple(carried[int(value)] for value in order), [], notes
    if set(names) == {carried[int(value)] for value in order}:
        return [carried.index(name) for name in names], names, [], notes
    if len(names) != len(order):
        shown = ", ".join(carried[int(value)] for value in order)
        what = f"names {len(names)} labels, but the data has {len(order)}: {shown}"
        return [], (), [Problem("data.labels", what)], ()
    return order, names, [], notes


def _named_by_spec(
    table: RawTable,
    rows: Mapping[Value, list[int]],
    found: list[Value],
    names: tuple[str, ...],
) -> tuple[list[Value], tuple[str, ...], list[Problem], tuple[str, ...]]:
    """Give the spec's names to the values in their order, where that can't be a slip."""
    written = {_name(value): value for value in found}
    problems = []
    if set(names) & set(written):  # the names are the labels themselves, so each must be listed
        for name, value in written.items():
            if name not in names:
                what = f"the label {name!r} isn't listed in data.labels ({{places}})"
                advice = f"{did_you_mean(name, names)} Listed are {', '.join(names)}.".strip()
                problems.append(table.problem(rows[value], what, advice))
        for name in names:
            if name not in written:
                what = f"lists {name!r}, of which {table.origin} has no row"
                advice = f"{did_you_mean(name, written)} Its labels are {', '.join(written)}."
                problems.append(Problem("data.labels", what, advice.strip()))
    elif len(names) != len(found):
        shown = ", ".join(written)
        what = f"names {len(names)} labels, but {table.origin} has {len(found)}: {shown}"
        problems.append(Problem("data.labels", what, "Give one name for each, in this order."))
    return (found, names, problems, ()) if not problems else ([], (), problems, ())


def _unseen(
    table: RawTable, values: list[Value | None], order: list[Value], train: str
) -> list[Problem]:
    """Tell labels of a held-out split that no training row has."""
    rows: dict[Value, list[int]] = {}
    for row, value in enumerate(values):
        if value is not None and value not in order and order:
            rows.setdefault(value, []).append(row)
    problems = []
    known = ", ".join(_name(value) for value in order)
    for value, at in rows.items():
        name = table.class_names[int(value)] if table.class_names else _name(value)
        what = f"the label {name!r} ({{places}}) occurs in no row of {train}"
        advice = f"{did_you_mean(name, map(_name, order))} Known are {known}.".strip()
        problems.append(table.problem(at, what, advice))
    return problems


def check_counts(origin: str, names: tuple[str, ...], labels: tuple[int, ...]) -> None:
    """Refuse a class that is left with no row, or with a single one, to learn from.

    Raises:
        DataError: One problem a class.
    """
    problems = []
    for at, name in enumerate(names):
        rows = labels.count(at)
        if rows < 2:
            left = "a single row" if rows else "no row"
            what = f"the class {name!r} has {left} left to learn from, expected two or more"
            problems.append(Problem(origin, what, "Add rows, or leave the class out."))
    if problems:
        raise DataError(problems)
