"""How a running sweep looks: a live table on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasweep.core.outcomes import TrialRecord, TrialState
from lorasweep.core.paths import run_name
from lorasweep.sweep.events import (
    Event,
    LanesShrank,
    Said,
    SweepStarted,
    TrainingEnded,
    TrialEnded,
    TrialEvaluated,
    TrialReady,
    TrialStarted,
    TrialStepped,
    Warned,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MARK = {
    TrialState.RUNNING: "▸",
    TrialState.COMPLETED: "✓",
    TrialState.PRUNED: "✂",
    TrialState.FAILED: "✗",
    TrialState.INTERRUPTED: "‖",
}


class View:
    """Shows events. The base shows nothing."""

    def show(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Leave the terminal as a command should; may be called twice."""


class QuietView(View):
    """Warnings only."""

    def show(self, event: Event) -> None:
        if isinstance(event, Warned | LanesShrank):
            print(_line(event), file=sys.stderr)


class PlainView(View):
    """One line on stderr for what matters: fit for a log file."""

    def show(self, event: Event) -> None:
        line = _line(event)
        if line:
            print(line, file=sys.stderr, flush=True)


@dataclass
class _Row:
    number: int
    state: TrialState
    parameters: Mapping[str, Any]
    epoch: int = 0
    epochs: int = 0
    share: float = 0.0
    loss: float | None = None
    score: float | None = None
    lane: int | None = None
    seconds: float = 0.0
    reason: str = ""
    since: float | None = None  # when it started, where this process saw it start


class LiveView(View):
    """One row a trial, the best so far and the time left, redrawn in place on stderr."""

    _REFRESH = 4  # a second

    def __init__(self) -> None:
        from rich.console import Console as RichConsole

        self._console = RichConsole(stderr=True, highlight=False)
        self._live: Any = None
        self._rows: dict[int, _Row] = {}
        self._started: SweepStarted | None = None
        self._best: TrialRecord | None = None
        self._ended = 0
        self._lanes: int | None = None
        self._begun = time.monotonic()

    def show(self, event: Event) -> None:
        match event:
            case Said() | Warned():
                style = "yellow" if isinstance(event, Warned) else "dim"
                self._console.print(event.message, style=style, markup=False)
            case LanesShrank():
                self._lanes = event.lanes
                self._console.print(_shrank(event), style="yellow", markup=False)
            case SweepStarted():
                self._begin(event)
            case TrialStarted():
                self._rows[event.number] = _Row(
                    event.number,
                    TrialState.RUNNING,
                    event.parameters,
                    epochs=event.epochs,
                    since=time.monotonic(),
                )
            case TrialReady():
                self._rows[event.number].lane = event.facts.lane
            case TrialStepped():
                row = self._rows[event.number]
                row.share, row.loss = event.step / event.steps, event.loss
            case TrialEvaluated():
                row = self._rows[event.number]
                row.epoch = event.epoch
                row.score = event.score if event.best else row.score
            case TrialEnded():
                self._end(event)
            case TrainingEnded():
                self.close()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _begin(self, event: SweepStarted) -> None:
        from rich.live import Live

        self._started = event
        self._begun = time.monotonic()
        for record in event.earlier:
            self._rows[record.number] = _row(record)
            if record.score is not None and record.state is TrialState.COMPLETED:
                better = self._best is None or record.score > (self._best.score or 0.0)
                self._best = record if better else self._best
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            refresh_per_second=self._REFRESH,
            transient=False,
        )
        self._live.start()

    def _end(self, event: TrialEnded) -> None:
        self._rows[event.record.number] = _row(event.record)
        self._best = event.best
        self._ended += 1

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        assert self._started is not None
        best = self._best.number if self._best else None
        # A terminal shows so many rows; the running and the latest trials matter most.
        room = max(5, self._console.height - 6)
        rows = sorted(self._rows.values(), key=lambda row: (not row.state.is_final, row.number))
        shown = sorted(rows[-room:], key=lambda row: row.number)
        table = _table(shown, best, self._started.objective)
        hidden = len(rows) - len(shown)
        return Group(table, Text(self._footer(hidden), style="dim"))

    def _footer(self, hidden: int) -> str:
        assert self._started is not None
        done = sum(
            row.state.is_final and row.state is not TrialState.INTERRUPTED
            for row in self._rows.values()
        )
        parts = [f"{done} of {self._started.total} trials", self._started.engine]
        if self._lanes is not None:
            parts.append(f"now {_so_many(self._lanes)}")
        if self._best is not None:
            parts.append(f"best {run_name(self._best.number)}: {self._best.score:.4f}")
        left = self._started.total - done
        if self._ended and left > 0:
            each = (time.monotonic() - self._begun) / self._ended
            parts.append(f"about {_duration(each * left)} left")
        if hidden:
            parts.append(f"{hidden} more trials not shown")
        return " · ".join(parts)


