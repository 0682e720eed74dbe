"""The work that every contender gets: the same texts, the same trials, the same scores."""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turns import Contender, Summary, command_line, parse, run

from lorasweep.core.corpora import TextSplit
from lorasweep.core.plans import AdapterPlan, TrialPlan

RATES = (2e-4, 5e-4, 1e-3, 2e-3)
RANKS = (4, 8, 16, 32)
BATCH_SIZE = 16
EVAL_BATCH_SIZE = 64
MAX_LENGTH = 128
DROPOUT = 0.1
WEIGHT_DECAY = 0.01
WARMUP = 0.06
LABELS = ("negative", "positive")
MINILM = "embedded/minilm"
TEXTS = {
    "sst2": ("sst2/sentences_train.csv", "sst2/sentences_validation.csv"),
    "imdb": ("imdb/imdb_train_2k.csv", "imdb/imdb_test_2k.csv"),
}


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        trials: How many of the 16 points, in order; more begin again, with seeds of their own.
        epochs: Of each trial, over and over: ``(1, 4)`` gives every other trial four.
        train_rows, validation_rows: So many of each split, evenly spaced, since the files are
            sorted by label; None for all.
        lanes: Of the packed engine, a number or ``auto``.
        model: ``embedded/minilm``, or a folder.
        texts: Which of TEXTS.
        turn: Counted from 0; each turn has seeds of its own, so that the noise of seeds is seen.
    """

    trials: int = 16
    epochs: tuple[int, ...] = (2,)
    train_rows: int | None = None
    validation_rows: int | None = None
    lanes: int | str = "auto"
    model: str = MINILM
    texts: str = "sst2"
    turn: int = 0

    def points(self) -> list[dict[str, Any]]:
        """Take a grid of learning rates and ranks, the rank varying fastest."""
        grid = [{"learning_rate": rate, "rank": rank} for rate in RATES for rank in RANKS]
        return [
            {**grid[number % len(grid)], "epochs": self.epochs[number % len(self.epochs)]}
            for number in range(self.trials)
        ]

    def seed(self, number: int) -> int:
        """Seed of a trial: no two trials of a run share one."""
        return 1000 * self.turn + number

    def plans(
        self, folder: Path, dropout: float = DROPOUT, top_layers: int | None = None
    ) -> list[TrialPlan]:
        """Put the points as lorasweep's engines take them."""
        return [
            TrialPlan(
                number=number,
                seed=self.seed(number),
                adapter=AdapterPlan(
                    point["rank"], 2.0 * point["rank"], dropout, top_layers=top_layers
                ),
                learning_rate=point["learning_rate"],
                epochs=point["epochs"],
                batch_size=BATCH_SIZE,
                weight_decay=WEIGHT_DECAY,
                warmup=WARMUP,
                scheduler="linear",
                max_grad_norm=1.0,
                folder=folder / f"{number:04d}",
            )
            for number, point in enumerate(self.points())
        ]

    def described(self) -> dict[str, Any]:
        """All but the turn and where the model lies, for the results file."""
        known = {key: value for key, value in asdict(self).items() if key not in ("turn", "model")}
        if self.texts == "sst2":  # so it was before there was a choice, and files go on
            del known["texts"]
        return {
            **known,
            "batch_size": BATCH_SIZE,
            "eval_batch_size": EVAL_BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "lora_dropout": DROPOUT,
            "points": self.points(),
        }


