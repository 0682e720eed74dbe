"""Whose each row is, and what is repeated and summed by lane."""

from __future__ import annotations

import torch
from lane_numbers import LANES, SPANS, numbers

from lorasweep.model.lane_spans import lane_repeat, lane_sums


def test_rows_lie_in_the_padded_grid_lane_after_lane():
    assert SPANS.lanes == 4
    assert SPANS.starts.tolist() == [0, 3, 3, 8, 9]
    assert SPANS.place.tolist() == [0, 1, 2, 10, 11, 12, 13, 14, 15]


def test_sums_are_each_lanes_own():
    x = numbers(9, 3)
    found = lane_sums(x, SPANS)
    for lane, rows in enumerate(LANES):
        torch.testing.assert_close(found[lane], x[list(rows)].sum(0))


def test_each_row_gets_its_lanes_entry_and_the_gradient_is_the_sum():
    values = numbers(4, 3).requires_grad_()
    found = lane_repeat(values, SPANS)
    assert torch.equal(found, values[SPANS.lane])
    assert torch.autograd.gradcheck(lambda x: lane_repeat(x, SPANS), [values])
