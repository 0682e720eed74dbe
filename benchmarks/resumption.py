"""Which turns of an earlier run a benchmark may keep when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What of the machine may change between two turns; of each run its commit is noted.
_PASSING = ("git_commit", "git_dirty", "load_average")


class OtherWorkError(Exception):
    """The file was measured with something else; names what."""


@dataclass(frozen=True)
class Earlier:
    """What is kept.

    Attributes:
        runs: Of each contender, its runs in whole turns.
        failed: Who failed before, and why. They aren't tried again: their time would be of
            another hour than that which it is divided by.
        cut: The last turn, if somebody who should have taken part has not.
    """

    runs: dict[str, list[dict[str, Any]]]
    failed: dict[str, str]
    cut: int | None


def earlier(before: Mapping[str, Any], now: Mapping[str, Any]) -> Earlier:
    """Look at a file of results.

    Args:
        before: The file.
        now: The head of what is going to be measured, as JSON would give it back.

    Raises:
        OtherWorkError: Work, contenders or machine differ, or a turn that ended would have had
            other contenders: a ratio is that of one turn.
    """
    unlike = [] if before.get("benchmark") == now["benchmark"] else ["benchmark"]
    for part in ("work", "contenders", "machine"):
        unlike += _unlike(before.get(part, {}), now[part])
    runs: dict[str, list[dict[str, Any]]] = before["runs"]
    failed: dict[str, str] = before.get("failed", {})
    last = max((run["turn"] for found in runs.values() for run in found), default=-1)
    # Files written before repeats were noted: whoever was measured was wanted.
    had = before.get("repeats") or {name: len(found) for name, found in runs.items()}
    for name in had.keys() & now["repeats"].keys():
        then, wanted = (min(each["repeats"][name], last + 1) for each in ({"repeats": had}, now))
        if then != wanted and name not in failed:
            unlike.append(f"--repeats of {name}")
    if unlike:
        raise OtherWorkError(", ".join(unlike))
    missed = [
        name
        for name, found in runs.items()
        if name not in failed and had[name] > last and last not in {run["turn"] for run in found}
    ]
    cut = last if missed and last >= 0 else None
    commit = before["machine"].get("git_commit")
    kept = {
        name: [{"git_commit": commit, **run} for run in found if run["turn"] != cut]
        for name, found in runs.items()
    }
    return Earlier(kept, dict(failed), cut)


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = (before.keys() | now.keys()) - set(_PASSING)
    return sorted(name for name in names if before.get(name) != now.get(name))
