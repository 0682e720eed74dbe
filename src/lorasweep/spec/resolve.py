"""From a spec and a sampled point to a trial's plan; from a spec to what identifies its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep.core.plans import AdapterPlan, EngineSettings, LargestTrial, TrialPlan
from lorasweep.spec.schema import Spec
from lorasweep.spec.space import Choices


def plan_trial(
    spec: Spec,
    number: int,
    seed: int,
    parameters: Mapping[str, Any],
    folder: Path,
    begins: int = 0,
) -> TrialPlan:
    """Complete a sampled point with the spec's fixed values.

    Args:
        spec: The spec.
        number: The trial's number.
        seed: The trial's seed.
        parameters: Sampled values by the spec's names; absent ones stay fixed.
        folder: The trial's folder.
        begins: The engine's clock when the point was first asked for.
    """
    lora, training = spec.lora, spec.training
    targets = parameters.get("targets", lora.targets)
    return TrialPlan(
        number=number,
        seed=seed,
        adapter=AdapterPlan(
            rank=int(parameters.get("rank", lora.rank)),
            alpha=float(parameters.get("alpha", lora.alpha)),
            dropout=float(parameters.get("dropout", lora.dropout)),
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            top_layers=parameters.get("top_layers", lora.top_layers),
        ),
        learning_rate=float(parameters.get("learning_rate", training.learning_rate)),
        epochs=int(parameters.get("epochs", training.epochs)),
        batch_size=int(parameters.get("batch_size", training.batch_size)),
        weight_decay=float(parameters.get("weight_decay", training.weight_decay)),
        warmup=float(parameters.get("warmup", training.warmup)),
        scheduler=parameters.get("scheduler", training.scheduler),
        max_grad_norm=training.max_grad_norm,
        folder=folder,
        parameters=dict(parameters),
        begins=begins,
    )


def adapters_in(spec: Spec) -> tuple[AdapterPlan, ...]:
    """Every combination of targets and depth that the spec can ask for, to check them early."""
    found: set[tuple[tuple[str, ...], int | None]] = set()
    points: list[Mapping[str, Any]] = list(spec.search.sampler.points or ({},))
    dimensions = spec.search.space.dimensions
    targets = getattr(dimensions.get("targets"), "choices", None)
    layers_dimension = dimensions.get("top_layers")
    layers: Any = getattr(layers_dimension, "choices", None)
    if layers is None and layers_dimension is not None:
        layers = (getattr(layers_dimension, "low", 1), getattr(layers_dimension, "high", 1))
    for point in points:
        for names in targets or (point.get("targets", spec.lora.targets),):
            for depth in layers or (point.get("top_layers", spec.lora.top_layers),):
                found.add(((names,) if isinstance(names, str) else tuple(names), depth))
    ordered = sorted(found, key=repr)
    return tuple(AdapterPlan(1, 1.0, targets=names, top_layers=depth) for names, depth in ordered)


def largest_trial(spec: Spec) -> LargestTrial:
    """The most that any trial of the sweep can ask for, key by key."""
    rank = _largest(spec, "rank", spec.lora.rank)
    dropout = _largest(spec, "dropout", spec.lora.dropout)
    return LargestTrial(
        batch_size=int(_largest(spec, "batch_size", spec.training.batch_size)),
        adapters=tuple(
            replace(plan, rank=int(rank), alpha=rank, dropout=dropout) for plan in adapters_in(spec)
        ),
    )


def _largest(spec: Spec, key: str, fixed: float) -> float:
    """The largest value of a key with numbers; a range's upper end, though steps may miss it."""
    dimension: Any = spec.search.space.dimensions.get(key)
    if isinstance(dimension, Choices):
        return max(float(value) for value in dimension.choices if isinstance(value, int | float))
    if dimension is not None:
        return float(dimension.high)
    points: tuple[Mapping[str, Any], ...] = spec.search.sampler.points or ({},)
    return max(float(point.get(key, fixed)) for point in points)


def engine_settings(spec: Spec) -> EngineSettings:
    """What all trials of the sweep share."""
    return EngineSettings(
        precision=spec.training.precision,
        eval_batch_size=spec.training.eval_batch_size,
        log_every=spec.training.log_every,
        largest=largest_trial(spec),
    )


def identity(spec: Spec, data: str, base: str) -> dict[str, str]:
    """What must not change while a study goes on, key by key, so that a change can be named.

    The name, the total of trials, the time limit, baselines, tracking and the output
    folder decide no trial's result and may change between commands. The data and the base
    count by content, not by path.

    Args:
        spec: The spec.
        data: The corpus's fingerprint.
        base: The base's digest.
    """
    decides = spec.model_dump(
        mode="json",
        include={
            "seed": True,
            "model": {"max_length", "base_dropout"},
            "lora": True,
            "training": True,
            "search": {"objective", "sampler", "pruner", "space"},
            "engine": True,
        },
    )
    # How often losses are written and how many rows are scored at once change no weight.
    for key in ("log_every", "eval_batch_size"):
        decides["training"].pop(key)
    # Keys of later versions: a study that was begun without them goes on where they aren't used.
    space = decides["search"]["space"]
    for key in ("scheduler", "seed"):
        if space[key] is None:
            space.pop(key)
    flat = _flatten(decides)
    return {"data": data, "base": base, **flat}


def fingerprint(parts: Mapping[str, str]) -> str:
    """SHA-256 (hex) over an identity: equal fingerprints, equal results on one machine."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat
