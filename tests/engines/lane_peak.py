"""Train a pack of so many lanes, and print what a lane was said to take and the process's peak.

A script of its own, since the peak is the whole process's:
``python lane_peak.py LANES FOLDER PRECISION``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tight_memory import Silent, plan, split_of

from lorasweep.core.plans import AdapterPlan, EngineSettings, LargestTrial
from lorasweep.engines.packed import PackedEngine
from lorasweep.model.base import open_base
from lorasweep.spec.schema import ModelSpec


def main(lanes: int, folder: Path, precision: str) -> None:
    base = open_base(ModelSpec(name="embedded/minilm", max_length=128), ("no", "yes"))
    largest = LargestTrial(16, (AdapterPlan(8, 16.0, 0.1),))
    settings = EngineSettings(precision=precision, device="cpu", largest=largest)
    # Eight steps of rows of equal length, an evaluation, and no fragments of other sizes.
    engine = PackedEngine(base, split_of(128, 64), split_of(64, 64), settings, lanes)
    claim = engine.measure_lane()
    engine.use.bytes_per_lane = None  # or it might be halved on a small machine
    outcomes = list(engine.run([plan(n, folder) for n in range(lanes)], Silent()))
    assert [outcome.reason for outcome in outcomes] == [""] * lanes
    assert engine.use.halved == 0
    print(json.dumps({"claim": claim, "peak": peak_bytes()}))


def peak_bytes() -> int:
    """Peak of this program. (``ru_maxrss`` has that of the process that started it, too.)"""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel doesn't tell a process's peak")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
