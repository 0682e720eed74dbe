"""The frozen base: opened and checked once per sweep, and loaded whenever somebody asks.

``open_base`` finds the files, refuses what can't be fine-tuned as an encoder classifier, and
reads configuration and tokenizer. ``fresh_classifier`` loads the weights each time it is
called, so that no trial can ever see what another one did to them. (A pack loads them once, and
each of its trials has a copy of what it trains: see ``fresh_copies.py``.)
"""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lorasweep.core.errors import ModelError, Problem, StorageError
from lorasweep.model.encoders import (
    check_encoder,
    check_known,
    position_limit,
    set_base_dropout,
)
from lorasweep.model.files import locate
from lorasweep.spec.schema import ModelSpec


@dataclass(frozen=True, slots=True)
class Base:
    """A base that was opened and found fit: everything about it but its weights.

    Attributes:
        name: As the spec gives it.
        location: The local folder that holds its files, absolute.
        revision: The Hub's commit; None for a local or embedded model.
        digest: SHA-256 of its weights.
        config: Its configuration, with the labels, the problem type and the base dropout set.
            Treat it as read-only: models get copies.
        tokenizer: Its fast tokenizer.
        max_length: Tokens a text may have.
        base_dropout: What the spec says; None where the model's own configuration stands.
        label_names: In order of label index.
    """

    name: str
    location: str
    revision: str | None
    digest: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    base_dropout: float | None
    label_names: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The model type, such as ``bert`` or ``deberta-v2``."""
        return str(self.config.model_type)

    @property
    def pad_id(self) -> int:
        """Id of the token that fills up short rows of a batch."""
        return int(self.tokenizer.pad_token_id)


@dataclass(frozen=True, slots=True)
class FreshClassifier:
    """A model just loaded, in evaluation mode, and what of it is new.

    Attributes:
        model: The base with a classification head, float32, on the CPU.
        new_modules: Names of the modules whose weights the base doesn't have, topmost first:
            ``("bert.pooler", "classifier")``. They were drawn from the seed, so they must be
            trained and saved.
        drawn: Full names of the parameters that were drawn from the seed.
        base: Where it came from.
    """

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    drawn: frozenset[str]
    base: Base


def open_base(spec: ModelSpec, label_names: tuple[str, ...]) -> Base:
    """Find a base model and check that it can be fine-tuned as a text classifier.

    Args:
        spec: Hub id, local folder or ``embedded/minilm``, and the token limit.
        label_names: In order of label index; they go into the model's configuration.

    Raises:
        ModelError: It isn't there, is no encoder classifier, would have to run code of its
            repository, has no safetensors weights or fast tokenizer, or can't take
            ``max_length`` tokens.
    """
    where = f"model.name {spec.name}"
    files = locate(spec)
    config = _read_config(files.folder, where)
    tokenizer = _read_tokenizer(files.folder, config, where)
    limit = position_limit(config)
    if limit is not None and spec.max_length > limit:
        raise ModelError(
            Problem(
                "model.max_length",
                f"{spec.name} takes at most {limit} tokens, got {spec.max_length}",
                f"Set it to {limit} or less.",
            )
        )
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if spec.base_dropout is not None:
        set_base_dropout(config, spec.base_dropout)
    return Base(
        name=spec.name,
        location=str(files.folder),
        revision=files.revision,
        digest=files.digest,
        config=config,
        tokenizer=tokenizer,
        max_length=spec.max_length,
        base_dropout=spec.base_dropout,
        label_names=label_names,
    )


def fresh_classifier(base: Base, seed: int) -> FreshClassifier:
    """Load the base with a classification head; what the base lacks is drawn from ``seed``.

    The global random state is the same before and after.

    Raises:
        ModelError: The weights don't fit the architecture that config.json names.
        StorageError: They were there when the base was opened and can't be read now, which
            concerns all trials.
    """
    with seeded(seed), quiet_transformers(), _reading(base):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            base.location,
            config=copy.deepcopy(base.config),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            # A classifier that was fine-tuned for another number of labels: its head is new.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    mismatched = {entry[0] for entry in loading["mismatched_keys"]}
    drawn = frozenset(loading["missing_keys"]) | mismatched
    new = _topmost_modules(model, drawn)
    _check_only_new_ends(model, new, base)
    model.eval()
    return FreshClassifier(model=model, new_modules=new, drawn=drawn, base=base)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` on every device inside; outside, the random state is as it was."""
    with random_state_kept():
        torch.manual_seed(seed)
        yield


def random_state_kept() -> AbstractContextManager[None]:
    """Give torch's random states back as they were, those of CUDA devices in use included."""
    # Unasked, torch warns where there are several.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=list(devices))


@contextmanager
def _reading(base: Base) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOMEM or "(os error 12)" in str(error):
            raise MemoryError(str(error)) from error
        raise StorageError(
            Problem(
                base.location,
                f"the weights of {base.name} can't be read: {error}",
                "Restore them, then run the same command again.",
            )
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and the report on newly initialised weights, which we act upon."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _read_config(folder: Path, where: str) -> PreTrainedConfig:
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(Problem(f"{folder / 'config.json'}", f"is not JSON: {error}")) from error
    check_known(raw, where)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(Problem(where, f"its config.json can't be read: {error}")) from error
    check_encoder(config, where)
    return config


def _read_tokenizer(folder: Path, config: PreTrainedConfig, where: str) -> PreTrainedTokenizerBase:
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a broken file raises whatever its parser raises
        raise ModelError(Problem(where, f"its tokenizer can't be loaded: {error}")) from error
    problems = []
    if not tokenizer.is_fast:
        problems.append(
            Problem(
                where,
                "it has no fast tokenizer (tokenizer.json)",
                "Load it with transformers where sentencepiece is installed and save it again.",
            )
        )
    if tokenizer.pad_token_id is None:
        problems.append(
            Problem(
                where,
                "its tokenizer has no padding token",
                'Set one and save it again: tokenizer.pad_token = "[PAD]".',
            )
        )
    size = getattr(config, "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        problems.append(
            Problem(
                where,
                f"its tokenizer knows {len(tokenizer)} tokens, but its weights only {size}",
                "They don't belong together.",
            )
        )
    if problems:
        raise ModelError(problems)
    return tokenizer


def _topmost_modules(model: PreTrainedModel, missing: frozenset[str]) -> tuple[str, ...]:
    """Name the highest modules all of whose parameters are missing, in the model's order.

    A module that holds a missing parameter beside loaded ones is named as well: it is trained
    as a whole.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: dict[str, None] = {}
    for name in names:
        if name not in missing:
            continue
        parts = name.split(".")[:-1]
        owner = ".".join(parts)
        for depth in range(1, len(parts)):
            above = ".".join(parts[:depth])
            if all(other in missing for other in names if other.startswith(f"{above}.")):
                owner = above
                break
        found[owner] = None
    return tuple(found)


def _check_only_new_ends(model: PreTrainedModel, new: tuple[str, ...], base: Base) -> None:
    """Refuse weights that lack a part of the encoder itself: that would be an untrained base.

    A pooler, or anything outside the encoder, may be new; embeddings and layers may not.
    """
    prefix = model.base_model_prefix
    lacking = [
        name
        for name in new
        if name == prefix
        or (name.startswith(f"{prefix}.") and "pool" not in name.removeprefix(f"{prefix}."))
    ]
    if lacking:
        raise ModelError(
            Problem(
                f"model.name {base.name}",
                f"its weights lack parts of the {base.architecture} encoder: {', '.join(lacking)}",
                "config.json and the weights don't belong together.",
            )
        )
