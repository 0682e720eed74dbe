"""What the largest lane of a sweep takes of the memory at hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import AdapterPlan, LargestTrial
from lorasweep.engines.host_memory import host_bytes
from lorasweep.engines.packing import length_batches
from lorasweep.model.adapter import attach, trained_whole
from lorasweep.model.base import FreshClassifier
from lorasweep.model.fresh_copies import FreshCopies
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_lora import LaneSettings, PackedModel
from lorasweep.model.step_memory import installed_step_memory
from lorasweep.model.targets import resolve_targets
from lorasweep.model.torch_errors import is_out_of_memory

# Bytes at the peak of a step for each byte kept for its backward pass, where no allocator can
# tell: what comes and goes is on top, and what malloc loses between pieces. A lane of MiniLM
# (16 rows of 128 tokens, float32) took 2.3.
_AT_THE_PEAK = 2.5
# Bytes that the allocator takes of the system for each byte that tensors hold at its peak: free
# pieces lie between them. Lanes of MiniLM (16 rows of 64 tokens, float32) took 1.09.
_WITH_FREE_PIECES = 1.15


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return host_bytes()


def saved_bytes(
    forward: Callable[[], Tensor], device: torch.device, there: Iterable[Tensor] = ()
) -> int:
    """Measure the memory of one forward and backward pass.

    An allocator that knows its own peak is asked for it. Of tensors that none knows, those kept
    for the backward pass are counted, times what comes and goes with them.

    Args:
        forward: Computes a scalar to differentiate.
        device: Where it computes.
        there: Weights, which are there without any pass and may be kept for it as they are.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().backward()
        return int(torch.cuda.max_memory_allocated(device) - before)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: an operation that keeps its own result would keep itself, and
        # with it all before it, for as long as the process lives.
        return tensor.detach()

    allocator = installed_step_memory()
    if allocator is not None:
        gc.collect()  # or what goes meanwhile would be taken off what comes
        allocator.peak()
        before = allocator.taken
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = forward()
    for tensor in there:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    if allocator is None:
        return int(_AT_THE_PEAK * sum(kept.values()))
    loss.backward()
    unknown = sum(size for size in kept.values() if size < allocator.least)
    # All that is kept is there at the same time, whoever served it and whatever else went.
    known = max(allocator.peak() - before, sum(kept.values()) - unknown)
    return int(_WITH_FREE_PIECES * known + _AT_THE_PEAK * unknown)


def scored_bytes(score: Callable[[], Tensor], device: torch.device) -> int:
    """Measure the memory of a pass that leaves nothing for a way back; 0 where nothing tells.

    Args:
        score: Computes logits.
        device: Where it computes.
    """
    if device.type == "cuda":
        with torch.no_grad():
            score()  # the first time, libraries take workspaces that they keep
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    elif (allocator := installed_step_memory()) is not None:
        gc.collect()  # or what goes meanwhile would be taken off what comes
        allocator.peak()
        before = allocator.taken
    else:
        return 0
    with torch.no_grad():
        score()
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) - before)
    assert allocator is not None
    return int(_WITH_FREE_PIECES * (allocator.peak() - before))


def lane_bytes(
    model: PackedModel,
    copies: FreshCopies,
    train: EncodedSplit,
    device: torch.device,
    largest: LargestTrial,
    scored: tuple[EncodedSplit, int] | None = None,
) -> int | None:
    """Measure what one more lane takes: weights, moments, and a step or a scoring.

    Both are of the longest rows; the one that takes more counts.

    Every lane of a pack has room for each module that any of its lanes adapts, at the largest
    of their ranks. So the lane measured adapts all that any trial may, at once.

    Args:
        model: A pack without lanes; it has none again afterwards.
        copies: Of what it carries.
        train: Where the rows are from.
        device: Where the pack computes.
        largest: What no trial goes beyond.
        scored: The validation rows, and how many a lane has scored at once; None for none.

    Returns:
        Bytes; None where not even one lane fits.
    """
    rows = length_batches(train, largest.batch_size)[0]
    batch = lay_out(train, [LaneRows(rows)], device, training=True)

    def forward() -> Tensor:
        return model.forward(batch, training=True).sum()

    try:
        fresh = copies.fresh(0)
        plan = _widest(fresh, largest.adapters)
        model.add_lane(attach(fresh, plan, 0), LaneSettings(plan.scaling, plan.dropout))
        # What is kept once for all lanes is no part of one: it has to be there before.
        model.shared.keep(train, training=True)
        if device.type == "cuda":  # the first time, libraries take workspaces that they keep
            forward().backward()
            model.weights.drop_gradients()
        weights = model.weights.weights
        passing = saved_bytes(forward, device, [*model.model.parameters(), weights])
        if scored is not None:
            passing = max(passing, _scoring(model, device, *scored))
        # Weights, gradients and both moments come on top.
        return passing + 4 * weights.nbytes
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        model.keep_lanes([])


def _scoring(model: PackedModel, device: torch.device, split: EncodedSplit, rows: int) -> int:
    """Measure a scoring of the longest rows of a split by a model's only lane."""
    model.shared.keep(split, training=False)  # which the first evaluation would, for all lanes
    batch = lay_out(split, [LaneRows(length_batches(split, rows)[0])], device, training=False)
    return scored_bytes(lambda: model.forward(batch, training=False), device)


def _widest(fresh: FreshClassifier, plans: tuple[AdapterPlan, ...]) -> AdapterPlan:
    """Make one plan of many: each module that any of them adapts, the largest rank and dropout."""
    whole = trained_whole(fresh)
    names = dict.fromkeys(
        name for plan in plans for name in resolve_targets(fresh.model, plan, whole)
    )
    rank = max(plan.rank for plan in plans)
    dropout = max(plan.dropout for plan in plans)
    return AdapterPlan(rank=rank, alpha=rank, dropout=dropout, targets=tuple(names))
