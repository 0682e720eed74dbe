"""Texts alone, to be classified: a text a line, or one column of a table."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.files import ENDINGS, decode, decoded, existing, read_file

_PLAIN = ".txt"
# Not str.splitlines, which also cuts texts at form feeds and at Unicode's own separators.
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_texts(origin: str, column: str) -> tuple[list[str], int]:
    """Read the texts of a file, in its order.

    Args:
        origin: ``.txt`` with a text a line, or a CSV, TSV, JSON lines or Parquet file.
        column: The column of a table that holds the texts.

    Returns:
        The texts, and how many blank lines of a ``.txt`` were left out.

    Raises:
        DataError: The file can't be used, or holds no text.
    """
    if Path(origin).expanduser().is_dir():
        raise DataError(Problem(origin, "is a folder, expected a file", "Name a file inside it."))
    path = existing(origin, (_PLAIN, *ENDINGS))
    if path.suffix.lower() == _PLAIN:
        return _lines(origin, decoded(origin, path))
    try:
        # A table without labels: the texts stand in for them, and are not looked at as such.
        return list(read_file(origin, column, column).texts), 0
    except DataError as error:
        # Said of the text column first, and then of the same one as the label column. There is
        # no spec here to name the column in.
        once = {problem.where: problem for problem in reversed(error.problems)}
        raise DataError(
            replace(problem, advice=problem.advice.replace(" in data.text", ""))
            for problem in once.values()
        ) from None


def split_texts(origin: str, content: bytes) -> tuple[list[str], int]:
    """Read a text a line from bytes, such as a pipe's; see :func:`read_texts`.

    Raises:
        DataError: They are not UTF-8, or hold no text.
    """
    return _lines(origin, decode(origin, content))


def _lines(origin: str, content: str) -> tuple[list[str], int]:
    lines = _LINE_END.split(content)
    if not lines[-1]:
        lines.pop()  # what follows the last line's end is no line
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DataError(Problem(origin, "holds no text", "Give one text a line."))
    return texts, len(lines) - len(texts)
