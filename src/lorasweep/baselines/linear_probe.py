"""The reference without fine-tuning: the frozen base's features and a logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lorasweep.baselines.majority import label_shares, spread
from lorasweep.baselines.untrained import unlabelled
from lorasweep.core.corpora import TextSplit
from lorasweep.core.plans import EngineSettings
from lorasweep.data.tokens import encode
from lorasweep.model.base import Base, fresh_classifier
from lorasweep.model.precision import pick_device, resolve
from lorasweep.model.scoring import pad_rows, pads_left

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LinearProbeBaseline:
    """Mean-pooled last hidden states of the base, standardised, into a logistic regression.

    It tells how much of the winner's score was in the base all along (Alain and Bengio 2016,
    arXiv:1610.01644).

    Args:
        base: The frozen base.
        seed: For weights that the base lacks; the encoder, which has them all, ignores it.
        settings: Device, precision and rows per forward pass.
    """

    name = "linear_probe"

    def __init__(self, base: Base, seed: int, settings: EngineSettings) -> None:
        self._base = base
        self._seed = seed
        self._settings = settings

    def predict(self, train: TextSplit, texts: Sequence[str], labels: int) -> NDArray[np.float64]:
        """Return probabilities, ``(texts, labels)``; label frequencies if train has one label."""
        if not len(texts):
            return np.zeros((0, labels), dtype=np.float64)
        if len(set(train.labels)) < 2:
            return np.tile(label_shares(train, labels), (len(texts), 1))
        classifier = LogisticRegression(C=0.1, max_iter=2000)
        probe = make_pipeline(StandardScaler(), classifier)
        features = self._features([*train.texts, *texts])
        probe.fit(features[: len(train)], np.asarray(train.labels, dtype=np.int64))
        return spread(probe.predict_proba(features[len(train) :]), classifier.classes_, labels)

    def _features(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Mean of the last hidden states over a text's tokens, ``(texts, hidden)``."""
        device = pick_device(self._settings.device)
        encoder = fresh_classifier(self._base, self._seed).model.base_model.to(device)
        split = encode(unlabelled(texts), self._base.tokenizer, self._base.max_length)
        left = pads_left(self._base.architecture)
        half = resolve(self._settings.precision, device) == "bf16"
        order = np.argsort(-split.lengths, kind="stable")
        pooled = []
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=half),
        ):
            for start in range(0, len(order), self._settings.eval_batch_size):
                rows = order[start : start + self._settings.eval_batch_size]
                batch = pad_rows(split, rows, self._base.pad_id, left=left)
                mask = batch["attention_mask"].to(device)
                hidden = encoder(input_ids=batch["input_ids"].to(device), attention_mask=mask)[0]
                # Selected, not multiplied: what padding computes may be anything, even NaN.
                kept = torch.where(mask[..., None] == 1, hidden.float(), 0.0)
                pooled.append((kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)).cpu())
        sorted_features = torch.cat(pooled).numpy().astype(np.float64)
        features = np.empty_like(sorted_features)
        features[order] = sorted_features
        return features
