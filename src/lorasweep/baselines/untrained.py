"""The reference before training: the base with a head that was only just drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from lorasweep.core.corpora import TextSplit
from lorasweep.core.plans import EngineSettings
from lorasweep.data.tokens import encode
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.precision import pick_device
from lorasweep.model.scoring import predict_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray


class UntrainedBaseline:
    """What a trial starts from; near chance unless the base is already a classifier.

    Args:
        base: The frozen base.
        seed: The head is drawn from it exactly as a trial's would be, so that with the
            winner's head seed this is the winner before its first step.
        settings: Device, precision and rows per forward pass.
    """

    name = "untrained"

    def __init__(self, base: Base, seed: int, settings: EngineSettings) -> None:
        self._base = base
        self._seed = seed
        self._settings = settings

    def predict(
        self,
        train: TextSplit,  # noqa: ARG002 (a baseline's signature; this one learns nothing)
        texts: Sequence[str],
        labels: int,
    ) -> NDArray[np.float64]:
        """Return probabilities, ``(texts, labels)``; the training split is not looked at."""
        if not len(texts):
            return np.zeros((0, labels), dtype=np.float64)
        device = pick_device(self._settings.device)
        model = fresh_classifier(self._base, self._seed).model.to(device)
        logits = predict_logits(
            model,
            encode(unlabelled(texts), self._base.tokenizer, self._base.max_length),
            pad_id=self._base.pad_id,
            batch_size=self._settings.eval_batch_size,
            device=device,
            precision=self._settings.precision,
        )
        found: NDArray[np.float64] = softmax(logits.astype(np.float64), axis=1)
        return found


def unlabelled(texts: Sequence[str]) -> TextSplit:
    """Wrap texts as a split, with a label that nobody looks at."""
    return TextSplit(
        name="unlabelled",
        texts=tuple(texts),
        labels=(0,) * len(texts),
        ids=tuple(f"unlabelled:{row}" for row in range(1, len(texts) + 1)),
    )
