"""The only writer to the terminal: events and results for people, or JSON lines for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from lorasweep.cli.views import LiveView, PlainView, QuietView, View, format_parameters
from lorasweep.core.outcomes import FinishedSweep, TrialRecord
from lorasweep.sweep.events import Event, Said, Warned

if TYPE_CHECKING:
    from lorasweep.sweep.worker import SweepResult


class JsonView(View):
    """One JSON object a line on stdout; nothing else is printed there."""

    def show(self, event: Event) -> None:
        print_json({"event": _snake(type(event).__name__), **_plain(event)})


class Console:
    """Takes events while a command runs and prints its result at the end.

    Args:
        view: How events are shown.
        as_json: Whether results are JSON too.
    """

    def __init__(self, view: View, as_json: bool) -> None:
        self._view = view
        self._as_json = as_json

    def listen(self, event: Event) -> None:
        """The listener to hand to a sweep."""
        self._view.show(event)

    def say(self, message: str) -> None:
        """A sentence about what is being done."""
        self._view.show(Said(message))

    def warn(self, message: str) -> None:
        """A sentence about something that surprises."""
        self._view.show(Warned(message))

    def result(self, same: str, finished: FinishedSweep, page: Path) -> None:
        """The end of a sweep: winner, comparison, report, UI.

        Args:
            same: Words that name the same sweep on a command line.
            finished: The sweep.
            page: The report's page.
        """
        from lorasweep.report.collect import collect
        from lorasweep.report.wording import cautions, conclusion, verdict_sentence

        test = collect(finished).test
        told = [conclusion(finished, test)]
        if test is not None:
            others = (c for c in test.comparisons.values() if c is not test.strongest)
            told += [verdict_sentence(comparison) for comparison in others]
        warned = cautions(finished, test)
        if self._as_json:
            print_json(
                {
                    "event": "finished",
                    "name": finished.name,
                    "best": finished.best,
                    "conclusions": told,
                    "cautions": warned,
                    "report": str(page),
                    "results": str(page.parent / "fine_tuning_results.json"),
                }
            )
            return
        best = finished.best
        click.echo("")
        for sentence in told:
            click.echo(sentence)
        for sentence in warned:
            click.echo(f"Mind: {sentence}")
        click.echo("")
        click.echo(f"Winner:  trial {best.number}, {format_parameters(best.parameters)}")
        click.echo(f"Report:  {_short(page)}")
        click.echo(f"Results: {_short(page.parent / 'fine_tuning_results.json')}")
        click.echo(f"Compare: lorasweep ui {same}")
        click.echo(f"Deploy:  lorasweep export {same} --to fine_tuned_model")

    def result_without_report(self, same: str, result: SweepResult) -> None:
        """The end of a command that leaves the test split closed."""
        if self._as_json:
            print_json({"event": "trained", "finished": result.finished, "best": result.best})
            return
        best = result.best
        if best is not None:
            click.echo(
                f"Best so far: {best.number}, score {best.score:.4f}, "
                f"{format_parameters(best.parameters)}"
            )
        if result.finished:
            click.echo(f"Report:  lorasweep report {same}")
        else:
            click.echo(f"Go on:   lorasweep run {same}")


@contextmanager
def open_console(*, quiet: bool, as_json: bool) -> Iterator[Console]:
    """Choose the view that fits: JSON on request, live on a terminal, plain lines elsewhere."""
    view: View
    if as_json:
        view = JsonView()
    elif quiet:
        view = QuietView()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        view = LiveView()
    else:
        view = PlainView()
    try:
        yield Console(view, as_json)
    finally:
        view.close()


def print_json(value: Any) -> None:
    """Print one value as one line of strict JSON on stdout."""
    click.echo(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def print_trials(
    records: Sequence[TrialRecord],
    best: TrialRecord | None,
    objective: str,
    lanes: Mapping[int, int | None] = MappingProxyType({}),
) -> None:
    """Print the trials of a study as a table on stdout.

    Args:
        records: The trials.
        best: The best so far.
        objective: Name of the metric.
        lanes: By the number of a trial that is trained in a pack.
    """
    from rich.console import Console as RichConsole

    from lorasweep.cli.views import trial_table

    rows = trial_table(records, best, objective, lanes)
    width = None if sys.stdout.isatty() else 120
    RichConsole(width=width, highlight=False).print(rows)


def _plain(value: Any) -> Any:
    """Records as plain data; numbers that JSON has no word for become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _plain(dict(value)) if hasattr(value, "keys") else str(value)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _short(path: Path) -> str:
    """The path from here if it lies below here: shorter, and it can be clicked."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
