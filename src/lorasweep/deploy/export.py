"""The winner as a folder that plain transformers loads, checked before it is handed over.

::

    DIR/
      config.json, model.safetensors     the base with the adapter merged in, label names
      tokenizer.json, …                  cuts texts where training cut them
      adapter/                           the adapter alone, in PEFT's format
      manifest.json                      what it is, made of what and by what; SHA-256 of each file

The adapter lies in a folder of its own: beside config.json transformers would find it and
add it to weights that contain it already.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorasweep.core.corpora import TextSplit
from lorasweep.core.errors import InputError, LoraSweepError, Problem
from lorasweep.data.tokens import encode
from lorasweep.model.base import Base, quiet_transformers
from lorasweep.model.checkpoint import load_finetuned, merge, storing
from lorasweep.model.scoring import predict_logits

FORMAT = "lorasweep-export"
MANIFEST = "manifest.json"
_PACKAGES = ("lorasweep", "torch", "transformers", "peft", "tokenizers", "safetensors")
# Texts of different lengths, one longer than most limits; what they say doesn't matter.
_PROBES = (
    "Good.",
    "It was not bad at all, though the ending drags.",
    "I have no opinion. " * 3,
    "The first half is slow, the second half is worse, and yet I would see it again. " * 40,
)
# Merging rounds B·A once where the adapter rounds twice; a wrong merge is off by far more.
_TOLERANCE = 1e-3


def export(base: Base, adapter: Path, to: Path, manifest: Mapping[str, Any]) -> Path:
    """Merge an adapter into its base and write a folder to deploy.

    It is written beside ``to``, loaded again by plain transformers, compared with the
    adapter's own predictions, and only then put in place.

    Args:
        base: The base that the adapter was trained on.
        adapter: A folder that :func:`lorasweep.model.checkpoint.save_adapter` wrote.
        to: The folder to make. An earlier export there is replaced.
        manifest: What is to be known of the model beyond what is known here (base, labels,
            versions, files): sweep, trial, parameters, metrics, …; plain data.

    Returns:
        The folder, absolute.

    Raises:
        InputError: ``to`` is a file, the current folder, or holds other things.
        ModelError: The adapter doesn't belong to the base.
        StorageError: The disk can't be written.
        LoraSweepError: The written model doesn't predict what the trained one does.
    """
    target = to.expanduser().resolve()
    _check_target(target)
    expected = _logits_of_finetuned(base, adapter)
    writing = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        with storing(target, "the model", "Make room, or choose a folder on another disk."):
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            _write_model(base, adapter, writing)
            _verify(writing, expected)
            _write_manifest(base, manifest, writing)
            _put_in_place(writing, target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return target


def _check_target(target: Path) -> None:
    where = str(target)
    if target.exists() and not target.is_dir():
        raise InputError(Problem(where, "is a file, not a folder", "Name a new folder."))
    if target == Path.cwd():
        raise InputError(Problem(where, "is the current folder", "Name a new one inside it."))
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        earlier = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        ours = set(earlier["files"]) if earlier["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    there = {str(p.relative_to(target).as_posix()) for p in target.rglob("*") if not p.is_dir()}
    strange = sorted(there - ours - {MANIFEST}) if ours else sorted(there)
    strange += [
        f"{name} (changed since)"
        for name in sorted(there & ours)
        if _digest(target / name) != earlier["files"][name].get("sha256")
    ]
    if strange or not ours:
        named = ", ".join(strange[:3]) or "other folders"
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        what = f"already holds what no export wrote: {named}{more}"
        raise InputError(Problem(where, what, "Name a new folder, or empty this one."))


def _probes() -> TextSplit:
    ids = tuple(map(str, range(len(_PROBES))))
    return TextSplit(name="probes", texts=_PROBES, labels=(0,) * len(_PROBES), ids=ids)


def _logits_of_finetuned(base: Base, adapter: Path) -> np.ndarray[Any, Any]:
    """What the model says as it was trained: base and adapter apart; ``(probes, labels)``."""
    return predict_logits(
        load_finetuned(base, adapter),
        encode(_probes(), base.tokenizer, base.max_length),
        pad_id=base.pad_id,
        batch_size=len(_PROBES),
        device=torch.device("cpu"),
    )


def _write_model(base: Base, adapter: Path, folder: Path) -> None:
    model = merge(load_finetuned(base, adapter))
    # The folder that the base lay in means nothing where the export goes.
    model.config._name_or_path = base.name
    with quiet_transformers():
        model.save_pretrained(folder)
        _deployable_tokenizer(base).save_pretrained(folder)
    shutil.copytree(adapter, folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    stored = json.loads(config.read_text(encoding="utf-8"))
    stored |= {"base_model_name_or_path": base.name, "revision": base.revision}
    config.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _deployable_tokenizer(base: Base) -> Any:
    """A copy that, called plainly, makes the inputs that the model was trained on."""
    tokenizer: Any = copy.deepcopy(base.tokenizer)
    tokenizer.model_max_length = base.max_length
    # Trained without segment ids: where a tokenizer makes other ones than zeros (XLNet's do),
    # they would change the predictions.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    # What the last call left behind is no property of the tokenizer.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _verify(folder: Path, expected: np.ndarray[Any, Any]) -> None:
    """Load the folder as a stranger would and compare.

    Raises:
        LoraSweepError: When anything differs, or transformers warns of anything.
    """
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    amiss = {key: sorted(map(str, found)) for key, found in loading.items() if found}
    if amiss:
        raise LoraSweepError(f"The written model is not whole: transformers reports {amiss}.")
    model.eval()
    inputs = tokenizer(list(_PROBES), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits.float().numpy()
    gap = float(np.abs(logits - expected).max())
    # Written so that NaN, which compares as false, is caught as well.
    if not gap <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise LoraSweepError(
            f"The written model's logits differ from the trained one's by {gap:.2g}; "
            "nothing was exported."
        )


def _write_manifest(base: Base, about: Mapping[str, Any], folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    head = {
        "format": FORMAT,
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    tail = {
        "task": "text-classification",
        "labels": list(base.label_names),
        "max_length": base.max_length,
        "base": {
            "name": base.name,
            "revision": base.revision,
            "architecture": base.architecture,
            "sha256": base.digest,
        },
        "versions": {package: version(package) for package in _PACKAGES},
        "files": files,
    }
    if taken := {*head, *tail} & set(about):
        raise ValueError(f"the manifest says {', '.join(sorted(taken))} by itself")
    content = {**head, **_plain(dict(about)), **tail}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value as JSON has it, where a number that isn't finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put_in_place(writing: Path, target: Path) -> None:
    """Swap by renaming, so that the target is the old export or the new one, never a mixture."""
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    if target.exists():
        target.rename(replaced)
    try:
        writing.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