def trial_table(
    records: Sequence[TrialRecord],
    best: TrialRecord | None,
    objective: str,
    lanes: Mapping[int, int | None],
) -> Table:
    """The trials of a study as a table for a terminal; ``lanes`` by trial, of those in a pack."""
    rows = [replace(_row(record), lane=lanes.get(record.number)) for record in records]
    return _table(rows, best.number if best else None, objective)


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """``learning_rate 0.00031, rank 8``: short enough for a line."""
    return ", ".join(f"{key} {_short(value)}" for key, value in parameters.items())


def _table(rows: Iterable[_Row], best: int | None, objective: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    shown = list(rows)
    names = list(dict.fromkeys(key for row in shown for key in row.parameters))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial")
    for name in names:
        table.add_column(name.replace("learning_rate", "lr"), justify="right")
    table.add_column("progress", min_width=10)
    table.add_column("loss", justify="right")
    table.add_column(f"val {objective}", justify="right")
    table.add_column("time", justify="right")
    table.add_column("note", overflow="ellipsis", max_width=48, no_wrap=True)
    for row in shown:
        seconds = row.seconds if row.since is None else time.monotonic() - row.since
        style = "bold green" if row.number == best else ""
        table.add_row(
            Text(f"{_MARK[row.state]} {run_name(row.number)}"),
            *(Text(_short(row.parameters.get(name))) for name in names),
            _progress(row),
            "" if row.loss is None else f"{row.loss:.3f}",
            "" if row.score is None else f"{row.score:.4f}",
            _duration(seconds),
            Text("best" if row.number == best else row.reason or _lane(row)),
            style=style,
        )
    return table


def _row(record: TrialRecord) -> _Row:
    return _Row(
        record.number,
        record.state,
        record.parameters,
        epoch=record.best_epoch or 0,
        score=record.score,
        seconds=record.seconds,
        reason=record.reason,
    )


def _lane(row: _Row) -> str:
    return "" if row.lane is None or row.state.is_final else f"lane {row.lane}"


def _so_many(lanes: int) -> str:
    return f"{lanes} lane{'' if lanes == 1 else 's'}"


def _shrank(event: LanesShrank) -> str:
    return f"{event.why}: going on with {_so_many(event.lanes)}"


def _progress(row: _Row) -> str:
    if row.since is None:
        return row.state.value
    filled = round(10 * row.share)
    return "━" * filled + "╌" * (10 - filled)


def _line(event: Event) -> str:
    match event:
        case Said():
            return event.message
        case Warned():
            return f"warning: {event.message}"
        case LanesShrank():
            return f"warning: {_shrank(event)}"
        case SweepStarted():
            earlier = f", {len(event.earlier)} from earlier" if event.earlier else ""
            return f"{event.name}: {event.total} trials{earlier}; engine {event.engine}"
        case TrialStarted():
            retry = "" if event.retry_of is None else f" (takes up {run_name(event.retry_of)})"
            return f"trial {run_name(event.number)}{retry}: {format_parameters(event.parameters)}"
        case TrialReady() if event.facts.resumed_step:
            done = f"step {event.facts.resumed_step} of {event.facts.steps}"
            return f"trial {run_name(event.number)} goes on after {done}"
        case TrialEvaluated():
            mark = " *" if event.best else ""
            return (
                f"trial {run_name(event.number)} epoch {event.epoch}/{event.epochs}: "
                f"{event.score:.4f}{mark}"
            )
        case TrialEnded():
            record = event.record
            score = "" if record.score is None else f" {record.score:.4f}"
            reason = f": {record.reason}" if record.reason else ""
            best = "" if event.best is None else f"; best so far {run_name(event.best.number)}"
            return (
                f"trial {run_name(record.number)} {record.state.value}{score} "
                f"in {_duration(record.seconds)}{reason}{best}"
            )
        case _:
            return ""


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return str(value)


def _duration(seconds: float) -> str:
    """``42 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
