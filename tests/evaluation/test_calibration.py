from __future__ import annotations

import numpy as np
import pytest

from lorasweep.evaluation.calibration import calibration


def test_by_hand(make_predictions) -> None:  # type: ignore[no-untyped-def]
    # Ten answers at 0.95 of which eight are right, ten at 0.65 of which seven are.
    labels = [0] * 20
    said = [0] * 8 + [1] * 2 + [0] * 7 + [1] * 3
    found = calibration(make_predictions(labels, said, [0.95] * 10 + [0.65] * 10))
    assert found.expected_error == pytest.approx((0.15 + 0.05) / 2)
    assert found.overconfidence == pytest.approx(0.80 - 0.75)
    assert [(one.low, one.high, one.rows) for one in found.bins] == [(0.6, 0.7, 10), (0.9, 1.0, 10)]
    assert [one.accuracy for one in found.bins] == pytest.approx([0.7, 0.8])


def test_an_honest_model_is_calibrated_and_every_row_is_counted(make_predictions) -> None:  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.5, 1.0, 20_000)
    said = (generator.random(20_000) > sure).astype(int)
    found = calibration(make_predictions([0] * 20_000, said.tolist(), sure.tolist()))
    assert found.expected_error < 0.02
    assert sum(one.rows for one in found.bins) == 20_000


@pytest.mark.parametrize("sure", [0.5, 1.0])
def test_the_ends_have_a_bin(make_predictions, sure: float) -> None:  # type: ignore[no-untyped-def]
    found = calibration(make_predictions([0, 0], [0, 0], sure))
    assert found.bins[0].low < sure <= found.bins[0].high
