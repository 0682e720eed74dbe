"""Where tokens lie for attention in buckets: every token once, and padding is masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasweep.model.row_buckets import make_buckets

LENGTHS = ([5], [3, 9, 1, 9, 20, 4, 2, 9], [7, 7, 7])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_laid_out_by_head_comes_back(lengths, heads):
    buckets = make_buckets(np.array(lengths), torch.device("cpu"))
    forth, back = buckets.indices(heads)
    # Both orders hold (token, head) in the rows of a flat matrix.
    assert torch.equal(forth[back], torch.arange(sum(lengths) * heads))
    assert len(forth) == sum(bucket.places for bucket in buckets.each) * heads


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_bucket_holds_whole_rows_and_repeats_their_first_token(lengths):
    heads, starts = 2, np.cumsum(lengths) - lengths
    buckets = make_buckets(np.array(lengths), torch.device("cpu"))
    forth, _ = buckets.indices(heads)
    seen = []
    for bucket in buckets.each:
        part = forth[bucket.start * heads : (bucket.start + bucket.places) * heads]
        grid = part.view(bucket.rows, heads, bucket.longest)
        rows = buckets.row[bucket.first_row : bucket.first_row + bucket.rows].tolist()
        seen += rows
        for row, by_head in zip(rows, grid, strict=True):
            inside = np.arange(bucket.longest)
            token = starts[row] + np.where(inside < lengths[row], inside, 0)
            for head in range(heads):
                np.testing.assert_array_equal(by_head[head], token * heads + head)
        real = torch.tensor([[i < lengths[r] for i in range(bucket.longest)] for r in rows])
        assert real.all() if bucket.real is None else torch.equal(bucket.real, real)
    assert sorted(seen) == list(range(len(lengths)))
