"""AdamW of all lanes is torch's own for each, compiled or not; lanes keep their state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lane_numbers import leaf_of
from torch._dynamo.exc import FailOnRecompileLimitHit

from lorasweep.engines.lane_adamw import LaneAdamW, LaneStep, _compiled, adamw, proven
from lorasweep.model.lane_weights import Block, LaneWeights

CPU = torch.device("cpu")


def test_lanes_update_as_torchs_own_adamw_after_clipping():
    """Two lanes of different settings and step counts, against two optimizers."""
    settings = [
        {"rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5},
        {"rate": 0.3, "weight_decay": 0.0, "max_grad_norm": 0.0},
    ]
    blocks = [Block("a", (3, 2)), Block("bias", (5,), decays=False)]
    generator = torch.Generator().manual_seed(0)
    weights, references, optimizers = LaneWeights(CPU), [], []
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
                gradient = leaf_of(weights, name).grad
                if gradient is None:
                    gradient = torch.zeros_like(leaf_of(weights, name))
                    leaf_of(weights, name).grad = gradient
                gradient[lane] = parameter.grad
            steps.append(LaneStep(**setting, step=step))
        weights.collect_gradients()
        norms = LaneAdamW(CPU).update(weights, steps)
        for lane, (setting, parameters) in enumerate(zip(settings, references, strict=True)):
            limit = setting["max_grad_norm"] or torch.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
            assert norms[lane].item() == pytest.approx(norm.item(), rel=1e-5)
            optimizers[lane].step()
            for name, parameter in parameters.items():
                torch.testing.assert_close(
                    leaf_of(weights, name)[lane], parameter, rtol=1e-5, atol=1e-6
                )


def test_a_lane_without_a_finite_gradient_is_updated_alone():
    block = Block("a", (3, 2))
    weights = {bad: LaneWeights(CPU) for bad in (False, True)}
    for bad, each in weights.items():
        for _ in range(3):
            each.add([block], {"a": torch.ones(3, 2)})
        each.gradients.fill_(0.5)
        each.gradients[1, 2] = torch.nan if bad else 0.5
        LaneAdamW(CPU).update(each, [LaneStep(0.1, 0.01, 1.0, 1)] * 3)
    assert torch.equal(weights[True].weights[[0, 2]], weights[False].weights[[0, 2]])
    assert weights[True].weights[1].isnan().all()


def adamw_inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = [(5, 24)] * 4 + [(24,), (5,), (4, 5, 1)]
    return [torch.rand(shape, generator=draw) + 0.1 for shape in shapes]


def test_a_compiled_update_is_taken_where_it_does_the_same():
    fused = proven(_compiled, CPU)
    assert fused is not adamw
    one, other = adamw_inputs(), adamw_inputs()
    for inputs in (one, other):
        inputs[1][2] = torch.nan  # a lane that fails
    fused(*one)
    adamw(*other)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert one[0][2].isnan().all()
    assert one[0][[0, 1, 3, 4]].isfinite().all()


def without_compiler(*_: torch.Tensor) -> None:
    raise FailOnRecompileLimitHit("no compiler\nand more")


def without_decay(*tensors: torch.Tensor) -> None:
    adamw(*tensors[:4], torch.zeros_like(tensors[4]), *tensors[5:])


def wrong_for_one_lane(*tensors: torch.Tensor) -> None:
    (without_decay if len(tensors[0]) == 1 else adamw)(*tensors)


def test_an_update_that_cannot_be_compiled_or_gets_it_wrong_is_not_taken(caplog):
    def refuse() -> Callable[..., None]:
        raise RuntimeError("not supported on this Python")

    for make, reason in (
        (refuse, "not supported"),
        (lambda: without_compiler, "no compiler"),
        (lambda: without_decay, "close"),
        (lambda: wrong_for_one_lane, "close"),
    ):
        caplog.clear()
        assert proven(make, CPU) is adamw
        assert reason in caplog.text
        assert "\n" not in caplog.records[0].getMessage()


def test_a_device_that_dies_while_an_update_is_tried_is_no_refusal():
    def dies(*_: torch.Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        proven(lambda: dies, CPU)


def test_where_other_shapes_cannot_be_compiled_the_update_is_made_all_the_same(caplog):
    found = []
    for arithmetic in (adamw, without_compiler):
        weights = LaneWeights(CPU)
        weights.add([Block("a", (3, 2))], {"a": torch.ones(3, 2)})
        optimizer = LaneAdamW(CPU)
        optimizer._arithmetic = arithmetic
        for step in (1, 2):
            weights.gradients.fill_(0.5)
            optimizer.update(weights, [LaneStep(0.1, 0.01, 1.0, step)])
        found.append(weights.weights)
    assert torch.equal(*found)
    (record,) = caplog.records  # once, not in every step
    assert "no compiler" in record.getMessage()


def test_an_error_of_the_update_itself_is_not_hidden():
    def fails(weights: torch.Tensor, *_: torch.Tensor) -> None:
        weights.add_(1.0)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    weights = LaneWeights(CPU)
    weights.add([Block("a", (3, 2))], {"a": torch.ones(3, 2)})
    optimizer = LaneAdamW(CPU)
    optimizer._arithmetic = fails
    with pytest.raises(RuntimeError, match="illegal"):
        optimizer.update(weights, [LaneStep(0.1, 0.01, 1.0, 1)])


def test_lanes_keep_their_state_when_others_come_go_and_widen_the_layout():
    weights = LaneWeights(CPU)
    small, large = Block("a", (2, 3)), Block("a", (4, 3))
    first, second = torch.rand(2, 3), torch.rand(4, 3)
    weights.add([small], {"a": first})
    weights.first[0] += 1
    state = weights.state(0, {"a": first.shape})
    weights.add([large, Block("b", (5,))], {"a": second, "b": torch.ones(5)})
    assert leaf_of(weights, "a").shape == (2, 4, 3)
    assert torch.equal(leaf_of(weights, "a")[0, :2], first)
    assert not leaf_of(weights, "a")[0, 2:].any()
    assert not leaf_of(weights, "b")[0].any()
    weights.weights[0] = torch.nan
    weights.keep([1])
    assert torch.equal(leaf_of(weights, "a")[0], second)
    assert torch.isfinite(weights.weights).all()
    weights.restore([small], state)
    assert torch.equal(leaf_of(weights, "a")[1, :2], first)
    taken = weights.state(1, {"a": first.shape})
    assert torch.equal(taken.first["a"], torch.ones(2, 3))
    weights.keep([])
    assert weights.lanes == 0
    assert weights.width == 0
