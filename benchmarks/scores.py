"""What the trials scored, beside how long they took: is a difference more than seeds explain?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from turns import Contender, Results, columns, ratios


def summary(taken: Results, contenders: Mapping[str, Contender]) -> tuple[dict[str, Any], str]:
    """Summarise times and scores: for the file, and as a table.

    The noise of seeds is the standard deviation of one point's score over turns, which differ
    in nothing but seeds, pooled over points and contenders. A mean over n trials in k turns is
    then uncertain by ``noise / sqrt(n k)``.

    Differences are of the same trial in the same turn, so that points and the cut of the data
    don't add to their noise, which is that of the differences themselves.
    """
    times = ratios(taken, contenders)
    noise, freedom = seed_noise(taken, contenders)
    first = next(iter(taken))
    report: dict[str, Any] = {
        "median_seconds": {name: _median(runs) for name, runs in taken.items()},
        "times_as_long_as": {
            name: {contenders[name].against or first: ratio} for name, ratio in times.items()
        },
        "mean_best_f1": {},
        "seed_noise": {"standard_deviation_of_a_trial": noise, "degrees_of_freedom": freedom},
    }
    rows = [["contender", "runs", "median s", "× as long", "mean best F1", "difference"]]
    for name, runs in taken.items():
        found = _score(runs, noise)
        against = taken.get(contenders[name].against or first, runs)
        found["comparable"] = contenders[name].comparable
        words = ""
        if against is not runs and contenders[name].comparable:
            found |= _difference(runs, against)
            if "difference" in found:
                words = f"{found['difference']:+.4f}" + _error(
                    found["standard_error_of_difference"]
                )
        report["mean_best_f1"][name] = found
        ratio = f"{times[name]:.2f}" if name in times else "–"
        score = f"{found['mean']:.4f}" + _error(found.get("standard_error"))
        if not contenders[name].comparable:
            score, words = "–", "time only"
        rows.append([name, str(len(runs)), f"{_median(runs):.1f}", ratio, score, words])
    said = (
        "± one standard error by the noise of seeds"
        f" ({noise:.4f} for one trial, {freedom} degrees of freedom)."
        if noise is not None
        else "No contender ran twice, so the noise of seeds isn't known."
    )
    return report, f"{columns(rows)}\n{said}"


def seed_noise(taken: Results, contenders: Mapping[str, Contender]) -> tuple[float | None, int]:
    """Pool the standard deviation of a point's score over turns; None where nobody ran twice.

    Returns:
        The standard deviation, and its degrees of freedom.
    """
    squares, freedom = 0.0, 0
    for name, runs in taken.items():
        if len(runs) < 2 or not contenders[name].comparable:
            continue
        for scores in zip(*(run["f1"] for run in runs), strict=True):
            squares += statistics.variance(scores) * (len(scores) - 1)
            freedom += len(scores) - 1
    return (math.sqrt(squares / freedom) if freedom else None), freedom


def _score(runs: list[dict[str, Any]], noise: float | None) -> dict[str, Any]:
    everything = [score for run in runs for score in run["f1"]]
    found = {"mean": statistics.mean(everything)}
    if noise is not None:
        found["standard_error"] = noise / math.sqrt(len(everything))
    return found


def _difference(runs: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the same trials in the turns that both have had part in."""
    others = {run["turn"]: run["f1"] for run in against}
    differences = [
        score - other
        for run in runs
        if run["turn"] in others
        for score, other in zip(run["f1"], others[run["turn"]], strict=True)
    ]
    if not differences:
        return {}
    several = len(differences) > 1
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if several else None
    return {
        "difference": statistics.mean(differences),
        "standard_error_of_difference": error,
        "pairs": len(differences),
    }


def _median(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"
