"""How each command of a sweep trained: one line a command, kept until the report is written."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lorasweep.core.engine_use import EngineUse, in_mebibytes
from lorasweep.model.checkpoint import storing, write_whole

_STUDY = "study"
_WHAT = "how the engine trained"


def keep(ledger: Path, use: EngineUse, study: str) -> None:
    """Append what a command did.

    Args:
        ledger: The sweep's ``engine.jsonl``; made when it isn't there.
        use: What was done.
        study: Id of the study that the command worked on.

    Raises:
        StorageError: The file can't be written.
    """
    line = json.dumps(asdict(use) | {_STUDY: study}).encode() + b"\n"
    with storing(ledger, _WHAT):
        before = ledger.read_bytes() if ledger.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    # Written anew and put in place, so that a kill leaves no half a line behind; what can't be
    # read of earlier lines stays as it is.
    write_whole(ledger, before + line, _WHAT)


def kept(ledger: Path, study: str | None = None) -> tuple[EngineUse, ...]:
    """What earlier commands did, the first one first; keys of other versions are passed over.

    Args:
        ledger: The sweep's ``engine.jsonl``; it may not be there.
        study: Id of the study whose commands are asked for, so that those of one that was deleted
            are passed over; None for all. A line of a version that named no study always counts.
    """
    known = {field.name for field in fields(EngineUse)}
    return tuple(
        EngineUse(**{key: value for key, value in line.items() if key in known})
        for line in _lines(ledger)
        if study is None or line.get(_STUDY, study) == study
    )


def _lines(ledger: Path) -> tuple[dict[str, Any], ...]:
    """Every line that can be read; a sweep doesn't stop for one that was damaged."""
    if not ledger.exists():
        return ()
    found = []
    for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return tuple(one for one in found if isinstance(one, dict))


def metrics(use: EngineUse) -> dict[str, float]:
    """The numbers that a sweep's own run shows; none that the engine has no word for."""
    found = {
        "engine/lanes": use.lanes,
        "engine/trials_at_once": use.trials_at_once,
        "engine/busy_share": use.busy_share,
        "engine/step_time_share": use.step_time_share,
        "engine/real_token_share": use.real_share,
        "engine/halvings": use.halvings,
        "engine/bytes_per_lane": use.bytes_per_lane,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def sentence(use: EngineUse) -> str:
    """What a pack did, for people; empty where there was none."""
    at_once, busy, real = use.trials_at_once, use.busy_share, use.real_share
    stepping = use.step_time_share
    if at_once is None or busy is None or real is None:
        return ""
    told = (
        f"The pack trained {at_once:.1f} trials at a time; {busy:.0%} of the places that "
        f"there was a trial for were busy; {real:.0%} of the tokens computed were real"
    )
    if stepping is not None:
        told += f"; {stepping:.0%} of the time went into steps"
    if use.bytes_per_lane is not None:
        told += f"; one more lane would take about {in_mebibytes(use.bytes_per_lane)}"
    if use.halvings:
        told += f"; memory ran out and the lanes were halved, {use.halvings} ×"
    return f"{told}."