def add_work(
    parser: argparse.ArgumentParser,
    *,
    trials: int = 16,
    epochs: tuple[int, ...] = (2,),
    made: bool = False,
) -> None:
    """Add the flags that cut the work to size.

    Args:
        parser: Where to.
        trials, epochs: Of the work, where the command line doesn't say.
        made: The base is made for the run: see :func:`run_on_made`.
    """
    parser.add_argument("--trials", type=_positive, default=trials, help="(%(default)s)")
    parser.add_argument(
        "--epochs",
        type=_positive,
        nargs="+",
        default=epochs,
        metavar="N",
        help=f"of each trial, repeated over the trials ({' '.join(map(str, epochs))})",
    )
    parser.add_argument("--train-rows", type=_positive, help="evenly spaced (all 6,920)")
    parser.add_argument("--validation-rows", type=_positive, help="evenly spaced (all 872)")
    parser.add_argument(
        "--texts",
        choices=TEXTS,
        default="sst2",
        help="sst2: whole sentences; imdb: reviews, nearly all of them cut at 128 tokens",
    )
    parser.add_argument("--lanes", type=_lanes, default="auto", help="of the packed engine")
    if made:
        parser.add_argument("--model", help=argparse.SUPPRESS)


def work_of(arguments: argparse.Namespace, **more: Any) -> Work:
    """Return what the flags say."""
    return Work(
        trials=arguments.trials,
        epochs=tuple(arguments.epochs),
        train_rows=arguments.train_rows,
        validation_rows=arguments.validation_rows,
        lanes=arguments.lanes,
        texts=arguments.texts,
        turn=arguments.turn,
        **more,
    )


def time_trials(
    description: str | None,
    contenders: Mapping[str, Contender],
    default: Sequence[str],
    summarise: Summary,
    *,
    epochs: tuple[int, ...] = (2,),
    lanes: int | str = "auto",
) -> None:
    """Read the command line and let the contenders do the same fixed trials.

    Args:
        description: What is timed, and how it is called.
        contenders: By name.
        default: Names of those who take part when none are named.
        summarise: As :func:`turns.run` takes it.
        epochs, lanes: Of the work, where the command line doesn't say.
    """
    parser = command_line(description, contenders, default)
    add_work(parser, epochs=epochs)
    parser.set_defaults(lanes=lanes)
    arguments = parse(parser, contenders)
    work = work_of(arguments)
    described = {"model": work.model, **work.described()}
    run(arguments, contenders, work, summarise, described=described)


def run_on_made(
    make: Callable[[Path], None],
    arguments: argparse.Namespace,
    contenders: Mapping[str, Contender],
    summarise: Summary,
    *,
    model: str,
) -> None:
    """Let the contenders work on a base that is made first, once.

    Args:
        make: Writes it, or several, into a folder; whoever measures finds that as the work's model.
        arguments: From a parser that went through :func:`add_work`, with ``made``.
        contenders: By name.
        summarise: As :func:`turns.run` takes it.
        model: What it is, in the results.
    """
    work = work_of(arguments, model=arguments.model or "")
    if arguments.model and not arguments.measure:
        raise SystemExit("--model is for the measuring processes: the base is made here")
    described = {"model": model, **work.described()}
    with tempfile.TemporaryDirectory(prefix="lorasweep-") as folder:
        also: tuple[str, ...] = ()
        if not arguments.measure:
            make(Path(folder))
            also = ("--model", folder)
        run(arguments, contenders, work, summarise, described=described, also=also)


def read(work: Work) -> tuple[TextSplit, TextSplit]:
    """The texts to train on (SST-2: 6,920 sentences) and to validate with (872)."""
    folder = Path(os.environ["LORASWEEP_DATA"])
    train, validation = TEXTS[work.texts]
    return (
        _split(folder / train, "train", work.train_rows),
        _split(folder / validation, "validation", work.validation_rows),
    )


def _positive(word: str) -> int:
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {word}")
    return number


def _lanes(word: str) -> int | str:
    return word if word == "auto" else _positive(word)


def _split(path: Path, name: str, rows: int | None) -> TextSplit:
    with path.open(newline="", encoding="utf-8") as stream:
        everything = list(csv.DictReader(stream))
    count = len(everything) if rows is None else min(rows, len(everything))
    found = [everything[at * len(everything) // count] for at in range(count)]
    return TextSplit(
        name=name,
        texts=tuple(row["text"] for row in found),
        labels=tuple(int(row["label"]) for row in found),
        ids=tuple(f"{path.name}:{at}" for at in range(len(found))),
    )
