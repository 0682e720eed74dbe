"""Contenders in turns, each measurement a process of its own, results kept as they come.

Every measurement starts from nothing, so none is warm and none inherits memory. Contenders take
turns, so that a machine that slows down slows all of them, and a ratio is the median of the
ratios inside the turns. The file is written after every measurement: a run that is cut off keeps
what it has, and the same command with --resume measures the turns that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resumption import Earlier, OtherWorkError, earlier

from lorasweep.tracking.environment import describe

_RESULTS = Path(__file__).parent / "results"
_SAID = ("OMP_NUM_THREADS", "LORASWEEP_KERNELS", "LD_PRELOAD", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work.

    Attributes:
        measure: Does the whole work and returns what was found, with ``f1`` (the best validation
            F1 of each trial) where it has trials.
        words: Who it is, in the results.
        environment: Variables of its process.
        against: Whose time its own is divided by; None for the first contender's.
        comparable: Whether its trials are those of the one it is held against, so that scores
            should agree. Else only its time counts.
    """

    measure: Callable[[Any], dict[str, Any]]
    words: str
    environment: Mapping[str, str] = field(default_factory=dict)
    against: str | None = None
    comparable: bool = True


Results = dict[str, list[dict[str, Any]]]
Summary = Callable[[Results], tuple[dict[str, Any], str]]


def command_line(
    description: str | None, contenders: Mapping[str, Contender], default: Sequence[str]
) -> argparse.ArgumentParser:
    """Make a parser with the flags that all benchmarks share."""
    known = "\n".join(f"  {name}: {one.words}" for name, one in contenders.items())
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"contenders:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "contenders", nargs="*", help=f"by name ({', '.join(default)})", metavar="CONTENDER"
    )
    parser.add_argument(
        "--repeats",
        nargs="+",
        default=["3"],
        metavar="N",
        help="turns; also for one contender: --repeats 3 notebook=1 (3)",
    )
    parser.add_argument("--out", type=Path, help="where to write JSON (results/<benchmark>.json)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the file's turns and measure the missing ones; one that was cut in its middle "
        "is measured again, since a ratio is that of one turn",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(default_contenders=tuple(default))
    return parser


def parse(
    parser: argparse.ArgumentParser, contenders: Mapping[str, Contender]
) -> argparse.Namespace:
    """Read the command line; ``repeats`` becomes a number for each chosen contender."""
    arguments = parser.parse_args()
    chosen = tuple(arguments.contenders or arguments.default_contenders)
    if unknown := [name for name in chosen if name not in contenders]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(contenders)}")
    repeats = dict.fromkeys(chosen, 3)
    for word in sorted(arguments.repeats, key=lambda word: "=" in word):  # the general one first
        name, given, number = word.rpartition("=")
        if not number.isdigit() or (given and name not in repeats):
            parser.error(
                f"--repeats: {word!r} is no number and no chosen contender with one; "
                "contenders are named before the flags"
            )
        repeats |= {name: int(number)} if given else dict.fromkeys(chosen, int(number))
    arguments.contenders, arguments.repeats = chosen, repeats
    return arguments


