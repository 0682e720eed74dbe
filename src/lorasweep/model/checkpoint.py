"""Weights on disk: adapters in PEFT's own format, files of which a reader never finds half."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lorasweep.core.errors import ModelError, Problem, StorageError
from lorasweep.model.adapter import quiet_peft
from lorasweep.model.base import Base, fresh_classifier


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter, the head and all newly initialised modules, replacing what was there.

    It is written beside the folder and then renamed, so that a process killed at any moment
    leaves the old adapter or the new one, or for an instant none, but never a mixture.

    Raises:
        StorageError: The disk is full or can't be written.
    """
    writing = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    try:
        for left_over in (writing, replaced):
            shutil.rmtree(left_over, ignore_errors=True)
        writing.mkdir(parents=True)
        # Never the embeddings: deciding "auto" asks the Hub for the base's configuration.
        model.save_pretrained(str(writing), save_embedding_layers=False)
        # PEFT's model card is an empty form; the sweep writes a real one where it exports.
        (writing / "README.md").unlink(missing_ok=True)
        if folder.exists():
            folder.rename(replaced)
        writing.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise StorageError(
            Problem(
                str(folder),
                f"the adapter can't be written: {error.strerror or error}",
                "Make room or choose another output folder, then run the same command again.",
            )
        ) from error


def writing_path(path: Path) -> Path:
    """Where :func:`write_whole` writes before it renames; a kill may leave it behind."""
    return path.with_name(f".{path.name}.writing")


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Write a file so that a kill or a power cut leaves the old one or the new one.

    Args:
        path: The file; its folder is made if missing. One process at a time writes it.
        content: All of it.
        what: What it is, for people: ``the checkpoint``.

    Raises:
        StorageError: The disk is full or can't be written. The old file is as it was.
    """
    writing = writing_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        writing.replace(path)
    except OSError as error:
        with suppress(OSError):
            writing.unlink(missing_ok=True)
        raise StorageError(
            Problem(
                str(path),
                f"{what} can't be written: {error.strerror or error}",
                "Make room or choose another output folder, then run the same command again.",
            )
        ) from error


def load_finetuned(base: Base, folder: Path) -> PeftModel:
    """Load a base with a saved adapter: the same predictions as when it was saved.

    Works offline. Nothing of the result is random: an adapter that lacks a module which the
    base lacks as well is refused.

    Args:
        base: The base that the adapter was trained on, opened with the same label names.
        folder: Written by :func:`save_adapter`.

    Returns:
        The model on the CPU, in evaluation mode, without gradients.

    Raises:
        ModelError: The folder holds no adapter, or none that belongs to this base.
    """
    saved = _saved_modules(folder)
    fresh = fresh_classifier(base, seed=0)
    lacking = [name for name in fresh.new_modules if not _covered(name, saved)]
    if lacking:
        raise ModelError(
            Problem(
                str(folder),
                f"neither the adapter nor {base.name} has weights for {', '.join(lacking)}",
                "Its predictions would be random; train it again.",
            )
        )
    try:
        with quiet_peft():
            model: PeftModel = PeftModel.from_pretrained(fresh.model, str(folder))
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            Problem(
                str(folder),
                f"the adapter does not fit {base.name}: {error}",
                "Open the base and the labels that it was trained with.",
            )
        ) from error
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def merge(model: PeftModel) -> PreTrainedModel:
    """Add the low-rank updates into the base's weights and return a plain classifier.

    The given model is taken apart: don't use it afterwards.
    """
    merged: PreTrainedModel = model.merge_and_unload()
    return merged.eval()


def _saved_modules(folder: Path) -> list[str]:
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            Problem(str(folder), f"holds no readable adapter: {error}", "Was it saved completely?")
        ) from error
    return list(config.get("modules_to_save") or [])


def _covered(name: str, saved: list[str]) -> bool:
    """Whether PEFT saves a module when told to save ``saved``, which it matches by suffix."""
    return any(name.endswith(suffix) for suffix in saved)
