"""How many floating-point operations a LoRA step needs, whoever does it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What of an encoder with a classifier decides its matrix products.

    Attributes:
        layers: How many.
        hidden, inner: Width, and width inside the feed-forward part.
        labels: Of the classifier.
        frozen_dense, trained_dense: Layers of ``hidden`` by ``hidden`` between the first token
            and the classifier: BERT's pooler is frozen, DistilBERT's ``pre_classifier`` is new.
    """

    layers: int
    hidden: int
    inner: int
    labels: int
    frozen_dense: int
    trained_dense: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read it from the configuration of a BERT or DistilBERT.

        Raises:
            ValueError: It is neither.
        """
        if config.model_type not in ("bert", "distilbert"):
            raise ValueError(f"products are counted for bert and distilbert: {config.model_type}")
        bert = config.model_type == "bert"
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size if bert else config.hidden_dim,
            labels=config.num_labels,
            frozen_dense=int(bert),
            trained_dense=int(not bert),
        )


def useful_flops(
    shape: Shape, lanes: Iterable[tuple[Sequence[int], int]], *, first_token_only: bool = True
) -> dict[str, int]:
    """Count one training step: two operations per multiplication of matrix products, no others.

    With T tokens in B rows of n tokens each, Q = Σ n², width d, inner width f, rank r, c labels,
    LoRA on query and value of every layer, per lane:

    ========================  ==============================  =================================
    part                      forward                         backward, input gradients
    ========================  ==============================  =================================
    a layer's linear layers   4 · 2Td² + 2 · 2Tdf             the same; in the first layer only
                                                              2Td² + 2 · 2Tdf (output and
                                                              feed-forward): nothing below
                                                              its query and value is trained
    its attention             2Qd + 2Qd (scores, mixture)     8Qd; in the first layer 6Qd (its
                                                              keys need no gradient)
    the last layer, for the   keys, values: 2 · 2Td²; the     the same; attention 8Td; where it
    first tokens only         rest with B for T;              is also the first layer: no 4Td²
                              attention 2Td + 2Td             and no 2Bd² of query, and 6Td
    its LoRA, two modules     2 · (2Tdr + 2Trd), true ranks   4 products of that size each; 3 in
                                                              the first layer; B for T at the
                                                              last layer's query
    pooler or pre_classifier  2Bd²                            2Bd², and 2Bd² more where trained
    classifier                2Bdc                            4Bdc
    ========================  ==============================  =================================

    Weight gradients of frozen layers, padding, ranks padded with zeros, and the last layer of all
    other tokens are not useful. Embeddings, norms, softmax, dropout and AdamW are not products.

    Args:
        shape: Of the model.
        lanes: Token counts of a lane's rows, and its rank.
        first_token_only: False counts the last layer as an ordinary one, as transformers does it.

    Returns:
        Operations with frozen weights of ``hidden`` by ``hidden`` (``square``, the pooler's
        included) and of the feed-forward parts (``wide``); of ``attention``, ``lora``, ``head``.
    """
    found = dict.fromkeys(("square", "wide", "attention", "lora", "head"), 0)
    for lengths, rank in lanes:
        for number in range(shape.layers):
            spared = first_token_only and number == shape.layers - 1
            counts = _layer(shape, lengths, rank, first=number == 0, spared=spared)
            for part, count in counts.items():
                found[part] += count
        rows, d = len(lengths), shape.hidden
        found["square"] += shape.frozen_dense * 4 * rows * d * d
        found["head"] += shape.trained_dense * 6 * rows * d * d + 6 * rows * d * shape.labels
    return found


def _layer(
    shape: Shape, lengths: Sequence[int], rank: int, *, first: bool, spared: bool
) -> dict[str, int]:
    d, tokens = shape.hidden, sum(lengths)
    asking = len(lengths) if spared else tokens  # whose queries and outputs are needed
    pairs = tokens if spared else sum(length * length for length in lengths)
    output = 2 * asking * d * d
    inputs = 2 * d * d * (asking + 2 * tokens)  # query, key and value
    lora = 2 * d * rank * (asking + tokens)  # one product of query's and one of value's adapter
    return {
        "square": output + inputs + output + (0 if first else inputs),
        "wide": 2 * 2 * asking * 2 * d * shape.inner,  # up and down, forward and backward
        "attention": 2 * pairs * d * (2 + (3 if first else 4)),
        "lora": lora * (2 + (3 if first else 4)),
    }


def counted_by_torch(base: Any, length: int, rank: int) -> int:
    """Let torch count a step of the plain PEFT model on one row, without padding.

    Args:
        base: An opened base, from ``lorasweep.model.base.open_base``.
        length: Tokens of the row.
        rank: Of the adapter.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lorasweep.core.plans import AdapterPlan
    from lorasweep.model.adapter import attach
    from lorasweep.model.base import fresh_classifier

    fresh = fresh_classifier(base, 0)
    fresh.model.config._attn_implementation = "eager"  # whose products are plain to see
    model = attach(fresh, AdapterPlan(rank, 2.0 * rank), 0).train()
    ids = torch.randint(5, base.config.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=torch.zeros(1, dtype=torch.int64)).loss.backward()
    return int(counter.get_total_flops())
