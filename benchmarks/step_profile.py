"""Where the time of a pack's step goes, operation by operation, as torch's profiler sees it.

python benchmarks/step_profile.py                             # MiniLM and DistilBERT's shape
python benchmarks/step_profile.py "minilm" --lanes 4 --repeats 1     # as many trials as lanes

Whole passes, so that all of a step happens in one thread's sight; the first steps, in which oneDNN
compiles, don't count. Loops compiled from C appear as the operation that calls them, AdamW's
additions among the others.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from distilbert import make_model
from packed_contender import BestScores, opened
from turns import Contender, Results, columns, command_line, parse
from workload import BATCH_SIZE, EVAL_BATCH_SIZE, MINILM, Work, add_work, run_on_made

from lorasweep.core.outcomes import StepReport
from lorasweep.core.plans import EngineSettings

_WARM_UP = 20
_PROFILED = 8  # steps
_KINDS = {
    "the base's products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
    "LoRA and heads": ("AdaptedLinear", "LaneLinear", "aten::_grouped_mm"),
    "attention": ("CompiledAttention", "RowAttention", "aten::bmm", "aten::_softmax"),
    "GELU": ("aten::gelu",),
    "dropout outside LoRA and attention": ("Dropout",),
    "norms": ("aten::native_layer_norm",),
    "additions": ("aten::add",),
    "AdamW and clipping": ("aten::sqrt", "aten::lerp", "aten::div", "aten::linalg_vector_norm"),
}
_EXACTLY = {"aten::addcmul_": "AdamW and clipping", "aten::mul_": "AdamW and clipping"}


class ProfiledSteps(BestScores):
    """A reporter that has some steps of a full pack profiled."""

    def __init__(self, labels: Any, lanes: int, steps: int) -> None:
        super().__init__(labels)
        self.lanes, self.steps = lanes, steps
        self.found: dict[str, float] = {}
        self._reports = 0
        self._profile: Any = None

    def shrank(self, lanes: int, why: str) -> None:
        """Steps could no longer be told from one another."""
        raise RuntimeError(f"{why}: {lanes} lanes; too few to profile {self.lanes}")

    def stepped(self, report: StepReport) -> None:
        """Called for each lane at the end of each step."""
        import torch

        del report
        self._reports += 1
        if self._reports == _WARM_UP * self.lanes:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self._profile.start()
        elif self._reports == (_WARM_UP + self.steps) * self.lanes:
            self._profile.stop()
            averages = self._profile.key_averages()
            self.found = {one.key: one.self_cpu_time_total / 1000 for one in averages}


def profiled(work: Work, *, model: str | None = MINILM) -> dict[str, Any]:
    """Profile some steps of a pack of as many trials as lanes; of the work's own model if None."""
    from lorasweep.engines.packed import PackedEngine

    base, train, validation = opened(dataclasses.replace(work, model=model or work.model))
    settings = EngineSettings(eval_batch_size=EVAL_BATCH_SIZE, log_every=1)
    engine = PackedEngine(base, train, validation, settings, work.trials)
    engine.passes.most = 1
    all_steps = -(-len(train.labels) // BATCH_SIZE) * work.epochs[0]
    if (steps := min(_PROFILED, all_steps - _WARM_UP)) < 1:
        raise RuntimeError(f"{all_steps} steps are too few: {_WARM_UP} come before the profile")
    watch = ProfiledSteps(validation.labels, work.trials, steps)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(engine.run(work.plans(Path(folder)), watch))
    if failed := [one.reason for one in outcomes if one.state != "completed"]:
        raise RuntimeError("; ".join(failed))
    kinds = dict.fromkeys((*_KINDS, "the rest"), 0.0)
    for name, spent in watch.found.items():
        kinds[kind_of(name)] += spent / steps
    most = sorted(watch.found.items(), key=lambda one: -one[1])[:20]
    return {
        "precision": engine.precision,
        "lanes": work.trials,
        "profiled_steps": steps,
        "milliseconds_a_step": kinds,
        "operations": {name: spent / steps for name, spent in most},
    }


def kind_of(name: str) -> str:
    """The kind that an operation belongs to."""
    if name in _EXACTLY:
        return _EXACTLY[name]
    return next((kind for kind, starts in _KINDS.items() if name.startswith(starts)), "the rest")


CONTENDERS = {
    "minilm": Contender(profiled, "embedded/minilm", comparable=False),
    "distilbert": Contender(
        functools.partial(profiled, model=None),
        "DistilBERT's shape, random weights",
        comparable=False,
    ),
}


def summary(taken: Results) -> tuple[dict[str, Any], str]:
    """Shares of a step, medians over the turns."""
    shares = {
        name: {
            kind: statistics.median(
                one["milliseconds_a_step"][kind] / sum(one["milliseconds_a_step"].values())
                for one in runs
            )
            for kind in runs[0]["milliseconds_a_step"]
        }
        for name, runs in taken.items()
    }
    kinds = (*_KINDS, "the rest")
    rows = [["share of a step", *taken]]
    rows += [[kind, *(f"{shares[name][kind]:.1%}" for name in taken)] for kind in kinds]
    step = {
        name: statistics.median(sum(one["milliseconds_a_step"].values()) for one in runs)
        for name, runs in taken.items()
    }
    rows.append(["ms a step, profiled", *(f"{step[name]:.0f}" for name in taken)])
    return {"share_of_a_step": shares, "median_milliseconds_a_step": step}, columns(rows)


def main() -> None:
    parser = command_line(__doc__, CONTENDERS, tuple(CONTENDERS))
    add_work(parser, epochs=(1,), made=True)
    parser.set_defaults(train_rows=32 * BATCH_SIZE, validation_rows=64, lanes=16)
    arguments = parse(parser, CONTENDERS)
    if len(arguments.epochs) > 1:
        parser.error("--epochs: one number, or lanes would end at steps of their own")
    arguments.trials = 16 if arguments.lanes == "auto" else arguments.lanes  # all at once
    model = "embedded/minilm and DistilBERT's shape, random weights"
    run_on_made(make_model, arguments, CONTENDERS, summary, model=model)


if __name__ == "__main__":
    main()
