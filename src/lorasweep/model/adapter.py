"""From a plan to a PEFT model: the only place that speaks PEFT's configuration language."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lorasweep.core.errors import ModelError, Problem
from lorasweep.core.plans import AdapterPlan
from lorasweep.model.base import Base, FreshClassifier, seeded
from lorasweep.model.targets import linear_modules, resolve_targets, short_names

# PEFT appends these two to every sequence classifier's modules_to_save by itself.
_SAVED_BY_PEFT = ("classifier", "score")
_PREFIX = "base_model.model."


def attach(fresh: FreshClassifier, plan: AdapterPlan, seed: int) -> PeftModel:
    """Put LoRA (Hu et al. 2021, arXiv:2106.09685) into a model that was just loaded.

    Trainable afterwards: the adapter, every newly initialised module, and the head. All of
    them are in PEFT's checkpoint, which PEFT alone would only do for modules called
    ``classifier`` or ``score``. The model is changed in place; the global random state isn't.

    Args:
        fresh: From :func:`lorasweep.model.base.fresh_classifier`, used once.
        plan: Size, scaling, dropout and place of the adapter.
        seed: The adapter's first weights are drawn from it.

    Raises:
        ModelError: The plan's targets match nothing.
    """
    whole = trained_whole(fresh)
    names = resolve_targets(fresh.model, plan, whole)
    # PEFT writes into the configuration that it is given, so each model gets its own.
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        bias="none",
        target_modules=short_names(names, linear_modules(fresh.model, whole)),
        modules_to_save=[name for name in whole if name not in _SAVED_BY_PEFT],
        base_model_name_or_path=_reference(fresh.base),
        revision=fresh.base.revision,
    )
    # get_peft_model overwrites the reference with the model's own, and warns if they differ.
    fresh.model.name_or_path = _reference(fresh.base)
    with seeded(seed), quiet_peft():
        model: PeftModel = get_peft_model(fresh.model, config)
    _check_attached(model, names, whole)
    return model


def trained_whole(fresh: FreshClassifier) -> tuple[str, ...]:
    """Name the modules whose own weights are trained: the new ones, and always some head.

    A base that already is a classifier brings its head along. With this number of labels nothing
    of it is new, and all of it is trained on; with another number a part of it is new, and what
    lies in the same module is trained with it: PEFT finds modules by the ends of their names, and
    would wrap one inside the other.
    """
    encoder = fresh.model.base_model_prefix
    inside = [name for name in fresh.new_modules if name.startswith(f"{encoder}.")]
    outside = {name.split(".")[0] for name in fresh.new_modules if name not in inside}
    heads = [
        name
        for name, module in fresh.model.named_children()
        if name != encoder and any(True for _ in module.parameters())
    ]
    if outside:
        heads = [name for name in heads if name in outside or name.endswith(_SAVED_BY_PEFT)]
    return (*inside, *heads)


def check_targets(base: Base, plans: Iterable[AdapterPlan]) -> None:
    """Check that LoRA can attach as each plan says, without loading any weights.

    Raises:
        ModelError: With the problems of all plans: targets that match nothing, more top
            layers than there are.
    """
    model = skeleton(base)
    problems: dict[Problem, None] = {}
    for plan in plans:
        try:
            resolve_targets(model, plan)
        except ModelError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ModelError(problems)


def skeleton(base: Base) -> PreTrainedModel:
    """Build the base's classifier without memory for its weights (torch's meta device)."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            base.config, trust_remote_code=False
        )
    return model


def adapted_modules(model: PeftModel) -> tuple[str, ...]:
    """Full names of the modules that carry LoRA, as the base without an adapter calls them."""
    return tuple(
        name.removeprefix(_PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    )


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count a PEFT model's parameters: trainable, and all.

    PEFT keeps an untouched copy beside each module that is trained as a whole. The copy never
    takes part, so it isn't counted.
    """
    trainable = total = 0
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide one warning that PEFT 0.21 draws from transformers 5.2x whenever it builds a model.

    It asks for ``is_gradient_checkpointing``, whose name changes in transformers 6. A user can
    do nothing about it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning
        )
        yield


def _reference(base: Base) -> str:
    """What adapter_config.json calls the base: the Hub id where there is one, else the folder."""
    return base.location if base.revision is None else base.name


def _check_attached(model: PeftModel, names: tuple[str, ...], whole: tuple[str, ...]) -> None:
    """Hold PEFT's matching by suffix to what was meant: nothing more is trained, nothing less."""
    wrapped = tuple(
        name.removeprefix(_PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    if set(adapted_modules(model)) != set(names) or set(wrapped) != set(whole):
        raise ModelError(
            Problem(
                "lora.targets",
                f"PEFT attached to other modules than meant: LoRA on "
                f"{', '.join(sorted(adapted_modules(model)))}; trained whole: {', '.join(wrapped)}",
                "Please report this architecture; naming the targets in full may help.",
            )
        )
