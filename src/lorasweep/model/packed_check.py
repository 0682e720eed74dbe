"""A proof at the door: a pack with no adapter must say what the plain model says.

The pack runs an architecture's own code on a layout that it wasn't written for. Whether that
works is not guessed from its name: a few rows go through the plain model and through the pack
before anything is trained, and where the logits differ, the base is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lorasweep.core.corpora import EncodedSplit
from lorasweep.core.errors import ModelError, Problem
from lorasweep.model.base import Base, FreshClassifier
from lorasweep.model.lane_weights import Block
from lorasweep.model.packed_batch import LaneRows, lay_out
from lorasweep.model.scoring import predict_logits
from lorasweep.model.torch_errors import is_of_the_device, is_out_of_memory

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel

PROVEN = frozenset(
    {
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "roberta",
        "xlm-roberta",
    }
)
"""Architectures (``model_type``) whose trials tests hold, step by step, to a ``Trainer`` each.

The check at the door compares logits only. Others that pass it may train just as well; nobody
has looked.
"""

_LENGTHS = (9, 3, 14, 8, 9, 21)
# Float32 rounding through a deep encoder, on logits of about 1.
_TOLERANCE = 1e-3


class PackedCheck:
    """Takes the plain model's logits before the pack changes it, and compares afterwards.

    Args:
        fresh: The base, still unchanged.
    """

    def __init__(self, fresh: FreshClassifier, whole: tuple[str, ...]) -> None:
        self.base = fresh.base
        self.rows = _some_rows(fresh.base)
        self.expected = predict_logits(
            fresh.model,
            self.rows,
            pad_id=fresh.base.pad_id,
            batch_size=4,
            device=torch.device("cpu"),
        )
        self.head: dict[str, Tensor] = {}
        for name in whole:
            for inner, parameter in fresh.model.get_submodule(name).named_parameters():
                self.head[f"{name}.{inner}"] = parameter.detach().clone()

    def prove(self, pack: PackedModel) -> None:
        """Compare, and leave the pack without lanes.

        Args:
            pack: Float32, on the CPU, without lanes.

        Raises:
            ModelError: The logits differ, or the pack can't run at all.
        """
        with refusing(self.base):
            found = self._packed_logits(pack)
        apart = float(np.abs(found - self.expected).max())
        scale = max(1.0, float(np.abs(self.expected).max()))
        if not apart <= _TOLERANCE * scale:
            raise refused(self.base, f"its logits would be off by {apart:.2g}")

    def _packed_logits(self, pack: PackedModel) -> np.ndarray:
        pack.add_untrained_lane([Block(n, tuple(v.shape)) for n, v in self.head.items()], self.head)
        every = np.arange(len(self.rows))
        batch = lay_out(self.rows, [LaneRows(every)], torch.device("cpu"), training=False)
        with torch.no_grad():
            logits: np.ndarray = pack.forward(batch, training=False).float().numpy()
        pack.keep_lanes([])
        return logits


@contextmanager
def refusing(base: Base) -> Iterator[None]:
    """Refuse a base whose own code doesn't go along with what is done to it."""
    try:
        yield
    except ModelError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        if is_out_of_memory(error) or is_of_the_device(error):
            raise  # it says nothing about the base
        raise refused(base, f"{type(error).__name__}: {error}") from error


def refused(base: Base, why: str) -> ModelError:
    """Make the error for a base that a pack can't carry."""
    return ModelError(
        Problem(
            f"model.name {base.name}",
            f"the packed engine can't carry this {base.architecture}: {why}",
            "Use engine: trainer.",
        )
    )


def _some_rows(base: Base) -> EncodedSplit:
    """Rows of ordinary tokens between two special ones, without any padding token."""
    rng = np.random.default_rng(0)
    tokenizer, pieces = base.tokenizer, []
    special = set(tokenizer.all_special_ids)
    edge = [token for token in (tokenizer.cls_token_id, tokenizer.sep_token_id) if token]
    for length in _LENGTHS:
        inside = rng.integers(0, len(tokenizer), 2 * length).tolist()
        inside = [token for token in inside if token not in special][:length]
        ids = [*edge[:1], *inside, *edge[1:]]
        pieces.append(np.asarray(ids[: base.max_length], dtype=np.int32))
    return EncodedSplit(
        name="check",
        tokens=np.concatenate(pieces),
        offsets=np.cumsum([0, *map(len, pieces)]).astype(np.int64),
        labels=np.zeros(len(pieces), dtype=np.int64),
    )
