from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lorasweep.core.outcomes import Predictions

Make = Callable[..., Predictions]


@pytest.fixture
def make_predictions() -> Make:
    """Build predictions from label indices, answers and confidences."""

    def build(
        labels: Sequence[int],
        predicted: Sequence[int],
        confidence: Sequence[float] | float = 0.8,
        count: int = 2,
        model: str = "finetuned",
    ) -> Predictions:
        rows = len(labels)
        sure = np.broadcast_to(np.asarray(confidence, dtype=np.float64), (rows,))
        likely = np.repeat(((1 - sure) / (count - 1))[:, None], count, axis=1)
        likely[np.arange(rows), list(predicted)] = sure
        ids = tuple(f"test:{row + 1}" for row in range(rows))
        return Predictions(model, "test", ids, np.array(labels, dtype=np.int64), likely)

    return build
