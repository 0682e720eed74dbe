"""Time trials of unequal epochs with places refilled at once, and with fixed packs.

python benchmarks/refill.py --lanes 4
python benchmarks/refill.py --lanes 2 --trials 4 --train-rows 160 --validation-rows 64 --repeats 1

Lanes should be fewer than trials, else nothing is refilled. How busy the lanes are is counted
twice, by steps: over the whole run, and while plans remained, that is until the last trial was
started. Between steps all lanes stand still (evaluation, new lanes): the last column.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

from packed_contender import packed
from scores import summary
from turns import Contender, Results, columns
from workload import time_trials

CONTENDERS = {
    "refilled": Contender(packed, "a lane that ends is given the next trial at the next step"),
    "fixed packs": Contender(
        functools.partial(packed, packs="fixed"),
        "packs in the trials' order; the next one starts when the longest trial of this one ended",
    ),
    "equal epochs": Contender(
        functools.partial(packed, packs="of equal epochs"),
        "fixed packs of trials sorted by epochs: only for who knows all trials and prunes none",
    ),
}
_BUSY = ("lanes_busy_while_plans_remained", "lanes_busy")


def busy(taken: Results) -> tuple[dict[str, Any], str]:
    """Add to times and scores how busy the lanes were."""
    report, table = summary(taken, CONTENDERS)
    rows = [["lanes busy", "while plans remained", "overall", "pack steps", "time in steps"]]
    report["lanes_busy"], report["step_time_share"] = {}, {}
    for name, runs in taken.items():
        shares = {
            key: statistics.median(found)
            for key in _BUSY
            if (found := [run[key] for run in runs if run[key] is not None])
        }
        report["lanes_busy"][name] = shares
        words = [f"{shares[key]:.1%}" if key in shares else "–" for key in _BUSY]
        # Runs that an older version measured don't know it.
        known = [run["step_time_share"] for run in runs if "step_time_share" in run]
        in_steps = report["step_time_share"][name] = statistics.median(known) if known else None
        told = "–" if in_steps is None else f"{in_steps:.1%}"
        rows.append([name, *words, str(runs[0]["pack_steps"]), told])
    return report, f"{table}\n\n{columns(rows)}"


def main() -> None:
    time_trials(__doc__, CONTENDERS, tuple(CONTENDERS), busy, epochs=(1, 4, 2, 3), lanes=4)


if __name__ == "__main__":
    main()
