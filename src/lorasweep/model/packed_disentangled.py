"""DeBERTa-v2's disentangled attention over rows of unequal length, for all lanes at once.

He et al. 2021 (arXiv:2006.03654). It is not one of transformers' exchangeable attention
functions: scores also depend on projected relative positions, and where LoRA adapts those
projections, each lane has its own. So the whole module is replaced; its layers stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DebertaV2Model,
    DisentangledSelfAttention,
    build_relative_position,
    scaled_size_sqrt,
)

from lorasweep.model.packed_dropout import Dropout
from lorasweep.model.packed_modules import KeyedDropout, PackedModule
from lorasweep.model.row_attention import AttentionDropout
from lorasweep.model.row_buckets import Bucket, Buckets
from lorasweep.model.transfer import on_device

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel


def carries_disentangled(pack: PackedModel, model: nn.Module) -> tuple[str, bool]:
    """Replace DeBERTa-v2's attention where there is any.

    Returns:
        What a pack can't carry of it, empty if nothing; and whether there was any.
    """
    found = False
    for name, module in list(model.named_modules()):
        if isinstance(module, DebertaV2Model):
            # It looks for padding in every batch, which here has none, and would wait for it.
            module.warn_if_padding_and_no_attention_mask = lambda *_args: None
        if isinstance(module, DebertaV2Encoder):
            if module.conv is not None:
                return "it has a convolution over neighbouring tokens", True
            # Both would make a matrix of all tokens by all tokens; the rows are known here.
            module.get_attention_mask = lambda mask: mask
            module.get_rel_pos = lambda *_args, **_kwargs: None
        elif isinstance(module, DisentangledSelfAttention):
            model.set_submodule(name, PackedDisentangled(pack, name, module))
            found = True
    return "", found


class PackedDisentangled(PackedModule):
    """Attention by content, content to position and position to content, inside each row."""

    query_proj: nn.Module
    key_proj: nn.Module
    value_proj: nn.Module
    pos_dropout: nn.Module
    dropout: KeyedDropout

    def __init__(self, pack: PackedModel, name: str, replaced: Any) -> None:
        super().__init__(pack, name)
        for part, module in replaced.named_children():
            setattr(self, part, module)
        self.kinds = tuple(replaced.pos_att_type) if replaced.relative_attention else ()
        self.shared = replaced.share_att_key
        self.heads = replaced.num_attention_heads
        self.terms = 1 + len({"c2p", "p2c"} & set(replaced.pos_att_type))
        if replaced.relative_attention:
            self.span = replaced.pos_ebd_size
            self.buckets, self.farthest = replaced.position_buckets, replaced.max_relative_positions

    def forward(
        self, hidden_states: Tensor, *_args: Any, rel_embeddings: Tensor | None = None, **_kw: Any
    ) -> tuple[Tensor, None]:
        """Attend: ``(1, tokens, hidden)`` to the same shape, and None for the weights."""
        batch = self.pack.now.batch
        laid = [
            project(hidden_states)[0].unflatten(1, (self.heads, -1))
            for project in (self.query_proj, self.key_proj, self.value_proj)
        ]
        relative = self._relative(batch.buckets) if self.kinds else None
        keys, queries = self._positions(rel_embeddings, relative)
        outputs = []
        for bucket in batch.buckets.each:
            token = batch.buckets.token[bucket.start : bucket.start + bucket.places]
            lane = batch.token_spans.lane[token.view(bucket.rows, bucket.longest)[:, 0]]
            query, key, value = (
                x[token].unflatten(0, (bucket.rows, bucket.longest)).transpose(1, 2) for x in laid
            )
            scale = scaled_size_sqrt(query, self.terms).to(query.dtype)
            scores = query @ (key.transpose(2, 3) / scale)
            if relative is not None and keys is not None:
                found = query @ keys[lane].transpose(2, 3)
                index = relative.for_keys(bucket.longest).expand_as(scores)
                scores = scores + found.gather(3, index) / scale
            if relative is not None and queries is not None:
                found = key @ queries[lane].transpose(2, 3)
                index = relative.for_queries(bucket.longest).expand_as(scores)
                scores = scores + found.gather(3, index).transpose(2, 3) / scale
            weights = self._weights(scores, bucket)
            outputs.append((weights @ value).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, batch.buckets.place).unsqueeze(0), None

    def _weights(self, scores: Tensor, bucket: Bucket) -> Tensor:
        if bucket.real is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~bucket.real[:, None, None, :], lowest)
        weights = torch.softmax(scores, -1)
        batch = self.pack.now.batch
        streams = batch.streams
        if self.training and self.dropout.p > 0 and streams is not None:
            dropout = AttentionDropout(streams, self.pack_key, self.dropout.p)
            mask = dropout.mask(batch.buckets, bucket, self.heads)
            weights = Dropout.apply(weights, mask, dropout.scale)
        return weights

    def _relative(self, buckets: Buckets) -> RelativePlaces:
        """Return which position each pair of places looks up; the layers share it."""
        how = (self.span, self.buckets, self.farthest)
        if how not in buckets.made:
            longest, device = buckets.each[0].longest, buckets.token.device
            buckets.made[how] = RelativePlaces(looked_up(longest, *how), device)
        found: RelativePlaces = buckets.made[how]
        return found

    def _positions(
        self, embeddings: Tensor | None, relative: RelativePlaces | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Project the relative positions that the rows need, for every lane.

        Returns:
            Keys and queries, ``(lanes, heads, positions, width)`` each or None.
        """
        if relative is None or embeddings is None:
            return None, None
        lowest = relative.lowest
        used = embeddings[lowest : relative.highest + 1]
        now = self.pack.now
        side, lanes = now.shared_side(len(used), lowest), now.lanes
        spread = self.pos_dropout(used.repeat(lanes, 1).unsqueeze(0), side)

        def projected(layer: Any) -> Tensor:
            laid: Tensor = layer(spread, side)[0].unflatten(1, (self.heads, -1))
            return laid.unflatten(0, (lanes, -1)).transpose(1, 2)

        key_layer: Any = self.key_proj
        query_layer: Any = self.query_proj
        if not self.shared:
            key_layer = getattr(self, "pos_key_proj", None)
            query_layer = getattr(self, "pos_query_proj", None)
        keys = projected(key_layer) if "c2p" in self.kinds else None
        queries = projected(query_layer) if "p2c" in self.kinds else None
        return keys, queries


