"""One file of CSV, TSV, JSON lines or Parquet: found, decoded, and handed to its reader."""

from __future__ import annotations

from pathlib import Path

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.json_lines import read_json_lines
from lorasweep.data.separated import read_separated
from lorasweep.data.tables import RawTable, did_you_mean, located
from lorasweep.data.typed import read_parquet

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_JSON_LINES = (".jsonl", ".ndjson", ".json")
ENDINGS = (*_DELIMITERS, *_JSON_LINES, ".parquet")


def read_file(origin: str, text: str, label: str) -> RawTable:
    """Read the text and label columns of one file, told apart by its ending.

    Raises:
        DataError: Every fault of the file that can be told, with lines.
    """
    path = existing(origin)
    ending = path.suffix.lower()
    if ending == ".parquet":
        return read_parquet(origin, path, text, label)
    content = decoded(origin, path)
    if not content.strip():
        raise DataError(Problem(origin, "is empty", "Give a file with a row for each text."))
    if ending in _JSON_LINES:
        return read_json_lines(origin, path, content, text, label)
    return read_separated(origin, path, content, text, label, _DELIMITERS[ending])


def existing(origin: str, endings: tuple[str, ...] = ENDINGS) -> Path:
    """Find the file, or say what is there instead."""
    path = Path(origin).expanduser()
    if path.is_dir():
        hint = f"Name one of its files, or use kind: hub, path: {origin} for the Hub's layout."
        raise DataError(Problem(origin, "is a folder, expected a file", hint))
    if path.suffix.lower() not in endings:
        raise DataError(
            Problem(
                origin,
                f"has the ending {path.suffix!r}, which says nothing about its format",
                f"Expected one of {', '.join(endings)}.",
            )
        )
    if not path.is_file():
        folder = path.parent
        if not folder.is_dir():
            raise DataError(Problem(origin, f"doesn't exist, and neither does the folder {folder}"))
        names = [entry.name for entry in folder.iterdir()]
        raise DataError(Problem(origin, "doesn't exist", did_you_mean(path.name, names)))
    return path


def decoded(origin: str, path: Path) -> str:
    """Return the file's text; see :func:`decode`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(Problem(origin, f"can't be read: {error.strerror}")) from None
    return decode(origin, content)


def decode(origin: str, content: bytes) -> str:
    """Return UTF-8 text without its byte order mark, line ends untouched.

    Raises:
        DataError: With the lines that aren't UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    advice = "Save the file as UTF-8."
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(Problem(origin, "is UTF-16, expected UTF-8", advice))
    bad, shown = [], ""
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.append(number)
            shown = shown or f"0x{line[error.start]:02x} at byte {error.start + 1} of line {number}"
    raise DataError(
        located(
            origin, "line", bad, f"bytes that aren't UTF-8 on {{places}}, such as {shown}", advice
        )
    )
