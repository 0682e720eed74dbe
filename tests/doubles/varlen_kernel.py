"""Stand-ins for torch's kernel for rows of unequal length, which runs on no CPU: good and bad.

Attention written out row by row, with the arguments of the real one, and as strict about them;
and rows for it to attend over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from lorasweep.core.corpora import EncodedSplit
from lorasweep.model.packed_attention import packed_attention
from lorasweep.model.packed_batch import LaneRows, PackedBatch, lay_out

LENGTHS = np.array([7, 1, 26, 12, 2, 40, 17])
TOKENS = int(LENGTHS.sum())
CPU = torch.device("cpu")
BFLOAT16_BY_THE_KERNEL = (CPU, torch.bfloat16, 3, 16)


def flash_row(q: Tensor, k: Tensor, v: Tensor, scale: float, unseen: Tensor) -> Tensor:
    """One row as the real kernel rounds it: sums in float32, what is multiplied next in q's type.

    Args:
        q: ``(queries, heads, width)``.
        k: ``(keys, heads, width)``.
        v: As ``k``.
        scale: Of the scores.
        unseen: bool ``(queries, keys)``.
    """
    return FlashRow.apply(q, k, v, scale, unseen)


class FlashRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, unseen):
        wide = [x.float().transpose(0, 1) for x in (q, k, v)]
        scores = (wide[0] @ wide[1].transpose(1, 2) * scale).masked_fill(unseen, -torch.inf)
        weights = torch.softmax(scores, -1)
        out = (weights.to(q.dtype).float() @ wide[2]).transpose(0, 1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        *given, weights, out = ctx.saved_tensors
        q, k, v = (x.float().transpose(0, 1) for x in given)
        go = grad.float().transpose(0, 1)
        sums = (grad.float() * out.float()).sum(-1).transpose(0, 1).unsqueeze(-1)
        scores = (weights * (go @ v.transpose(1, 2) - sums)).to(grad.dtype).float() * ctx.scale
        rounded = weights.to(grad.dtype).float()
        found = (scores @ k, scores.transpose(1, 2) @ q, rounded.transpose(1, 2) @ go)
        return (*(x.transpose(0, 1).to(grad.dtype) for x in found), None, None)


@dataclass
class StandIn:
    """Does what ``varlen_attn`` does, on a CPU.

    Attributes:
        types: What it takes.
        calls: The arguments of each call, by name.
    """

    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    calls: list[dict] = field(default_factory=list)

    def __call__(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        self.calls.append({k: v for k, v in locals().items() if k != "self"})
        if query.dtype not in self.types:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        for x in (query, key, value):
            assert x.stride(-1) == 1, "Input tensor must have contiguous last dimension"
            assert x.shape[1:] == query.shape[1:]
            assert x.dtype == query.dtype
        assert query.shape[-1] % 8 == 0
        assert query.shape[-1] <= 256
        assert len(key) == len(value)
        for starts, tokens, longest in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
            assert starts.device == query.device
            assert type(longest) is int
            assert starts[0] == 0
            assert starts[-1] == len(tokens)
            assert starts.diff().max() <= longest
        assert len(cu_seq_q) == len(cu_seq_k)
        assert type(window_size) is tuple
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        rows = []
        for row in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[row] : cu_seq_q[row + 1]]
            k, v = (x[cu_seq_k[row] : cu_seq_k[row + 1]] for x in (key, value))
            rows.append(flash_row(q, k, v, scale, self.unseen(len(q), len(k), window)))
        return torch.cat(rows)

    def unseen(self, queries: int, keys: int, window: tuple[int, int]) -> Tensor:
        """Counted from the row's end, where queries and keys are not as many."""
        ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
        left, right = window
        unseen = torch.zeros(queries, keys, dtype=torch.bool)
        if left >= 0:
            unseen |= ahead < -left
        if right >= 0:
            unseen |= ahead > right
        return unseen


class RefusesSplits(StandIn):
    def __call__(self, *given, **how):
        if "num_splits" in how:
            raise RuntimeError("num_splits is not supported on ROCm\nsecond line")
        return super().__call__(*given, **how)


class IgnoresKeyRows(StandIn):
    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        nothing = torch.zeros(len(query), len(key), dtype=torch.bool)
        return flash_row(query, key, value, scale, nothing)


class DefaultScale(StandIn):
    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        scale = query.shape[-1] ** -0.5
        return super().attend(query, key, value, cu_seq_q, cu_seq_k, scale, window)


class WiderWindow(StandIn):
    def unseen(self, queries, keys, window):
        left, right = window
        return super().unseen(queries, keys, (left, right + 1 if right >= 0 else right))


class NoWindow(StandIn):
    def unseen(self, queries, keys, window):
        return super().unseen(queries, keys, (-1, -1))


class KeyWithoutGradient(StandIn):
    def attend(self, query, key, *others):
        return super().attend(query, key.detach(), *others)


class WrongKeyGradient(StandIn):
    def attend(self, query, key, *others):
        return super().attend(query, 2 * key - key.detach(), *others)


class NotANumber(StandIn):
    def attend(self, *given):
        found = super().attend(*given)
        return found + torch.where(torch.arange(len(found)) == 3, torch.nan, 0.0)[:, None, None]


class NeighbourLeaks(StandIn):
    """Multiplies what lies behind a row by zero, instead of leaving it alone."""

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, scale, window):
        found = super().attend(query, key, value, cu_seq_q, cu_seq_k, scale, window)
        return found + 0 * value.roll(-1, 0).sum() if len(found) == len(value) else found


class Unsteady(StandIn):
    def attend(self, *given):
        found = super().attend(*given)
        return found * (1 + 0.004 * (len(self.calls) % 2))


class Raises(StandIn):
    def attend(self, *_):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore of it")


class FailsAtFirst(StandIn):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def attend(self, *given):
        if len(self.calls) == 1:
            raise self.error
        return super().attend(*given)


class OldArguments(StandIn):
    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return super().__call__(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def starts() -> Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(LENGTHS)).astype(np.int32))


def inputs(first_only: bool, dtype: torch.dtype, width: int = 16) -> list[Tensor]:
    """Query, key and value, ``(tokens, 3, width)`` as views of one wide product."""
    made = torch.randn(TOKENS, 3, 3, width, generator=torch.Generator().manual_seed(1))
    query, key, value = made.to(dtype).unbind(1)
    if first_only:
        query = query[starts()[:-1]]
    return [x.detach().requires_grad_() for x in (query, key, value)]


def split() -> EncodedSplit:
    rng = np.random.default_rng(3)
    return EncodedSplit(
        name="some",
        tokens=rng.integers(5, 90, TOKENS).astype(np.int32),
        offsets=np.append(0, np.cumsum(LENGTHS)).astype(np.int64),
        labels=np.arange(len(LENGTHS), dtype=np.int64) % 2,
    )


def batch_of_all(*, training: bool = False, filled: bool = False) -> PackedBatch:
    rows = [LaneRows(np.arange(4)), LaneRows(np.arange(4, 7))]
    return lay_out(split(), rows, CPU, training=training, filled=filled)


def attend(batch: PackedBatch, given: list[Tensor], **how: object) -> Tensor:
    """Attend as transformers asks for it."""
    module = SimpleNamespace(pack=SimpleNamespace(now=SimpleNamespace(batch=batch)), pack_key=77)
    laid = [x.transpose(0, 1).unsqueeze(0) for x in given]
    found, weights = packed_attention(module, *laid, None, **how)
    assert weights is None
    return found.squeeze(0)
