"""``lorasweep predict``: an exported model on texts from the command line, a file or stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from lorasweep.deploy.predict import Prediction


@click.command("predict", short_help="Classify texts with an exported model.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT ...]", nargs=-1)
@click.option("--file", "source", metavar="IN.csv|IN.txt|-", help="Texts from a file or stdin.")
@click.option("--column", default="text", show_default=True, help="Column of a CSV or TSV file.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON lines.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
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
    wanted = list(texts) if texts else _read_texts(source or "-", column)

    from lorasweep.deploy.predict import SentimentAnalyzer

    predictions = SentimentAnalyzer(folder).batch_predict(wanted, batch_size=batch_size)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", encoding="utf-8") as stream:
            _write_lines(stream, wanted, predictions)
        click.echo(f"{len(predictions)} predictions: {output}", err=True)
    elif sys.stdout.isatty():
        for text, prediction in zip(wanted, predictions, strict=True):
            click.echo(f"{prediction.label:>12}  {prediction.confidence:6.1%}  {text}")
    else:
        _write_lines(sys.stdout, wanted, predictions)


def _read_texts(source: str, column: str) -> list[str]:
    if source == "-":
        from lorasweep.core.errors import DataError, Problem

        texts = [line.rstrip("\r\n") for line in sys.stdin]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise DataError(Problem("stdin", "holds no text", "Give one text a line."))
        return texts
    from lorasweep.data.texts import read_texts

    return read_texts(source, column)


def _write_lines(stream: TextIO, texts: list[str], predictions: list[Prediction]) -> None:
    for text, prediction in zip(texts, predictions, strict=True):
        line = {
            "text": text,
            "label": prediction.label,
            "confidence": prediction.confidence,
            "probabilities": prediction.probabilities,
        }
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
