"""Lanes come and go whole or not at all, also where memory runs out in between."""

from __future__ import annotations

import pytest
import torch
from lane_numbers import leaf_of

from lorasweep.model import lane_weights as module
from lorasweep.model.lane_weights import Block, LaneState, LaneWeights

CPU = torch.device("cpu")
NARROW = [Block("a", (8, 3)), Block("b", (5,), decays=False)]
WIDE = [Block("a", (16, 3)), Block("b", (5,), decays=False), Block("c", (2, 2))]


def state_of(blocks: list[Block], seed: int) -> LaneState:
    draw = torch.Generator().manual_seed(seed)
    return LaneState(
        *({b.name: torch.rand(b.shape, generator=draw) for b in blocks} for _ in range(3))
    )


@pytest.fixture
def weights() -> LaneWeights:
    """Three lanes; the widest is the second, and all its numbers are NaN."""
    made = LaneWeights(CPU)
    made.restore(NARROW, state_of(NARROW, 0))
    made.restore(WIDE, state_of(WIDE, 1))
    made.restore(NARROW, state_of(NARROW, 2))
    for matrix in (made.weights, made.gradients, made.first, made.second):
        matrix[1] = torch.nan
    return made


def snapshot(weights: LaneWeights) -> list[torch.Tensor]:
    matrices = (weights.weights, weights.first, weights.second, weights.decays)
    return [matrix.clone() for matrix in matrices]


def run_out(monkeypatch: pytest.MonkeyPatch, call: int) -> list[int]:
    """Let one call of torch.zeros find no memory; return which were made."""
    zeros, calls = torch.zeros, []

    def limited(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(module.torch, "zeros", limited)
    return calls


@pytest.mark.parametrize("call", range(1, 9))  # four matrices, three rows, decays
def test_a_lane_that_finds_no_memory_leaves_all_as_it_was(call, weights, monkeypatch):
    before, blocks, parameters = snapshot(weights), dict(weights.blocks), leaf_of(weights, "a")
    calls = run_out(monkeypatch, call)
    with pytest.raises(torch.OutOfMemoryError):
        weights.restore([Block("d", (7,))], state_of([Block("d", (7,))], 3))
    assert (weights.lanes, weights.blocks) == (3, blocks)
    assert leaf_of(weights, "a") is parameters
    for now, then in zip(snapshot(weights), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert weights.restore([Block("d", (7,))], state_of([Block("d", (7,))], 3)) == 3
    assert len(calls) == call + 8  # or there are calls that were not tried


@pytest.mark.parametrize("call", range(6))  # 0: memory suffices
def test_a_lane_that_leaves_needs_no_memory_and_leaves_no_nan(call, weights, monkeypatch):
    run_out(monkeypatch, call)
    weights.keep([0, 2])
    monkeypatch.undo()
    assert weights.lanes == 2
    assert ("c" in weights) == (call > 0)  # its block goes the next time
    shapes = {block.name: torch.Size(block.shape) for block in NARROW}
    for lane, seed in ((0, 0), (1, 2)):
        found, expected = weights.state(lane, shapes), state_of(NARROW, seed)
        for part in ("weights", "first", "second"):
            torch.testing.assert_close(
                getattr(found, part), getattr(expected, part), rtol=0, atol=0
            )
    for matrix in (weights.weights, weights.gradients, weights.first, weights.second):
        assert torch.isfinite(matrix).all()
    # Parameters are those of the rows that are there now, and no gradient is left over.
    leaf_of(weights, "a").sum().backward()
    weights.collect_gradients()
    expected_norms = torch.full((2,), weights.blocks["a"].size ** 0.5)
    torch.testing.assert_close(weights.gradient_norms(), expected_norms)
    # With memory the rest is gone too.
    weights.add(NARROW, {})
    assert list(weights.blocks) == ["a", "b"]
    assert weights.decays.tolist() == [1.0] * 24 + [0.0] * 8


def test_another_order_is_never_made_in_place(weights, monkeypatch):
    before = snapshot(weights)
    run_out(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        weights.keep([2, 0])
    for now, then in zip(snapshot(weights), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    weights.keep([2, 0])
    torch.testing.assert_close(leaf_of(weights, "b")[0], state_of(NARROW, 2).weights["b"])


def test_gradients_of_parts_are_summed_where_they_share_a_lane(weights):
    weights.keep([0, 2])
    weights.restore(NARROW, state_of(NARROW, 3))
    expected = torch.zeros(3, *weights.blocks["a"].shape)
    for number, lanes in enumerate((range(2), range(1, 3), range(1, 2))):
        leaf = weights.part(lanes, number)["a"]
        assert torch.equal(leaf, leaf_of(weights, "a")[lanes.start : lanes.stop])
        leaf.sum().mul(number + 1.0).backward()
        expected[lanes.start : lanes.stop] += number + 1.0
    weights.collect_gradients()
    assert torch.equal(weights.gradient("a"), expected)
    assert not weights.gradient("b").any()
    weights.collect_gradients()
    assert not weights.gradients.any()  # nothing is counted twice


def test_gradients_that_are_dropped_are_never_collected(weights):
    weights.keep([0, 2])
    for lanes, number in ((range(2), 0), (range(1), 0), (range(1, 2), 1)):
        weights.part(lanes, number)["a"].sum().backward()
    weights.drop_gradients()
    weights.collect_gradients()
    assert not weights.gradients.any()
