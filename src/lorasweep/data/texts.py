"""Texts alone, to be classified: a text a line, or one column of a table."""

from __future__ import annotations

from pathlib import Path

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.files import decoded, existing, read_file

_PLAIN = ".txt"


def read_texts(origin: str, column: str) -> list[str]:
    """Read the texts of a file, in its order.

    Args:
        origin: ``.txt`` with a text a line (blank lines are none), or a CSV, TSV, JSON lines
            or Parquet file.
        column: The column of a table that holds the texts.

    Raises:
        DataError: The file can't be used, or holds no text.
    """
    if Path(origin).suffix.lower() == _PLAIN:
        lines = decoded(origin, existing(origin, (_PLAIN,))).splitlines()
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise DataError(Problem(origin, "holds no text", "Give one text a line."))
        return texts
    try:
        # A table without labels: the texts stand in for them, and are not looked at as such.
        return list(read_file(origin, column, column).texts)
    except DataError as error:
        # Said of the text column first, and then of the same one as the label column.
        once = {problem.where: problem for problem in reversed(error.problems)}
        raise DataError(once.values()) from None
