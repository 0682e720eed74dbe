"""Search with successive halving: how soon is the best score within half a point of the best?

python benchmarks/halving.py                        # needs: pip install -e '.[bench]'
python benchmarks/halving.py --train-rows 960 --repeats 1
python benchmarks/halving.py --trials 4 --epochs 2 --train-rows 64 --validation-rows 64 --repeats 1

64 trials of at most 4 epochs, halved after the first and the second, on the same space. The best
is the best that any contender found in that turn; the time is from the start of the process, with
imports, model loading, tokenisation and evaluation, to the first evaluation within 0.005 of it.
Beside it stands the mean over all trials of their best score: of points that differ, so it says
whether both train alike, not which search is better.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

from ray_contender import ray_search
from sweep_contender import Search, sweep
from turns import Contender, Results, columns, command_line, parse, ratios, run
from workload import add_work

WITHIN = 0.005

CONTENDERS = {
    "lorasweep": Contender(sweep, "run_sweep: packed engine, TPE, successive halving, MLflow"),
    "ray tune": Contender(
        ray_search,
        "Ray Tune: ASHA, OptunaSearch, a Trainer per trial as it comes (fp32), 1 CPU each",
    ),
    "ray tune, tuned": Contender(
        functools.partial(ray_search, tuned=True),
        "the same, tuned by hand: bf16, batches grouped by length, workers reused",
    ),
}


def reached(evaluations: list[list[float]], target: float) -> float | None:
    """Seconds until a score is as high as the target; None if none ever is."""
    return next((at for at, _, _, score in sorted(evaluations) if score >= target), None)


def mean_best(runs: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """Mean over trials of the best score of each, with its standard error."""
    best: dict[tuple[int, int], float] = {}
    for found in runs:
        for _, trial, _, score in found["evaluations"]:
            which = found["turn"], trial
            best[which] = max(score, best.get(which, score))
    several = len(best) > 1
    error = statistics.stdev(best.values()) / math.sqrt(len(best)) if several else None
    return {
        "mean": statistics.mean(best.values()),
        "standard_error": error,
        "trials": len(best),
    }


def summary(taken: Results) -> tuple[dict[str, Any], str]:
    """Compare the times to the target, turn by turn; who never got there is said to be so."""
    best = {
        (name, run["turn"]): max(score for *_, score in run["evaluations"])
        for name, runs in taken.items()
        for run in runs
    }
    targets = {
        turn: max(score for (_, other), score in best.items() if other == turn) - WITHIN
        for turn in sorted({turn for _, turn in best})
    }
    times = {
        name: {run["turn"]: reached(run["evaluations"], targets[run["turn"]]) for run in runs}
        for name, runs in taken.items()
    }
    first = next(iter(taken))
    whole_of_first = {run["turn"]: run["seconds"] for run in taken[first]}
    whole = ratios(taken, CONTENDERS)
    report: dict[str, Any] = {
        "target_f1_by_turn": targets,
        "seconds_to_target_by_turn": times,
        "best_f1_by_turn": {
            name: {run["turn"]: best[name, run["turn"]] for run in runs}
            for name, runs in taken.items()
        },
        "mean_best_f1": {name: mean_best(runs) for name, runs in taken.items()},
        "times_as_long_to_target_as": {first: {}},
        "times_as_long_in_all_as": {first: whole},
    }
    signs = {(False, False): "", (True, False): "> ", (False, True): "< ", (True, True): "~ "}
    head = ["contender", "runs", "best F1", "mean best F1 of trials"]
    rows = [[*head, "s to target", "× as long", "s in all", "× as long"]]
    for name, runs in taken.items():
        # Who never reached it would have taken longer than all its time: where that is the first
        # contender, the ratio is at most this; where it is the other, at least. Where neither
        # did, there is none.
        both = [
            (
                (own or run["seconds"]) / (base or whole_of_first[turn]),
                own is None,
                base is None,
            )
            for run in runs
            if (turn := run["turn"]) in times[first]
            and ((own := times[name][turn]), (base := times[first][turn])) != (None, None)
        ]
        never = sum(found is None for found in times[name].values())
        ratio = statistics.median(one for one, _, _ in both) if both else None
        at_least, at_most = sum(bound for _, bound, _ in both), sum(bound for *_, bound in both)
        if name == first:
            ratio, at_least, at_most = 1.0, 0, 0
        report["times_as_long_to_target_as"][first][name] = {
            "ratio": ratio,
            "never": never,
            "at_least": at_least,
            "at_most": at_most,
        }
        mean, error, trials = report["mean_best_f1"][name].values()
        known = [found for found in times[name].values() if found is not None]
        rows.append(
            [
                name,
                str(len(runs)),
                f"{statistics.median(best[name, run['turn']] for run in runs):.4f}",
                f"{mean:.4f}" + (f" ± {error:.4f}" if error is not None else "") + f" ({trials})",
                (f"{statistics.median(known):.1f}" if known else "–")
                + (f" (never in {never})" if never else ""),
                signs[bool(at_least), bool(at_most)] + f"{ratio:.2f}" if ratio else "–",
                f"{statistics.median(run['seconds'] for run in runs):.1f}",
                f"{whole[name]:.2f}" if name in whole else "–",
            ]
        )
    goals = ", ".join(f"{target:.4f}" for target in targets.values())
    legend = "× to target: > in some turn at least, < at most, ~ both, where one never got there."
    return report, f"{columns(rows)}\n{legend}\nTarget F1, turn by turn: {goals}."


def main() -> None:
    parser = command_line(__doc__, CONTENDERS, tuple(CONTENDERS))
    add_work(parser, trials=64, epochs=(4,))
    arguments = parse(parser, CONTENDERS)
    if len(arguments.epochs) > 1:
        parser.error("--epochs: one number, the budget of every trial")
    work = Search(
        trials=arguments.trials,
        epochs=tuple(arguments.epochs[:1]),
        train_rows=arguments.train_rows,
        validation_rows=arguments.validation_rows,
        lanes=arguments.lanes,
        turn=arguments.turn,
    )
    run(
        arguments,
        CONTENDERS,
        work,
        summary,
        described={"model": work.model, "within": WITHIN, **work.described()},
    )


if __name__ == "__main__":
    main()
