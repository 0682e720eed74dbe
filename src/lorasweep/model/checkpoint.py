"""Weights on disk: adapters in PEFT's own format, files of which a reader never finds half."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lorasweep.core.errors import LoraSweepError, ModelError, Problem, StorageError
from lorasweep.model.adapter import quiet_peft
from lorasweep.model.base import Base, fresh_classifier

_MAKE_ROOM = "Make room, then run the same command again; nothing that is finished is lost."


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter, the head and all newly initialised modules, replacing what was there.

    It is written beside the folder and then renamed, so that a kill or a power cut at any moment
    leaves the old adapter or the new one, or for an instant none, but never a mixture.

    Raises:
        StorageError: The disk is full or can't be written.
    """
    writing = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    try:
        with storing(folder, "the adapter"):
            for left_over in (writing, replaced):
                shutil.rmtree(left_over, ignore_errors=True)
            writing.mkdir(parents=True)
            # Never the embeddings: deciding "auto" asks the Hub for the base's configuration.
            model.save_pretrained(str(writing), save_embedding_layers=False)
            # PEFT's model card is an empty form; the sweep writes a real one where it exports.
            (writing / "README.md").unlink(missing_ok=True)
            # The study's word that the trial is complete is on the disk at once; so must this be.
            for path in writing.iterdir():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            _sync_names(writing)
            if folder.exists():
                folder.rename(replaced)
            writing.rename(folder)
            _sync_names(folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


@contextmanager
def storing(where: Path, what: str, advice: str = _MAKE_ROOM) -> Iterator[None]:
    """Turn what the disk refuses inside into a sentence.

    Args:
        where: The file or folder that is written.
        what: What it is, for people: ``the checkpoint``.
        advice: What to do about it.

    Raises:
        StorageError: The disk is full or can't be written.
    """
    try:
        yield
    except LoraSweepError:
        raise
    except Exception as error:
        if (reason := _refusal(error)) is None:
            raise
        what = f"{what} can't be written: {reason}"
        raise StorageError(Problem(str(where), what, advice)) from error


def _refusal(error: Exception) -> str | None:
    """What the disk said; None of an error that isn't the disk's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Where many files are copied, one error tells of all; safetensors and tokenizers raise an
    # exception of their own, or a plain one. Only the words tell that it was the disk.
    if number := re.search(r"(?:\[Errno|\(os error) (\d+)[\])]", str(error)):
        return os.strerror(int(number[1]))
    return str(error) if isinstance(error, OSError) else None


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
    with storing(path, what):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_through(writing, content)
            writing.replace(path)
        except OSError:
            with suppress(OSError):
                writing.unlink(missing_ok=True)
            raise


def write_through(path: Path, content: bytes) -> None:
    """Write a file, and return only when all of it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_names(folder: Path) -> None:
    """Have the names in a folder on the disk too, where its file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
        ModelError: The folder holds no whole adapter, or none that belongs to this base.
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
    except SafetensorError as error:
        raise _unreadable(folder, error) from error
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
        raise _unreadable(folder, error) from error
    return list(config.get("modules_to_save") or [])


def _unreadable(folder: Path, error: Exception) -> ModelError:
    what = f"holds no readable adapter: {error}"
    return ModelError(Problem(str(folder), what, "Was it saved completely?"))


def _covered(name: str, saved: list[str]) -> bool:
    """Whether PEFT saves a module when told to save ``saved``, which it matches by suffix."""
    return any(name.endswith(suffix) for suffix in saved)
