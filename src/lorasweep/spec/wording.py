"""Pydantic's error codes in the words of a person who wrote a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from lorasweep.spec.schema import Spec
from lorasweep.spec.space import BeyondLimitsError

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "is_instance_of": "a mapping",
}
_RANGE = "must be a range such as {low: 1, high: 8}, or {choices: [4, 8]}"
_CHOICES = "must be {choices: [...]}"
_BOUNDS = {
    "greater_than_equal": ("ge", "≥"),
    "greater_than": ("gt", ">"),
    "less_than_equal": ("le", "≤"),
    "less_than": ("lt", "<"),
}


def explain(detail: ErrorDetails, path: Sequence[str | int], tree: Any) -> tuple[str, str]:
    """Return what was expected and what came, and what to do (often nothing)."""
    code, context, came = detail["type"], detail.get("ctx", {}), detail["input"]
    if code == "extra_forbidden":
        return _unknown_key(path, tree)
    if code == "missing":
        return "is required and missing", ""
    if code == "value_error":
        error = context["error"]
        return str(error), error.advice if isinstance(error, BeyondLimitsError) else ""
    if code in _BOUNDS:
        name, sign = _BOUNDS[code]
        bound = context[name]
        kind = "a whole number" if isinstance(bound, int) else "a number"
        return f"must be {kind} {sign} {bound:g}, got {_show(came)}", ""
    if code in ("literal_error", "union_tag_invalid", "union_tag_not_found"):
        return _one_of(context, came)
    if code in _TYPES:
        in_space = len(path) == 3 and tuple(path[:2]) == ("search", "space")
        if in_space and _TYPES[code] == "a mapping":
            advice = f"To keep {path[-1]} fixed, write it under training or lora instead."
            if path[-1] == "seed":
                advice = "The sweep's own seed is the key seed at the top."
            wanted = _CHOICES if path[-1] in ("targets", "scheduler") else _RANGE
            return f"{wanted}, got {_show(came)}", advice
        advice = ""
        if isinstance(came, str) and code in ("int_type", "float_type", "bool_type"):
            advice = "Remove the quotes if there are any."
        return f"must be {_TYPES[code]}, got {_show(came)}", advice
    if code == "too_short":
        least = context.get("min_length", 1)
        return f"must list at least {least}, got {context.get('actual_length', 0)}", ""
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, got {_show(came)}", ""


def _one_of(context: Any, came: Any) -> tuple[str, str]:
    expected = str(context.get("expected") or context.get("expected_tags") or "")
    names = [name.strip().strip("'") for name in expected.replace(" or ", ", ").split(",")]
    names = [name for name in names if name]
    if isinstance(came, dict):
        tag = came.get("kind")
        if tag is None:
            return f"needs a kind: one of {', '.join(names)}" if names else "needs a kind", ""
        came = tag
    advice = _did_you_mean(str(came), names)
    return f"must be one of {', '.join(names)}, got {_show(came)}", advice


def _unknown_key(path: Sequence[str | int], tree: Any) -> tuple[str, str]:
    key = str(path[-1])
    known = sorted(_known_keys(path[:-1], tree))
    advice = _did_you_mean(key, known)
    if not advice and known:
        advice = f"Known here: {', '.join(known)}."
    return "unknown key", advice


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def _known_keys(path: Sequence[str | int], tree: Any) -> set[str]:
    """Keys that the schema allows at ``path``; for a union, those of the branch that is meant."""
    models: list[type[BaseModel]] = [Spec]
    node: Any = tree
    for part in path:
        node = node[part]
        if isinstance(part, int):
            continue
        annotations = [
            model.model_fields[part].annotation for model in models if part in model.model_fields
        ]
        models = [model for annotation in annotations for model in _models_in(annotation)]
        kind = node.get("kind") if isinstance(node, dict) else None
        branch = [model for model in models if _has_kind(model, kind)]
        models = branch or models
    return {key for model in models for key in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _has_kind(model: type[BaseModel], kind: Any) -> bool:
    field = model.model_fields.get("kind")
    return field is not None and kind in get_args(field.annotation)


def _show(value: Any) -> str:
    """The value as YAML would show it, shortened."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
