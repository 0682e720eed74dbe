"""Train a pack in less memory than all its lanes need, and print how that went.

A script of its own, since the limit is the whole process's: ``python tight_memory.py FOLDER``.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.outcomes import EpochEvaluation, StepReport, TrialFacts, Verdict
from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine
from lorasweep.model.base import open_base
from lorasweep.spec.schema import ModelSpec

LANES = 8
ROOM = 3  # lanes, as they are measured: too little for eight, more than for two


class Silent:
    def started(self, trial: int, facts: TrialFacts) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def shrank(self, lanes: int, why: str) -> None:
        print(f"{why}: {lanes} lanes", file=sys.stderr)

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        return Verdict(keep=False, go_on=True)


def split_of(rows: int, tokens: int) -> EncodedSplit:
    rng = np.random.default_rng(rows)
    return EncodedSplit(
        name="some",
        tokens=rng.integers(5, 900, rows * tokens).astype(np.int32),
        offsets=np.arange(0, (rows + 1) * tokens, tokens),
        labels=np.arange(rows) % 2,
    )


def plan(number: int, folder: Path) -> TrialPlan:
    return TrialPlan(
        number=number,
        seed=number,
        adapter=AdapterPlan(rank=8, alpha=16.0, dropout=0.1),
        learning_rate=1e-3,
        epochs=1,
        batch_size=16,
        weight_decay=0.0,
        warmup=0.0,
        scheduler="linear",
        max_grad_norm=1.0,
        folder=folder / str(number),
    )


def main(folder: Path) -> None:
    base = open_base(ModelSpec(name="embedded/minilm", max_length=128), ("no", "yes"))
    settings = EngineSettings(precision="fp32", device="cpu")
    engine = PackedEngine(base, split_of(32, 128), split_of(8, 64), settings, LANES)
    room = int(ROOM * (engine.measure_lane() or 0))
    engine.use.bytes_per_lane = None  # or it would be halved before memory runs out
    # What the process may write to and shares with nobody; addresses alone are no memory.
    taken = Path("/proc/self/statm").read_text(encoding="ascii").split()[5]
    limit = int(taken) * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    outcomes = list(engine.run([plan(n, folder) for n in range(LANES)], Silent()))
    print(
        json.dumps(
            {
                "halved": engine.use.halved,
                "lanes": engine.capacity,
                "ends": {o.trial: (o.state.value, o.steps, o.reason) for o in outcomes},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
