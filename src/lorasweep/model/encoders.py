"""What lorasweep knows of encoders: which are fit, their longest text, their dropouts' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from lorasweep.core.errors import ModelError, Problem

_CHOOSE = "Choose an encoder such as BERT, DistilBERT, RoBERTa, ELECTRA, DeBERTa or ModernBERT."

# Generates text like a decoder, but reads both ways: an encoder for our purpose.
_ENCODERS_LISTED_AS_CAUSAL = frozenset({"xlnet"})

# They count positions from the padding token's id + 1, so that many embeddings are never used.
_POSITIONS_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
_NO_POSITION_LIMIT = frozenset({"xlnet", "funnel"})  # relative positions only


def check_known(raw: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json whose architecture transformers itself doesn't implement.

    Args:
        raw: The file's content.
        where: Names the model to a person.

    Raises:
        ModelError: Nobody knows the architecture, or only code of its repository does.
    """
    kind = raw.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in raw:
        raise ModelError(
            Problem(
                where,
                "it runs on Python code from its own repository, which lorasweep never executes",
                "Choose a model whose architecture transformers itself implements.",
            )
        )
    raise ModelError(
        Problem(
            where,
            f"transformers knows no architecture called {kind!r} (model_type in config.json)",
            _CHOOSE,
        )
    )


def check_encoder(config: PreTrainedConfig, where: str) -> None:
    """Refuse an architecture that is no encoder, or that can't classify texts.

    Raises:
        ModelError: It is a decoder, an encoder-decoder, or has no classifier in transformers.
    """
    kind = config.model_type
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fault = ""
    if getattr(config, "is_encoder_decoder", False):
        fault = f"{kind} is an encoder-decoder, not an encoder"
    elif (causal and not masked and kind not in _ENCODERS_LISTED_AS_CAUSAL) or getattr(
        config, "is_decoder", False
    ):
        fault = f"{kind} is a decoder, not an encoder"
    elif kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        fault = f"transformers has no text classifier of the architecture {kind}"
    if fault:
        raise ModelError(Problem(where, fault, _CHOOSE))


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the base's positions reach to; None where they have no end."""
    kind = config.model_type
    limit = getattr(config, "max_position_embeddings", None)
    if kind in _NO_POSITION_LIMIT or limit is None or limit <= 0:
        return None
    # DeBERTa's relative positions fall into buckets that grow with the distance.
    if getattr(config, "relative_attention", False) and not getattr(
        config, "position_biased_input", True
    ):
        return None
    if kind in _POSITIONS_AFTER_PADDING:
        # MPNet's padding id is fixed to 1 in its code.
        padding = 1 if kind == "mpnet" else (config.pad_token_id or 0)
        return int(limit) - int(padding) - 1
    return int(limit)


def set_base_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set every dropout that the configuration has to ``rate``, whatever it is called.

    The names differ by architecture (``hidden_dropout_prob``, ``seq_classif_dropout``,
    ``mlp_dropout``, …), but all that set one contain the word. None stands for "as the hidden
    dropout" and is set, too.
    """
    for name, value in config.to_dict().items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if "dropout" in name and (number or value is None):
            setattr(config, name, rate)
