"""What a source hands over before anything is interpreted, and how its places are told."""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import datasets

from lorasweep.core.errors import DataError, Problem, StorageError

LabelValue = str | int | float | bool
_LISTED = 10


@dataclass(frozen=True, slots=True)
class RawTable:
    """Texts and labels as the source has them, row by row.

    Attributes:
        origin: The file or Hub split, as the person who wrote the spec knows it.
        stem: What the rows' ids begin with.
        unit: What ``places`` counts: lines of a text file, or rows.
        places: Where each row begins, counted from 1.
        texts: Never None; the source has refused what isn't text.
        labels: As written; None where there is none.
        class_names: Names that the source itself gives to the labels 0, 1, …
        tags: What each text is known to contain; empty for a source that doesn't say.
    """

    origin: str
    stem: str
    unit: Literal["line", "row"]
    places: tuple[int, ...]
    texts: tuple[str, ...]
    labels: tuple[LabelValue | None, ...]
    class_names: tuple[str, ...] | None = None
    tags: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def problem(self, rows: Sequence[int], what: str, advice: str = "") -> Problem:
        """Tell what is wrong with some rows, the first of them as the place to go to.

        Args:
            rows: Row indices, counted from 0; one or more.
            what: May hold ``{places}``, which becomes ``lines 3, 9 and 12``.
            advice: What to do about it.
        """
        places = [self.places[row] for row in rows]
        return located(self.origin, self.unit, places, what, advice)


def located(origin: str, unit: str, places: Sequence[int], what: str, advice: str = "") -> Problem:
    """Build a problem at the first of several places; see :meth:`RawTable.problem`."""
    where = f"{origin}:{places[0]}" if unit == "line" else f"{origin} row {places[0]}"
    return Problem(where, what.replace("{places}", listed(places, unit)), advice)


def listed(places: Sequence[int], unit: str) -> str:
    """Name up to ten places.

    >>> listed([3, 9, 12], "line")
    'lines 3, 9 and 12'
    >>> listed([4], "row")
    'row 4'
    """
    if len(places) == 1:
        return f"{unit} {places[0]}"
    shown = [str(place) for place in places[:_LISTED]]
    more = len(places) - len(shown)
    last = f"{more} more" if more else shown.pop()
    return f"{unit}s {', '.join(shown)} and {last}"


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """Return ``Did you mean 'x'?``, or an empty string when nothing known is close."""
    names = list(known)
    folded = {name.strip().casefold(): name for name in reversed(names)}
    exact = folded.get(wanted.strip().casefold())
    close = [exact] if exact else difflib.get_close_matches(wanted, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def missing_column(
    origin: str, key: str, wanted: str, columns: Sequence[str], first_line: int | None = None
) -> Problem:
    """Say that the column named by ``data.<key>`` isn't there, and which columns are."""
    there = ", ".join(repr(column) for column in columns) or "none"
    advice = f"{did_you_mean(wanted, columns)} Name the column in data.{key}.".strip()
    where = origin if first_line is None else f"{origin}:{first_line}"
    return Problem(where, f"has no {key} column {wanted!r}; its columns are {there}", advice)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise everything that was found, or do nothing.

    Raises:
        DataError: There is at least one problem.
    """
    if problems:
        raise DataError(problems)


@contextmanager
def throw_away_cache() -> Iterator[str]:
    """Give `datasets` a cache folder that is gone afterwards, and keep it off the terminal.

    Its cache is keyed by path and time of change: it would fill the disk with copies, and give
    old rows for a file that was rewritten within the clock's tick.
    """
    bars = datasets.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    # It logs what it then raises; one sentence about a fault is enough.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        # Windows can't delete a file that Arrow still maps; the system's own sweep will.
        made = tempfile.TemporaryDirectory(prefix="lorasweep-", ignore_cleanup_errors=True)
    except OSError as error:
        what = f"can't be made: {error.strerror or error}"
        advice = "Make room there, or set TMPDIR to a folder that can be written."
        raise StorageError(Problem("a temporary folder", what, advice)) from error
    with made as folder:
        try:
            yield folder
        finally:
            datasets.logging.set_verbosity(verbosity)
            if bars:
                datasets.enable_progress_bars()
