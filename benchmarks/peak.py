"""Hold the pack's useful arithmetic against the matrix-product peak of the same process.

python benchmarks/peak.py                                  # 60 steps of 8 lanes, three processes
python benchmarks/peak.py "packed" "kernels off"
python benchmarks/peak.py "packed" "tcmalloc"              # wants Debian's libtcmalloc-minimal4
python benchmarks/peak.py --steps 4 --lanes 2 --repeats 1

After every eighth step of the pack, torch multiplies matrices of the pack's own shapes and dtype: T
tokens by the base's weights, T being the median step's tokens. The first steps, in which oneDNN
compiles and the heap grows, don't count. The peak is the rate of the fastest shape, by torch.mm, by
F.linear or by a weight laid out before, as the pack's are, whichever is fastest. Only useful
operations count for the pack: useful_flops.py says which, and torch's own counter agrees with it on
the plain PEFT model.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packed_contender import BestScores, opened
from turns import Contender, Results, columns, command_line, parse, run
from useful_flops import Shape, counted_by_torch, useful_flops
from workload import BATCH_SIZE, EVAL_BATCH_SIZE, Work, add_work, work_of

from lorasweep.core.outcomes import StepReport
from lorasweep.core.plans import EngineSettings

_WARM_UP = 15
_PRODUCTS_EVERY = 8  # steps: more often, and their buffers would be in the pack's way
_TCMALLOC, _ITS_PACKAGE = "libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"
_SHORTEST = 0.01  # seconds that a timed product is repeated for


class Products:
    """Matrix products of a pack's shapes, to be timed between its steps.

    Args:
        tokens: Rows of the left operand.
        shape: Of the model.
        dtype: Of the pack's base.
        device: Where it computes.
    """

    def __init__(self, tokens: int, shape: Shape, dtype: Any, device: Any) -> None:
        import torch
        from torch import nn

        from lorasweep.model.frozen_linear import FrozenLinear

        d, f = shape.hidden, shape.inner
        self.tokens = tokens
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.rates: dict[str, list[float]] = {}
        self._operands = {}
        for name, (inside, outside) in {"square": (d, d), "up": (d, f), "down": (f, d)}.items():
            left = torch.randn(tokens, inside, dtype=dtype, device=device)
            right = torch.randn(inside, outside, dtype=dtype, device=device)
            layer = nn.Linear(inside, outside, bias=False, device=device, dtype=dtype)
            laid_out = FrozenLinear(layer.requires_grad_(False))
            laid_out.lay_out()
            self._operands[name] = (left, right, right.t().contiguous(), laid_out)

    def measure(self) -> None:
        """Time each shape once more, by the fastest of torch's ways."""
        import torch
        import torch.nn.functional as F

        for name, (left, right, turned, laid_out) in self._operands.items():
            operations = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            ways: list[Callable[[], Any]] = [
                lambda a=left, b=right: torch.mm(a, b),
                lambda a=left, b=turned: F.linear(a, b),
                lambda a=left, b=laid_out: b.product(a),
            ]
            seconds = min(self._seconds(way) for way in ways)
            self.rates.setdefault(name, []).append(operations / seconds)

    def medians(self) -> dict[str, float]:
        """Median rate of each shape, operations a second."""
        return {name: statistics.median(rates) for name, rates in self.rates.items()}

    def _seconds(self, way: Callable[[], Any]) -> float:
        way()
        self.wait()
        began, times = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < _SHORTEST or not times:
            way()
            times += 1
            self.wait()
        return spent / times


class StepWatch(BestScores):
    """A reporter that times each step of the pack, and multiplies matrices between some."""

    def __init__(self, labels: Any, lanes: int, products: Products) -> None:
        super().__init__(labels)
        self.lanes, self.products = lanes, products
        self.seconds: list[float] = []
        self._reports, self._resumed = 0, time.perf_counter()

    def stepped(self, report: StepReport) -> None:
        """Called for each lane at the end of each step."""
        del report
        self._reports += 1
        if self._reports % self.lanes:
            return
        self.products.wait()
        self.seconds.append(time.perf_counter() - self._resumed)
        if len(self.seconds) % _PRODUCTS_EVERY == 1:
            self.products.measure()
        self._resumed = time.perf_counter()


