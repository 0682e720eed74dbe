"""A pack's products don't multiply with its lanes, and each trial has masks of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from recorder import Recorder, keep_nothing
from torch.utils._python_dispatch import TorchDispatchMode

from lorasweep.core.plans import AdapterPlan, EngineSettings, TrialPlan
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.packing import Progress
from lorasweep.model import packed_modules
from lorasweep.model.frozen_linear import lays_out
from lorasweep.model.kernel_library import Kernels
from lorasweep.model.kernels import loaded_kernels
from lorasweep.model.packed_dropout import Mask, lane_key, module_key, rate_byte, token_keys

OF_BASE = "_linear_pointwise"  # by weights laid out before
PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "linear",
    "matmul",
    "mv",
    "dot",
    OF_BASE,
}
QUERY, VALUE = (f"bert.encoder.layer.{{}}.attention.self.{name}" for name in ("query", "value"))


@pytest.fixture
def engine(open_tiny, splits) -> Callable[..., PackedEngine]:
    def make(
        lanes: int, architecture: str = "bert", precision: str = "fp32", **spec: object
    ) -> PackedEngine:
        settings = EngineSettings(precision=precision, device="cpu", log_every=1)
        made = PackedEngine(open_tiny(architecture, **spec), *splits, settings, lanes)
        made.passes.most = 1
        return made

    return make


class Counted(TorchDispatchMode):
    """Counts what torch is asked for, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def compiled_products(monkeypatch) -> Counter[str]:
    """Counts what the compiled kernels multiply, which torch never sees."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(Kernels, name)

        def call(self, *args):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Kernels, name, call)

    counted("product")
    counted("outer")
    return calls


@pytest.mark.parametrize(
    ("precision", "kernels"), [("fp32", "compiled"), ("fp32", "torch"), ("bf16", "compiled")]
)
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_a_step_of_eight_lanes_has_the_products_of_a_step_of_two(
    architecture, precision, kernels, engine, make_plan, monkeypatch, compiled_products
):
    """All lanes' tokens go through the base at once, and no loop over lanes is hidden anywhere."""
    if kernels == "torch":
        monkeypatch.setattr("lorasweep.model.kernels.loaded_kernels", lambda: None)

    def products(lanes: int) -> dict[str, int]:
        made = engine(lanes, architecture, precision)
        compiled_products.clear()
        # All in one order of the same rows: attention by buckets depends on rows, not on lanes.
        plans = [
            make_plan(n, seed=n, epochs=1, batch_size=30, adapter=AdapterPlan(4, 8.0, 0.1))
            for n in range(lanes)
        ]
        with Counted() as counted:
            outcomes = list(made.run(plans, Recorder(keep_nothing)))
        assert {outcome.reason for outcome in outcomes} == {""}
        assert (made.use.steps, made.use.lane_steps) == (1, lanes)
        found = {name: n for name, n in counted.calls.items() if name in PRODUCTS}
        return found | compiled_products

    two, eight = products(2), products(8)
    narrow = loaded_kernels()
    if precision == "bf16" and narrow is not None and narrow.sums(torch.ones(1, 2).bfloat16()):
        assert min(two["product"], two["outer"]) >= 4  # LoRA's own, in C
    else:
        assert two["_grouped_mm"] > 0
    laid_out = lays_out(torch.bfloat16 if precision == "bf16" else torch.float32)
    # Six linear layers in each of two, forth and back.
    assert sum(two.get(name, 0) for name in ((OF_BASE,) if laid_out else ("mm", "addmm"))) > 20
    if kernels == "torch":  # more rows may fall into more buckets, each with its own products
        two.pop("bmm", 0), eight.pop("bmm", 0)
    assert eight == two


def test_each_mask_is_that_of_its_trial_step_module_and_row(engine, splits, make_plan, monkeypatch):
    monkeypatch.setattr("lorasweep.model.kernels.loaded_kernels", lambda: None)  # no filling tokens
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def note(streams, key, rate):
        seen.append((key, streams.clone(), rate.clone()))
        return Mask(streams, key, rate)

    monkeypatch.setattr(packed_modules, "Mask", note)
    train = splits[0]
    plans: list[TrialPlan] = [
        make_plan(1, seed=5, epochs=1, batch_size=8, adapter=AdapterPlan(4, 8.0, 0.2)),
        make_plan(2, seed=6, epochs=1, batch_size=9, adapter=AdapterPlan(2, 8.0, 0.3)),
    ]
    list(engine(2, base_dropout=0.0).run(plans, Recorder(keep_nothing)))

    modules = [name.format(layer) for layer in range(2) for name in (QUERY, VALUE)]
    assert len(seen) == 4 * len(modules)  # four steps each, and none to evaluate
    followed = [Progress(plan, train.lengths) for plan in plans]
    for step in range(4):
        expected, rates, firsts = [], [], []
        for plan, progress in zip(plans, followed, strict=True):
            rows = progress.next_rows()
            lengths = train.lengths[rows]
            places = np.concatenate([np.arange(length) for length in lengths])
            firsts.append(places == 0)
            expected.append(
                token_keys(
                    np.full(len(places), lane_key(plan.seed)),
                    np.full(len(places), step),
                    np.repeat(rows, lengths),
                    places,
                )
            )
            rates.append(np.full(len(places), rate_byte(plan.adapter.dropout)))
            progress.step += 1
        streams, rate, first = map(np.concatenate, (expected, rates, firsts))
        for name, (key, found, drops) in zip(modules, seen[4 * step : 4 * step + 4], strict=True):
            asked = first if name == QUERY.format(1) else np.ones(len(first), bool)
            assert key == module_key(name)
            np.testing.assert_array_equal(found.numpy(), streams[asked])
            np.testing.assert_array_equal(drops.flatten().numpy(), rate[asked])
    # Nobody shares a stream with anybody, nor with himself a step later.
    for (_, one, _), (_, other, _) in pairwise(seen[::4]):
        assert not set(one.tolist()) & set(other.tolist())
    assert len(set(streams.tolist())) == len(streams)
