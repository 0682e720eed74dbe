"""DeBERTa-v2's disentangled attention over rows of unequal length, for all lanes at once.

He et al. 2021 (arXiv:2006.03654). It is not one of transformers' exchangeable attention
functions: scores also depend on projected relative positions, and where LoRA adapts those
projections, each lane has its own. So the whole module is replaced; its layers stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DisentangledSelfAttention,
    build_relative_position,
    scaled_size_sqrt,
)

from lorasweep.model.packed_dropout import Dropout
from lorasweep.model.packed_modules import KeyedDropout, PackedModule
from lorasweep.model.row_attention import AttentionDropout
from lorasweep.model.row_buckets import Bucket

if TYPE_CHECKING:
    from lorasweep.model.packed_lora import PackedModel


def carries_disentangled(pack: PackedModel, model: nn.Module) -> tuple[str, bool]:
    """Replace DeBERTa-v2's attention where there is any.

    Returns:
        What a pack can't carry of it, empty if nothing; and whether there was any.
    """
    found = False
    for name, module in list(model.named_modules()):
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
        batch = self.pack.batch
        laid = [
            project(hidden_states)[0].unflatten(1, (self.heads, -1))
            for project in (self.query_proj, self.key_proj, self.value_proj)
        ]
        longest = batch.buckets.each[0].longest
        keys, queries, lowest = self._positions(rel_embeddings, longest)
        outputs = []
        for bucket in batch.buckets.each:
            token = batch.buckets.token[bucket.start : bucket.start + bucket.places]
            lane = batch.token_spans.lane[token.view(bucket.rows, bucket.longest)[:, 0]]
            query, key, value = (
                x[token].unflatten(0, (bucket.rows, bucket.longest)).transpose(1, 2) for x in laid
            )
            scale = scaled_size_sqrt(query, self.terms).to(query.dtype)
            scores = query @ (key.transpose(2, 3) / scale)
            for_keys, for_queries = self._indices(query, lowest)
            if keys is not None:
                found = query @ keys[lane].transpose(2, 3)
                scores = scores + found.gather(3, for_keys.expand_as(scores)) / scale
            if queries is not None:
                found = key @ queries[lane].transpose(2, 3)
                found = found.gather(3, for_queries.expand_as(scores)).transpose(2, 3)
                scores = scores + found / scale
            weights = self._weights(scores, bucket)
            outputs.append((weights @ value).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, batch.buckets.place).unsqueeze(0), None

    def _weights(self, scores: Tensor, bucket: Bucket) -> Tensor:
        if bucket.real is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~bucket.real[:, None, None, :], lowest)
        weights = torch.softmax(scores, -1)
        streams = self.pack.batch.streams
        if self.training and self.dropout.p > 0 and streams is not None:
            dropout = AttentionDropout(streams, self.pack_key, self.dropout.p)
            mask = dropout.mask(self.pack.batch.buckets, bucket, self.heads)
            weights = Dropout.apply(weights, mask, dropout.scale)
        return weights

    def _positions(
        self, embeddings: Tensor | None, longest: int
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Project the relative positions that rows of this length need, for every lane.

        Returns:
            Keys and queries, ``(lanes, heads, positions, width)`` each or None, and the index
            of the first position.
        """
        if not self.kinds or embeddings is None:
            return None, None, 0
        probe = embeddings.new_empty(1, longest, 1)
        both = [index.flatten() for index in self._indices(probe, 0)]
        lowest, highest = (int(x) for x in torch.aminmax(torch.cat(both)))
        used = embeddings[lowest : highest + 1]
        side = self.pack.shared_side(len(used), lowest)
        lanes = self.pack.lanes
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
        return keys, queries, lowest

    def _indices(self, rows: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
        """Which position each pair of places looks up, ``(1, 1, longest, longest)`` each."""
        if not self.kinds:
            empty = torch.zeros(0, dtype=torch.int64)
            return empty, empty
        distance = build_relative_position(
            rows, rows, bucket_size=self.buckets, max_position=self.farthest
        )
        distance = distance.to(rows.device, torch.int64).view(1, 1, *distance.shape[-2:])
        last = 2 * self.span - 1
        for_keys = (distance + self.span).clamp(0, last) - lowest
        return for_keys, (-distance + self.span).clamp(0, last) - lowest
