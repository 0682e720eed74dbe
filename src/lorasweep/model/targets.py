"""Where LoRA attaches: from the plan's words to full names of linear modules.

PEFT has default targets for some encoders only, and matches names by suffix; resolving them
here gives one answer for every architecture, and a sentence where there is none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from lorasweep.core.errors import ModelError, Problem
from lorasweep.core.plans import AdapterPlan

AUTO = ("auto",)
ALL_LINEAR = ("all-linear",)

# Hu et al. 2021 (arXiv:2106.09685, section 7.1): adapting query and value is the best use of
# few parameters. Each architecture has its own names for them.
_QUERY_AND_VALUE: dict[str, tuple[str, ...]] = {
    "albert": ("query", "value"),
    "bert": ("query", "value"),
    "camembert": ("query", "value"),
    "deberta": ("in_proj",),  # query, key and value in one
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": ("query", "value"),
    "ernie": ("query", "value"),
    "eurobert": ("q_proj", "v_proj"),
    "flaubert": ("q_lin", "v_lin"),
    "fnet": ("intermediate.dense", "output.dense"),  # has no attention
    "funnel": ("q_head", "v_head"),
    "modernbert": ("Wqkv",),  # query, key and value in one
    "mpnet": ("q", "v"),
    "nomic_bert": ("q_proj", "v_proj"),
    "roberta": ("query", "value"),
    "xlm": ("q_lin", "v_lin"),
    "xlm-roberta": ("query", "value"),
    # XLNet's attention holds bare parameters, no linear modules: its feed-forward layers instead.
    "xlnet": ("layer_1", "layer_2"),
}
# For architectures that are not in the table: the first of these that is found.
_COMMON = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("Wqkv",))

_NUMBERED = re.compile(r"\.(\d+)\.")


def linear_modules(model: PreTrainedModel, excluded: Collection[str] = ()) -> tuple[str, ...]:
    """Name every linear module inside the encoder, in the model's order.

    Args:
        model: A classifier without an adapter.
        excluded: Modules that are trained as a whole, so LoRA must stay out of them.
    """
    prefix = f"{model.base_model_prefix}."
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith(prefix)
        and not any(name == out or name.startswith(f"{out}.") for out in excluded)
    )


def resolve_targets(
    model: PreTrainedModel, plan: AdapterPlan, excluded: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the full names of the modules that a plan adapts, in the model's order.

    Args:
        model: A classifier without an adapter; on the meta device is enough.
        plan: Names targets and how many of the top layers.
        excluded: Modules that are trained as a whole.

    Raises:
        ModelError: A target matches nothing, or there are fewer layers than ``top_layers``.
    """
    linear = linear_modules(model, excluded)
    if plan.targets == ALL_LINEAR:
        found = linear
    elif plan.targets == AUTO:
        found = _automatic(model, linear)
    else:
        found = _named(model, plan.targets, linear)
    return found if plan.top_layers is None else _top(model, found, plan, linear)


def short_names(names: Collection[str], linear: Collection[str]) -> list[str]:
    """Return suffixes that mean exactly ``names`` among ``linear``, or else ``names`` themselves.

    ``["query", "value"]`` reads better in adapter_config.json than 24 full names.
    """
    last = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in linear if name.rpartition(".")[2] in last}
    return last if meant == set(names) else sorted(names)


def _matching(name: str, linear: Collection[str]) -> tuple[str, ...]:
    """Match as PEFT does: the whole name, or its end after a dot."""
    return tuple(full for full in linear if full == name or full.endswith(f".{name}"))


def _automatic(model: PreTrainedModel, linear: tuple[str, ...]) -> tuple[str, ...]:
    kind = model.config.model_type
    for names in [_QUERY_AND_VALUE[kind]] if kind in _QUERY_AND_VALUE else _COMMON:
        groups = [_matching(name, linear) for name in names]
        if all(groups):
            chosen = {full for group in groups for full in group}
            return tuple(full for full in linear if full in chosen)
    raise ModelError(
        Problem(
            "lora.targets auto",
            f"query and value of the architecture {kind} are not known",
            f"Name the modules to adapt; it has {_examples(linear)}.",
        )
    )


def _named(
    model: PreTrainedModel, targets: tuple[str, ...], linear: tuple[str, ...]
) -> tuple[str, ...]:
    problems = []
    chosen: set[str] = set()
    everything = {name for name, _ in model.named_modules()}
    for target in targets:
        found = _matching(target, linear)
        chosen.update(found)
        if found:
            continue
        short = sorted({name.rpartition(".")[2] for name in linear})
        near = difflib.get_close_matches(target, [*short, *linear], n=1)
        what = f"matches no linear module of {model.config.model_type}"
        if _matching(target, everything):
            what = "names a module that LoRA can't adapt: not linear, or part of the head"
        advice = f"Did you mean {near[0]}? " if near else ""
        problems.append(
            Problem(f"lora.targets {target}", what, f"{advice}It has {_examples(linear)}.")
        )
    if problems:
        raise ModelError(problems)
    return tuple(name for name in linear if name in chosen)


def _examples(linear: tuple[str, ...]) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    return ", ".join(names) if names else "no linear modules"


def _layer(name: str) -> int | None:
    """Number of the transformer layer that a module lies in: its name's first number."""
    found = _NUMBERED.search(f".{name}.")
    return int(found.group(1)) if found else None


def _top(
    model: PreTrainedModel, found: tuple[str, ...], plan: AdapterPlan, linear: tuple[str, ...]
) -> tuple[str, ...]:
    assert plan.top_layers is not None
    layers = sorted({number for name in linear if (number := _layer(name)) is not None})
    if plan.top_layers > len(layers):
        raise ModelError(
            Problem(
                "lora.top_layers",
                f"must be at most {len(layers)}, the layers of this {model.config.model_type}, "
                f"got {plan.top_layers}",
                "ALBERT's layers share one set of weights." if len(layers) == 1 else "",
            )
        )
    wanted = set(layers[-plan.top_layers :])
    inside = tuple(name for name in found if _layer(name) in wanted)
    if not inside:
        raise ModelError(
            Problem(
                "lora.targets",
                f"{', '.join(plan.targets)} match nothing in the top {plan.top_layers} layers",
            )
        )
    return inside