def run(
    arguments: argparse.Namespace,
    contenders: Mapping[str, Contender],
    work: Any,
    summarise: Summary,
    *,
    described: Mapping[str, Any],
    also: Sequence[str] = (),
) -> None:
    """Measure one contender (in a process of its own), or all of them in turns.

    Args:
        arguments: From :func:`parse`.
        contenders: By name.
        work: Handed to whoever is measured.
        summarise: From all measurements so far to what goes on top of the file, and a table.
        described: The work, for the file.
        also: More words for the measuring processes.
    """
    if arguments.measure:
        found = _measure(contenders[arguments.measure], work)
        arguments.result.write_text(json.dumps(found, default=str), encoding="utf-8")
        return
    name = Path(sys.argv[0]).stem
    out = arguments.out or _RESULTS / f"{name}.json"
    head = {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *_told()]),
        "machine": machine(),
        "work": dict(described),
        "contenders": {each: contenders[each].words for each in arguments.contenders},
        "repeats": arguments.repeats,
    }
    before = _resumed(out, head) if arguments.resume and out.exists() else Earlier({}, {}, None)
    taken: Results = {each: before.runs.get(each, []) for each in arguments.contenders}
    failed = before.failed
    summary: dict[str, Any] = {}
    table = "Nothing was measured."
    if measured := {key: runs for key, runs in taken.items() if runs}:
        summary, table = summarise(measured)
    for turn in range(max(arguments.repeats.values())):
        for each in arguments.contenders:
            there = any(run["turn"] == turn for run in taken[each])
            if turn >= arguments.repeats[each] or each in failed or there:
                continue
            commit = describe(Path(__file__).parent)["git_commit"]
            found = _in_a_process(each, turn, contenders[each].environment, also)
            if "failed" in found:
                failed[each] = found["failed"]
                print(f"{each} failed:\n{found['failed']}", file=sys.stderr)
            else:
                taken[each].append({"git_commit": commit, **found})
                print(f"{each}, turn {turn + 1}: {found['seconds']:.1f} s", file=sys.stderr)
            if measured := {key: runs for key, runs in taken.items() if runs}:
                summary, table = summarise(measured)
            _write(out, {**head, **summary, "failed": failed, "runs": taken})
    print(table)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def machine() -> dict[str, Any]:
    """Describe what is measured on, and how busy it was."""
    known = {key: value for key, value in describe().items() if key != "platform"}
    said = {name: os.environ[name] for name in _SAID if name in os.environ}
    return {**known, "environment": said, "load_average": os.getloadavg()}


def ratios(taken: Results, contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Divide by whom each is held against: the median over the turns that both have."""
    first = next(iter(taken))
    found = {}
    for name, runs in taken.items():
        against = taken.get(contenders[name].against or first, [])
        other = {run["turn"]: run["seconds"] for run in against}
        both = [run["seconds"] / other[run["turn"]] for run in runs if run["turn"] in other]
        if both:
            found[name] = statistics.median(both)
    return found


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of words as a table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            word.ljust(width) if at == 0 else word.rjust(width)
            for at, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _measure(contender: Contender, work: Any) -> dict[str, Any]:
    load = os.getloadavg()
    began = time.perf_counter()
    found = contender.measure(work)
    seconds = time.perf_counter() - began
    import torch

    return {
        "turn": work.turn,
        "seconds": seconds,
        "torch_threads": torch.get_num_threads(),
        "load_average_before": load,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **found,
    }


def _resumed(path: Path, head: Mapping[str, Any]) -> Earlier:
    """Read what was measured before, and say what becomes of it."""
    now = json.loads(json.dumps(head, default=str))
    try:
        before = earlier(json.loads(path.read_text(encoding="utf-8")), now)
    except OtherWorkError as error:
        print(
            f"--resume: {path} was measured with another {error}. "
            "Give another file with --out, or leave out --resume to begin anew.",
            file=sys.stderr,
        )
        sys.exit(2)
    if before.cut is not None:
        print(f"Turn {before.cut + 1} was cut off: it is measured again.", file=sys.stderr)
    for name in before.failed:
        print(f"{name} failed before and is left out.", file=sys.stderr)
    commits = {run["git_commit"] for runs in before.runs.values() for run in runs}
    if commits - {head["machine"]["git_commit"]}:
        print("Earlier turns are of other commits; each run says which.", file=sys.stderr)
    return before


def _in_a_process(
    name: str, turn: int, environment: Mapping[str, str], also: Sequence[str]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lorasweep-") as scratch:
        result = Path(scratch) / "result.json"
        words = [sys.executable, *sys.argv, *also]
        words += ["--measure", name, "--turn", str(turn), "--result", str(result)]
        done = subprocess.run(
            words, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode or not result.exists():
            tail = (done.stderr or done.stdout).strip().splitlines()[-15:]
            return {"failed": "\n".join(tail) or f"exit code {done.returncode}"}
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _told() -> list[str]:
    """Return the command line's words, but for where results go and that some were there."""
    words, told = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words, None)
        elif word != "--resume" and not word.startswith("--out="):
            told.append(word)
    return told


def _write(path: Path, report: Mapping[str, Any]) -> None:
    """Write all or nothing, so that a run cut off while writing loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    scratch.replace(path)
