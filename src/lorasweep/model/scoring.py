"""From rows of token ids to logits: the one place that scores anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.plans import Precision
from lorasweep.model.precision import resolve

if TYPE_CHECKING:
    from numpy.typing import NDArray

# XLNet classifies by the last token of a row, so that one must not be padding.
_PADDED_ON_THE_LEFT = frozenset({"xlnet"})


def pads_left(model_type: str) -> bool:
    """Whether rows of an architecture are filled up at their start instead of their end."""
    return model_type in _PADDED_ON_THE_LEFT


def pad_rows(
    split: EncodedSplit, rows: Sequence[int] | NDArray[np.int64], pad_id: int, *, left: bool = False
) -> dict[str, torch.Tensor]:
    """Make a batch of some rows, padded to the longest of them and no further.

    Args:
        split: Holds the tokens.
        rows: Indices of the batch's rows, in the order wanted.
        pad_id: Fills up short rows.
        left: Fill up at the start.

    Returns:
        ``input_ids`` and ``attention_mask`` (1 for a token, 0 for padding), int64,
        ``(batch, tokens)``, and ``labels``, int64, ``(batch,)``.
    """
    indices = np.asarray(rows, dtype=np.int64)
    lengths = split.lengths[indices]
    longest = int(lengths.max())
    ids = np.full((len(indices), longest), pad_id, dtype=np.int64)
    columns = np.arange(longest)
    mask = columns >= longest - lengths[:, None] if left else columns < lengths[:, None]
    ids[mask] = np.concatenate([split.row(int(index)) for index in indices])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(split.labels[indices]),
    }


def predict_logits(
    model: Any,
    split: EncodedSplit,
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    precision: Precision = "fp32",
) -> NDArray[np.float32]:
    """Score every row of a split.

    Rows are batched by length, so hardly any padding is computed; batches never change a
    result by more than rounding. The model must lie on ``device``; it is scored in evaluation
    mode and left in the mode it was in.

    Args:
        model: A sequence classifier, with or without an adapter.
        split: Tokens and labels; the labels are not looked at.
        pad_id: Id of the padding token.
        batch_size: Rows per forward pass.
        device: Where to compute.
        precision: ``bf16`` computes under autocast; the result is float32 all the same.

    Returns:
        Logits, float32, ``(rows, labels)``, in the split's row order.
    """
    if len(split) == 0:
        return np.zeros((0, model.config.num_labels), dtype=np.float32)
    left = pads_left(model.config.model_type)
    # The longest first: if memory doesn't suffice, it shows at once.
    order = np.argsort(-split.lengths, kind="stable")
    half = resolve(precision, device) == "bf16"
    was_training = model.training
    model.eval()
    scored = []
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=half),
        ):
            for start in range(0, len(order), batch_size):
                batch = pad_rows(split, order[start : start + batch_size], pad_id, left=left)
                output = model(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                )
                scored.append(output.logits.float())
        sorted_logits = torch.cat(scored).cpu().numpy()
    finally:
        model.train(was_training)
    logits = np.empty_like(sorted_logits)
    logits[order] = sorted_logits
    return logits
