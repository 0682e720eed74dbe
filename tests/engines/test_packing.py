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
from lorasweep.engines.packing import (
    Progress,
    lanes_that_fit,
    learning_rate,
    length_batches,
    warmup_steps,
)

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
