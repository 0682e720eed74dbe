"""Time the same fixed trials with each contender, and write ratios within one run as JSON.

    python benchmarks/makespan.py                      # packed, tuned and as shipped
    python benchmarks/makespan.py --trials 4 --train-rows 640 --validation-rows 200 --repeats 1
    python benchmarks/makespan.py packed "one lane" fp32 "no dropout"      # an ablation

Every measurement is a process of its own, so nothing is warm and nobody inherits memory.
Contenders take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from contenders import CONTENDERS
from workload import Work

from lorasweep.tracking.environment import describe


def main() -> None:
    arguments = _parse()
    work = Work(arguments.trials, arguments.epochs, arguments.train_rows, arguments.validation_rows)
    if arguments.measure:
        print(json.dumps(_measure(arguments.measure, work)))
        return
    taken: dict[str, list[dict]] = {name: [] for name in arguments.contenders}
    for turn in range(arguments.repeats):
        for name in arguments.contenders:
            taken[name].append(_in_a_process(name))
            seconds = taken[name][-1]["seconds"]
            print(f"{name}, turn {turn + 1}: {seconds:.1f} s", file=sys.stderr)
    medians = {
        name: statistics.median(result["seconds"] for result in results)
        for name, results in taken.items()
    }
    first = arguments.contenders[0]
    ratios = {name: seconds / medians[first] for name, seconds in medians.items()}
    report = {
        "work": {**asdict(work), "points": work.points()},
        "machine": {**describe(), "load_average": os.getloadavg()},
        "median_seconds": medians,
        "times_as_long_as": {first: ratios},
        "mean_best_f1": {
            name: statistics.mean(score for result in results for score in result["f1"])
            for name, results in taken.items()
        },
        "runs": taken,
    }
    text = json.dumps(report, indent=1, default=str)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def _measure(name: str, work: Work) -> dict:
    began = time.perf_counter()
    found = CONTENDERS[name](work)
    return {"seconds": time.perf_counter() - began, **found}


def _in_a_process(name: str) -> dict:
    words = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="*", default=["packed", "tuned", "as shipped"])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--validation-rows", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.contenders) - set(CONTENDERS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(CONTENDERS)}")
    return arguments


if __name__ == "__main__":
    main()