@dataclass(frozen=True, slots=True)
class LookedUp:
    """Which relative position a pair of places looks up, for rows up to some length.

    It depends on nothing but how far the places are apart, so one entry a distance will do.

    Attributes:
        longest: That length.
        keys, queries: Indices of positions, counted from :attr:`lowest`, for content to
            position and position to content; int64 ``(2 * longest - 1,)``. The first entry is
            of a query that far behind its key, the last of one that far before it.
        lowest, highest: The first and the last position that anyone looks up.
    """

    longest: int
    keys: NDArray[np.int64]
    queries: NDArray[np.int64]
    lowest: int
    highest: int


@lru_cache(maxsize=256)
def looked_up(longest: int, span: int, buckets: int, farthest: int) -> LookedUp:
    """Work out which relative positions rows look up, on the host: it must know how many.

    Args:
        longest: Tokens of the longest row.
        span: Positions in either direction.
        buckets: Positions in either direction before distances share one; 0 or less for none.
        farthest: The largest distance, where there are such.
    """
    row, one = torch.empty(longest, 1), torch.empty(1, 1)
    how = {"bucket_size": buckets, "max_position": farthest}
    behind = build_relative_position(row, one, **how).flatten()
    before = build_relative_position(one, row, **how).flatten()
    distance = torch.cat((behind.flip(0), before[1:]))
    last = 2 * span - 1
    keys, queries = ((sign * distance + span).clamp(0, last) for sign in (1, -1))
    lowest, highest = (int(x) for x in torch.aminmax(torch.cat((keys, queries))))
    return LookedUp(longest, (keys - lowest).numpy(), (queries - lowest).numpy(), lowest, highest)


class RelativePlaces:
    """The same as a matrix for a batch's rows of any length, on the device.

    Args:
        looked_up: For the longest row.
        device: Where the matrices shall lie.

    Attributes:
        lowest, highest: As :class:`LookedUp` has them.
    """

    def __init__(self, looked_up: LookedUp, device: torch.device) -> None:
        self.lowest, self.highest = looked_up.lowest, looked_up.highest
        self._longest = looked_up.longest
        self._keys, self._queries = on_device([looked_up.keys, looked_up.queries], device)
        self._matrices: dict[int, tuple[Tensor, Tensor]] = {}

    def for_keys(self, length: int) -> Tensor:
        """Which position's key each query and key look up, int64 ``(length, length)``."""
        return self._of(length)[0]

    def for_queries(self, length: int) -> Tensor:
        """Which position's query each key and query look up, int64 ``(length, length)``."""
        return self._of(length)[1]

    def _of(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self._matrices:
            start, entries = self._longest - length, 2 * length - 1
            keys, queries = (
                # Row i holds the distances i - j: the entries one further to the left each time.
                by_distance.narrow(0, start, entries).unfold(0, length, 1).flip(0)
                for by_distance in (self._keys, self._queries)
            )
            self._matrices[length] = keys, queries
        return self._matrices[length]