def peak(work: Work) -> dict[str, Any]:
    """Train a few steps of a full pack, and relate its arithmetic to its time and to the peak."""
    from lorasweep.data.order import epoch_batches
    from lorasweep.engines.packed import PackedEngine

    base, train, validation = opened(work)
    shape = Shape.of(base.config)
    row, rank = int(train.lengths.max()), 8
    formula = sum(useful_flops(shape, [([row], rank)], first_token_only=False).values())
    agreement = counted_by_torch(base, row, rank) / formula
    if abs(agreement - 1) > 0.01:
        raise RuntimeError(f"torch counts {agreement:.3f} times the operations of the formula")

    settings = EngineSettings(eval_batch_size=EVAL_BATCH_SIZE, log_every=1)
    engine = PackedEngine(base, train, validation, settings, work.lanes)
    with tempfile.TemporaryDirectory() as folder:
        plans = dataclasses.replace(work, trials=engine.capacity).plans(Path(folder))
        batches = [epoch_batches(train.lengths, BATCH_SIZE, plan.seed, 0) for plan in plans]
        steps = [
            [
                (train.lengths[rows].tolist(), plan.adapter.rank)
                for rows, plan in zip(step, plans, strict=True)
            ]
            for step in zip(*batches, strict=True)
        ]
        tokens = [sum(sum(lengths) for lengths, _ in step) for step in steps]
        products = Products(
            int(statistics.median(tokens)), shape, engine.model.dtype, engine.device
        )
        watch = StepWatch(validation.labels, len(plans), products)
        failed = [o.reason for o in engine.run(plans, watch) if o.state != "completed"]
    if failed or len(watch.seconds) != len(steps):
        raise RuntimeError(f"the pack did not go as planned: {failed or len(watch.seconds)}")
    return {
        "lanes": len(plans),
        "precision": engine.precision,
        "torch_counts_of_formula": agreement,
        "tokens_in_median_step": products.tokens,
        "f1": [watch.best[number] for number in range(len(plans))],
        **_related([useful_flops(shape, step) for step in steps], watch.seconds, products),
    }


def _related(
    flops: list[dict[str, int]], seconds: list[float], products: Products
) -> dict[str, Any]:
    """Relate useful operations, time, and what torch's products would take at best."""
    warm = min(_WARM_UP, len(seconds) - 1)
    flops, seconds = flops[warm:], seconds[warm:]
    rates = products.medians()
    parts = {part: sum(step[part] for step in flops) for part in flops[0]}
    spent = sum(seconds)
    rate = sum(parts.values()) / spent
    base = parts["square"] / rates["square"]
    base += parts["wide"] / 2 / rates["up"] + parts["wide"] / 2 / rates["down"]
    return {
        "steps": len(seconds),
        "median_step_seconds": statistics.median(seconds),
        "useful_gflops_a_step": sum(parts.values()) / len(seconds) / 1e9,
        "useful_shares": {part: count / sum(parts.values()) for part, count in parts.items()},
        "useful_gflops_a_second": rate / 1e9,
        "product_gflops_a_second": {name: found / 1e9 for name, found in rates.items()},
        "share_of_peak": rate / max(rates.values()),
        # What the frozen base's products would take at the rates measured between the steps.
        "share_of_time_outside_base_products": 1 - base / spent,
    }


def with_tcmalloc(work: Work) -> dict[str, Any]:
    """Do the same where the process was started with tcmalloc: the loader only warns if not."""
    if _TCMALLOC not in Path("/proc/self/maps").read_text(encoding="utf-8"):
        raise RuntimeError(f"{_TCMALLOC} was not loaded; on Debian: apt install {_ITS_PACKAGE}")
    return peak(work)


CONTENDERS = {
    "packed": Contender(peak, "the packed engine"),
    "kernels off": Contender(
        peak, "without compiled kernels and allocator", {"LORASWEEP_KERNELS": "0"}
    ),
    "tcmalloc": Contender(
        with_tcmalloc,
        "the packed engine, tcmalloc for what isn't a large tensor",
        {"LD_PRELOAD": _TCMALLOC},
    ),
}
_MEDIANS = (
    "share_of_peak",
    "share_of_time_outside_base_products",
    "useful_gflops_a_second",
    "median_step_seconds",
)


def summary(taken: Results) -> tuple[dict[str, Any], str]:
    """Medians over the turns."""
    found = {
        name: {key: statistics.median(run[key] for run in runs) for key in _MEDIANS}
        for name, runs in taken.items()
    }
    head = ["contender", "runs", "ms a step", "useful GFLOP/s", "of peak", "outside base products"]
    rows = [[*head, "mean best F1"]]
    for name, one in found.items():
        share, outside, rate, step = (one[key] for key in _MEDIANS)
        words = [f"{1000 * step:.0f}", f"{rate:.0f}", f"{share:.1%}", f"{outside:.1%} of time"]
        scores = [score for run in taken[name] for score in run.get("f1", ())]
        words.append(f"{statistics.mean(scores):.4f}" if scores else "–")
        rows.append([name, str(len(taken[name])), *words])
    run = next(iter(taken.values()))[0]
    shapes = ", ".join(
        f"{name} {rate:.0f}" for name, rate in run["product_gflops_a_second"].items()
    )
    said = (
        f"torch's products at {run['tokens_in_median_step']} tokens, first run: {shapes} GFLOP/s."
    )
    return {"medians": found}, f"{columns(rows)}\n{said}"


def main() -> None:
    parser = command_line(__doc__, CONTENDERS, ("packed",))
    add_work(parser, epochs=(1,))
    parser.add_argument("--steps", type=int, default=60, help="of the pack (%(default)s)")
    parser.set_defaults(validation_rows=64, lanes=8)
    arguments = parse(parser, CONTENDERS)
    if arguments.lanes != "auto":
        arguments.trials = arguments.lanes  # one trial a lane, all at once
    arguments.train_rows = arguments.steps * BATCH_SIZE
    work = work_of(arguments)
    described = {"model": work.model, "steps": arguments.steps, **work.described()}
    run(arguments, CONTENDERS, work, summary, described=described)


if __name__ == "__main__":
    main()
