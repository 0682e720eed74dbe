"""DeBERTa's relative positions, worked out on the host, are the ones that transformers takes."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from lorasweep.model.packed_disentangled import RelativePlaces, looked_up


@pytest.mark.parametrize(("span", "buckets", "farthest"), [(16, 16, 128), (24, -1, 24), (6, 0, 6)])
@pytest.mark.parametrize("longest", [1, 2, 9, 70])
def test_relative_positions_are_those_of_transformers(longest, span, buckets, farthest):
    table = looked_up(longest, span, buckets, farthest)
    places = RelativePlaces(table, torch.device("cpu"))
    found = []
    for length in {1, max(1, longest // 2), longest}:
        row = torch.empty(1, length, 1)
        distance = build_relative_position(row, row, bucket_size=buckets, max_position=farthest)[0]
        for_keys = (distance + span).clamp(0, 2 * span - 1)
        for_queries = (-distance + span).clamp(0, 2 * span - 1)
        assert torch.equal(places.for_keys(length) + places.lowest, for_keys)
        assert torch.equal(places.for_queries(length) + places.lowest, for_queries)
        found += [for_keys.flatten(), for_queries.flatten()]
    # No position is projected that nobody looks up.
    assert (places.lowest, places.highest) == tuple(int(x) for x in torch.cat(found).aminmax())
