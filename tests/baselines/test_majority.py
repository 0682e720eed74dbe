from __future__ import annotations

from collections.abc import Callable

from lorasweep.baselines.majority import MajorityBaseline
from lorasweep.core.corpora import TextSplit


def test_frequencies_of_training_for_every_text(split: Callable[..., TextSplit]) -> None:
    train = split([("a", 0), ("b", 2), ("c", 2), ("d", 2)])
    found = MajorityBaseline().predict(train, ["x", "y"], 3)
    assert found.tolist() == [[0.25, 0.0, 0.75]] * 2
