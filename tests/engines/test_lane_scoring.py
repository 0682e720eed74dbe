"""Scoring with many lanes takes no more memory than training them, whatever the batch sizes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from equal_rows import rows_of_length

from lorasweep.core.plans import EngineSettings
from lorasweep.engines.lane_scoring import SCORED_ROWS, validation_logits


@pytest.mark.parametrize(
    ("eval_batch_size", "batch_sizes", "each"),
    [
        (64, (16, 16, 16), 64),  # what the defaults are
        (512, (16, 16, 16), 64),  # or it might not fit where the steps do
        (512, (4, 4, 64), 96),
        (512, (4,), 16),
        (64, (4, 4), 16),
        (64, (1, 1, 1), 4),
        (2, (1, 1, 1), 2),
    ],
)
def test_a_pass_that_scores_has_no_more_rows_than_were_measured(eval_batch_size, batch_sizes, each):
    rows = rows_of_length(5, rows=600)
    sizes: list[list[int]] = []

    def lay_out(split, entries, *, training):
        sizes.append([len(entry.rows) for entry in entries])
        return [SimpleNamespace(rows=sum(sizes[-1]), tokens=0, attended=0)]

    engine = SimpleNamespace(
        validation=rows,
        settings=EngineSettings(eval_batch_size=eval_batch_size),
        model=None,
        passes=SimpleNamespace(
            lay_out=lay_out,
            each=lambda _, parts: [torch.zeros(part.rows, 2) for part in parts],
        ),
        use=SimpleNamespace(add_tokens=lambda use: None),
    )
    lanes = [SimpleNamespace(plan=SimpleNamespace(batch_size=size)) for size in batch_sizes]
    found = validation_logits(engine, lanes, lanes)
    assert [one.shape for one in found] == [(600, 2)] * len(lanes)
    assert {size for entry in sizes[:-1] for size in entry} == {each}
    assert max(map(sum, sizes)) <= SCORED_ROWS * sum(batch_sizes)
