"""The pure part of packing: rates, rows to come, lanes that fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, TrialPlan
from lorasweep.data.order import epoch_batches
from lorasweep.engines.lane_adamw import LaneStep, adamw, proven, update
from lorasweep.engines.packing import (
    Progress,
    lanes_that_fit,
    learning_rate,
    length_batches,
    warmup_steps,
)
from lorasweep.model.lane_weights import Block, LaneWeights

PLAN = TrialPlan(
    number=0,
    seed=3,
    adapter=AdapterPlan(4, 8.0),
    learning_rate=0.01,
    epochs=2,
    batch_size=4,
    weight_decay=0.0,
    warmup=0.13,
    scheduler="linear",
    max_grad_norm=1.0,
    folder=Path("unused"),
)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0.0, 0.13, 0.9])
def test_rates_are_those_of_transformers(scheduler, warmup):
    steps = 37
    plan = dataclasses.replace(PLAN, scheduler=scheduler, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    schedule = get_scheduler(scheduler, optimizer, warmup_steps(warmup, steps), steps)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(plan, step, steps) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        schedule.step()


def test_progress_takes_the_shared_order_and_can_take_it_up_anywhere():
    lengths = np.arange(3, 13)
    progress = Progress(PLAN, lengths)
    expected = [rows for epoch in (0, 1) for rows in epoch_batches(lengths, 4, PLAN.seed, epoch)]
    assert progress.steps == len(expected) == 6
    seen = []
    while not progress.ended:
        resumed = Progress(PLAN, lengths, step=progress.step)
        np.testing.assert_array_equal(resumed.next_rows(), progress.next_rows())
        seen.append(progress.next_rows())
        progress.step += 1
        assert progress.epochs_done == progress.step // 3
    for rows, wanted in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(rows, wanted)


def test_lanes_fit_the_memory_and_there_is_always_one():
    assert lanes_that_fit(free=1000, per_lane=100, most=32) == 6
    assert lanes_that_fit(free=1000, per_lane=100, most=4) == 4
    assert lanes_that_fit(free=10, per_lane=100, most=4) == 1


def test_length_batches_cover_all_rows_longest_first():
    split = EncodedSplit(
        name="x",
        tokens=np.zeros(15, dtype=np.int32),
        offsets=np.array([0, 1, 6, 8, 12, 15]),
        labels=np.zeros(5, dtype=np.int64),
    )
    batches = [rows.tolist() for rows in length_batches(split, 2)]
    assert batches == [[1, 3], [4, 2], [0]]


def test_lanes_update_as_torchs_own_adamw_after_clipping():
    """Two lanes of different settings and step counts, against two optimizers."""
    settings = [
        {"rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5},
        {"rate": 0.3, "weight_decay": 0.0, "max_grad_norm": 0.0},
    ]
    blocks = [Block("a", (3, 2)), Block("bias", (5,), decays=False)]
    generator = torch.Generator().manual_seed(0)
    weights, references, optimizers = LaneWeights(torch.device("cpu")), [], []
    for setting in settings:
        values = {block.name: torch.randn(block.shape, generator=generator) for block in blocks}
        weights.add(blocks, values)
        parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
        references.append(parameters)
        optimizers.append(
            torch.optim.AdamW(
                [
                    {"params": [parameters["a"]], "weight_decay": setting["weight_decay"]},
                    {"params": [parameters["bias"]], "weight_decay": 0.0},
                ],
                lr=setting["rate"],
            )
        )
    for step in range(1, 30):
        steps = []
        for lane, (setting, parameters) in enumerate(zip(settings, references, strict=True)):
            for name, parameter in parameters.items():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                gradient = weights.parameter(name).grad
                if gradient is None:
                    gradient = torch.zeros_like(weights.parameter(name))
                    weights.parameter(name).grad = gradient
                gradient[lane] = parameter.grad
            steps.append(LaneStep(**setting, step=step))
        weights.collect_gradients()
        norms = update(weights, steps)
        for lane, (setting, parameters) in enumerate(zip(settings, references, strict=True)):
            limit = setting["max_grad_norm"] or torch.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
            assert norms[lane].item() == pytest.approx(norm.item(), rel=1e-5)
            optimizers[lane].step()
            for name, parameter in parameters.items():
                torch.testing.assert_close(
                    weights.parameter(name)[lane], parameter, rtol=1e-5, atol=1e-6
                )


def test_a_lane_without_a_finite_gradient_is_updated_alone():
    block = Block("a", (3, 2))
    weights = {bad: LaneWeights(torch.device("cpu")) for bad in (False, True)}
    for bad, each in weights.items():
        for _ in range(3):
            each.add([block], {"a": torch.ones(3, 2)})
        each.gradients.fill_(0.5)
        each.gradients[1, 2] = torch.nan if bad else 0.5
        update(each, [LaneStep(0.1, 0.01, 1.0, 1)] * 3)
    assert torch.equal(weights[True].weights[[0, 2]], weights[False].weights[[0, 2]])
    assert weights[True].weights[1].isnan().all()


def adamw_inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = [(5, 24)] * 4 + [(24,), (5,), (4, 5, 1)]
    return [torch.rand(shape, generator=draw) + 0.1 for shape in shapes]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_update_is_taken_where_it_does_the_same():
    fused = proven(torch.compile(adamw, dynamic=True), torch.device("cpu"))
    assert fused is not adamw
    one, other = adamw_inputs(), adamw_inputs()
    for inputs in (one, other):
        inputs[1][2] = torch.nan  # a lane that fails
    fused(*one)
    adamw(*other)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert one[0][2].isnan().all()
    assert one[0][[0, 1, 3, 4]].isfinite().all()


def test_an_update_that_cannot_be_compiled_or_gets_it_wrong_is_not_taken(caplog):
    def without_compiler(*_: torch.Tensor) -> None:
        raise RuntimeError("no compiler")

    def without_decay(*tensors: torch.Tensor) -> None:
        adamw(*tensors[:4], torch.zeros_like(tensors[4]), *tensors[5:])

    for fused, reason in ((without_compiler, "no compiler"), (without_decay, "close")):
        caplog.clear()
        assert proven(fused, torch.device("cpu")) is adamw
        assert reason in caplog.text


def test_lanes_keep_their_state_when_others_come_go_and_widen_the_layout():
    weights = LaneWeights(torch.device("cpu"))
    small, large = Block("a", (2, 3)), Block("a", (4, 3))
    first, second = torch.rand(2, 3), torch.rand(4, 3)
    weights.add([small], {"a": first})
    weights.first[0] += 1
    state = weights.state(0, {"a": first.shape})
    weights.add([large, Block("b", (5,))], {"a": second, "b": torch.ones(5)})
    assert weights.parameter("a").shape == (2, 4, 3)
    assert torch.equal(weights.parameter("a")[0, :2], first)
    assert not weights.parameter("a")[0, 2:].any()
    assert not weights.parameter("b")[0].any()
    weights.weights[0] = torch.nan
    weights.keep([1])
    assert torch.equal(weights.parameter("a")[0], second)
    assert torch.isfinite(weights.weights).all()
    weights.restore([small], state)
    assert torch.equal(weights.parameter("a")[1, :2], first)
    taken = weights.state(1, {"a": first.shape})
    assert torch.equal(taken.first["a"], torch.ones(2, 3))
    weights.keep([])
    assert weights.lanes == 0
    assert weights.width == 0
