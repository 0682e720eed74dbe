"""``lorasweep predict``: an exported model on texts from the command line, a file or stdin."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from lorasweep.deploy.predict import Prediction


@click.command("predict", short_help="Classify texts with an exported model.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT ...]", nargs=-1)
@click.option(
    "--file",
    "source",
    metavar="FILE|-",
    help="CSV, TSV, JSON lines, Parquet, or .txt with a text a line.",
)
@click.option("--column", default="text", show_default=True, help="Column of the texts in a table.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON lines.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Texts per forward pass.",
)
def command(
    folder: Path,
    texts: tuple[str, ...],
    source: str | None,
    column: str,
    output: Path | None,
    batch_size: int,
) -> None:
    """Classify every TEXT, or every row of a file, with the model in DIR.

    On a terminal one readable line a text; otherwise, and with --output, JSON lines.
    """
    if bool(texts) == bool(source):
        raise click.UsageError("give texts, or --file, and not both")
    with _written_at_once(output, source) as stream:
        wanted = list(texts) if texts else _read_texts(source or "-", column)

        from lorasweep.deploy.predict import SentimentAnalyzer

        predictions = SentimentAnalyzer(folder).batch_predict(wanted, batch_size=batch_size)
        if stream is not None:
            _write_lines(stream, wanted, predictions)
    if output is not None:
        click.echo(f"{len(predictions)} predictions: {output}", err=True)
    elif sys.stdout.isatty():
        for text, prediction in zip(wanted, predictions, strict=True):
            click.echo(f"{prediction.label:>12}  {prediction.confidence:6.1%}  {text}")
    else:
        _write_lines(sys.stdout, wanted, predictions)


def _read_texts(source: str, column: str) -> list[str]:
    from lorasweep.data.texts import read_texts, split_texts

    if source == "-":
        texts, blank = split_texts("stdin", sys.stdin.buffer.read())
    else:
        texts, blank = read_texts(source, column)
    if blank:
        lines = "1 blank line" if blank == 1 else f"{blank} blank lines"
        click.echo(f"{source}: {lines} left out", err=True)
    return texts


@contextmanager
def _written_at_once(output: Path | None, source: str | None) -> Iterator[TextIO | None]:
    """Open a file that becomes ``output`` when all is well, and leaves an earlier one until then.

    It is opened before anything is predicted, so that a folder that can't be written is told
    at once.

    Raises:
        StorageError: It can't be written, or is the file that the texts come from.
    """
    if output is None:
        yield None
        return
    from lorasweep.core.errors import Problem, StorageError

    both_there = source is not None and Path(source).exists() and output.exists()
    if both_there and output.samefile(str(source)):
        what = "is the file that the texts are read from"
        raise StorageError(Problem(str(output), what, "Name another --output."))
    # Pipes, devices and links (/dev/stdout is one) are written through, never replaced by a file.
    in_place = output.is_symlink() or (output.exists() and not output.is_file())
    writing = output if in_place else output.with_name(f".{output.name}.{os.getpid()}.writing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with writing.open("w", encoding="utf-8") as stream:
            yield stream
        if not in_place:
            writing.replace(output)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"can't be written: {error.strerror or error}"
        raise StorageError(Problem(str(output), what, "Name another --output.")) from None
    finally:
        if not in_place:
            with suppress(OSError):
                writing.unlink()


def _write_lines(stream: TextIO, texts: list[str], predictions: list[Prediction]) -> None:
    for text, prediction in zip(texts, predictions, strict=True):
        line = {
            "text": text,
            "label": prediction.label,
            "confidence": prediction.confidence,
            "probabilities": prediction.probabilities,
        }
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
