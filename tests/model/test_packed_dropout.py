"""Keyed dropout: fair, independent, and a function of trial, step, module and row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.packed_dropout import (
    Dropout,
    Mask,
    kept_bits,
    kept_scale,
    lane_key,
    module_key,
    random_bytes,
    rate_byte,
    token_keys,
)

CPU = torch.device("cpu")


def streams(seed: int = 1, step: int = 0, rows: int = 100, tokens: int = 30) -> torch.Tensor:
    row, position = np.divmod(np.arange(rows * tokens), tokens)
    lane, steps = np.full(len(row), lane_key(seed)), np.full(len(row), step)
    return torch.from_numpy(token_keys(lane, steps, row, position))


def test_bytes_are_uniform_and_uncorrelated():
    drawn = random_bytes(streams(), module_key("some.module"), 100).numpy()
    counts = np.bincount(drawn.ravel(), minlength=256)
    expected = drawn.size / 256
    # Chi-squared with 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * 22.6
    centred = drawn.astype(float) - 127.5
    variance = (256**2 - 1) / 12
    for other in (
        np.roll(centred, 1, axis=0),  # the next token
        np.roll(centred, 1, axis=1),  # the next element
        np.roll(centred, 8, axis=1),  # the next word
        random_bytes(streams(step=1), module_key("some.module"), 100).numpy() - 127.5,
        random_bytes(streams(seed=2), module_key("some.module"), 100).numpy() - 127.5,
        random_bytes(streams(), module_key("some.other"), 100).numpy() - 127.5,
    ):
        correlation = (centred * other).mean() / variance
        assert abs(correlation) < 5 / drawn.size**0.5


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_keeps_the_share_it_says_and_the_mean(rate, dtype):
    x = torch.ones(3000, 100, dtype=dtype, requires_grad=True)
    y = Dropout.apply(x, Mask(streams(), 5, rate_byte(rate)), kept_scale(rate))
    dropped = (y == 0).double().mean().item()
    exact = rate_byte(rate) / 256
    assert abs(exact - rate) <= 1 / 256
    assert abs(dropped - exact) < 5 * (exact * (1 - exact) / x.numel()) ** 0.5
    assert abs(y.double().mean().item() - 1) < 0.02
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # of ones: the same mask, the same scale


def test_rates_may_differ_by_token():
    rates = torch.tensor([0, 26, 128], dtype=torch.int16).repeat(1000).unsqueeze(1)
    kept = kept_bits(streams(), 5, 200, rates, torch.float32) != 0
    shares = kept.double().mean(1).view(1000, 3).mean(0)
    torch.testing.assert_close(
        shares, torch.tensor([1, 1 - 26 / 256, 0.5], dtype=torch.float64), rtol=0, atol=0.01
    )
    alone = kept_bits(streams()[1::3], 5, 200, 26, torch.float32) != 0
    assert torch.equal(kept[1::3], alone)


def test_more_elements_begin_with_the_same():
    wide, narrow = (random_bytes(streams(), 9, width) for width in (50, 13))
    assert torch.equal(wide[:, :13], narrow)


def test_streams_depend_on_trial_step_row_and_place_but_not_on_the_neighbours(encode, open_tiny):
    split = encode(open_tiny())
    mine = LaneRows(np.array([2, 5, 1]), lane_key(7), step=4)
    alone = lay_out(split, [mine], CPU, training=True)
    other = LaneRows(np.array([2, 0]), lane_key(8), step=4)
    among = lay_out(
        split, [other, LaneRows(np.array([], dtype=np.int64)), mine], CPU, training=True
    )
    inside = among.token_spans.lane == 2
    assert torch.equal(alone.streams, among.streams[inside])
    assert torch.equal(alone.row_streams, among.row_streams[among.row_spans.lane == 2])
    assert len(set(among.streams.tolist())) == among.tokens  # row 2 has two trials' streams
    later = lay_out(split, [LaneRows(mine.rows, mine.key, step=5)], CPU, training=True)
    assert not set(later.streams.tolist()) & set(alone.streams.tolist())
    assert lay_out(split, [mine], CPU, training=False).streams is None
