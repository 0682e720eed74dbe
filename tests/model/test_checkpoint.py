"""What is trained is saved, what is saved is loaded, and a reader never finds half of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ENCODERS
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_disk import room_for
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lorasweep.core.errors import ModelError, Problem, StorageError
from lorasweep.core.plans import AdapterPlan
from lorasweep.model.adapter import attach
from lorasweep.model.base import fresh_classifier
from lorasweep.model.checkpoint import load_finetuned, merge, save_adapter, storing
from lorasweep.model.scoring import pad_rows, pads_left, predict_logits

CPU = torch.device("cpu")
PLAN = AdapterPlan(rank=4, alpha=8.0, dropout=0.0)


def score(model, split):
    return predict_logits(model, split, pad_id=0, batch_size=3, device=CPU, precision="fp32")


def trained(base, split, steps=3):
    """A model after a few steps of plain SGD on everything that is trainable."""
    model = attach(fresh_classifier(base, seed=1), PLAN, seed=2)
    batch = pad_rows(split, range(len(split)), 0, left=pads_left(base.architecture))
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model.train()
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("architecture", ENCODERS)
def test_every_new_module_is_trained_saved_and_reloaded(
    architecture, open_tiny, encode, tmp_path, caplog
):
    base = open_tiny(architecture)
    split = encode(base)
    fresh = fresh_classifier(base, seed=1)
    new = fresh.new_modules
    before = {name: value.clone() for name, value in fresh.model.named_parameters()}
    model = trained(base, split)
    folder = tmp_path / "adapter"
    save_adapter(model, folder)

    saved = load_file(folder / "adapter_model.safetensors")
    for module in new:
        parts = [name for name in before if name.startswith(f"{module}.")]
        assert parts
        for name in parts:
            assert f"base_model.model.{name}" in saved, name
        assert any(not torch.equal(before[n], saved[f"base_model.model.{n}"]) for n in parts)

    expected = score(model, split)
    with caplog.at_level(logging.WARNING):
        # Another draw of the global generator, as in another process: nothing may depend on it.
        torch.manual_seed(12345)
        reloaded = load_finetuned(base, folder)
    assert not caplog.records
    assert not reloaded.training
    assert not any(value.requires_grad for value in reloaded.parameters())
    np.testing.assert_allclose(score(reloaded, split), expected, atol=1e-6)
    np.testing.assert_allclose(score(merge(reloaded), split), expected, atol=1e-5)
    untrained = attach(fresh_classifier(base, seed=1), PLAN, seed=2)
    assert np.abs(score(untrained, split) - expected).max() > 1e-3


def test_a_new_process_with_plain_peft_predicts_the_same(open_tiny, encode, tmp_path):
    base = open_tiny("deberta-v2")
    split = encode(base)
    model = trained(base, split)
    save_adapter(model, tmp_path / "adapter")
    script = """
import sys, torch
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=2).eval()
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
print(model(input_ids=ids).logits.tolist()[0])
"""
    ids = ",".join(str(token) for token in split.row(1))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "adapter"), ids],
        capture_output=True,
        text=True,
        check=True,
    )
    logits = json.loads(done.stdout.strip().splitlines()[-1])
    np.testing.assert_allclose(logits, score(model, split)[1], atol=1e-6)


def test_saving_replaces_the_older_adapter_and_leaves_nothing_else(open_tiny, encode, tmp_path):
    base = open_tiny()
    split = encode(base)
    folder = tmp_path / "trial" / "adapter"
    save_adapter(trained(base, split, steps=1), folder)
    better = trained(base, split, steps=3)
    save_adapter(better, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    np.testing.assert_allclose(
        score(load_finetuned(base, folder), split), score(better, split), atol=1e-6
    )


def adapted(base, rank):
    return attach(fresh_classifier(base, seed=1), AdapterPlan(rank, 8.0, 0.0), seed=2)


@pytest.mark.parametrize(("room", "cause"), [(100, OSError), (16_000, SafetensorError)])
def test_a_full_disk_leaves_the_older_adapter(room, cause, open_tiny, tmp_path):
    base, folder = open_tiny(), tmp_path / "adapter"
    save_adapter(adapted(base, 4), folder)
    before = (folder / "adapter_model.safetensors").read_bytes()
    said = "the adapter can't be written: File too large"
    with room_for(room), pytest.raises(StorageError, match=said) as raised:
        save_adapter(adapted(base, 64), folder)
    # The files are written one after another, the weights last and by another library.
    assert isinstance(raised.value.__cause__, cause)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_error_that_is_not_the_disks_leaves_nothing_behind_either(
    open_tiny, tmp_path, monkeypatch
):
    model = adapted(open_tiny(), 4)

    def stopped(self, folder, **kwargs):
        Path(folder, "adapter_config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "save_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_on_the_disk_before_it_is_in_place(open_tiny, tmp_path, monkeypatch):
    """Or a power cut leaves a trial that is complete, with files of which nothing was written."""
    synced, moved, fsync, rename = set(), [], os.fsync, Path.rename

    def noted(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def looked_at(path, target):
        moved.append((target.name, {one.stat().st_ino for one in (path, *path.iterdir())} - synced))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", looked_at)
    save_adapter(adapted(open_tiny(), 4), tmp_path / "adapter")
    assert moved == [("adapter", set())]
    assert tmp_path.stat().st_ino in synced


def copy_twice(path):
    """As a folder is copied: many files can be refused, and all are told in one error."""
    folder = path.with_name("many")
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(bytes(90))
    with room_for(50):
        shutil.copytree(folder, path)


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(200)),
    "shutil": copy_twice,
    "safetensors": lambda path: save_file({"a": torch.zeros(50)}, path),
    "tokenizers": lambda path: Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_meets_the_full_disk_it_is_said_in_a_sentence(writer, tmp_path):
    path = tmp_path / "file"
    with (
        room_for(100),
        pytest.raises(StorageError) as raised,
        storing(path, "the thing", "Make room."),
    ):
        WRITERS[writer](path)
    assert str(raised.value) == f"{path}: the thing can't be written: File too large. Make room."


@pytest.mark.parametrize(
    "error", [ValueError("no"), ModelError(Problem("x", "not read (os error 2)"))], ids=repr
)
def test_what_the_disk_has_not_said_is_left_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as raised, storing(tmp_path, "the thing"):
        raise error
    assert raised.value is error


def test_an_adapter_without_a_new_module_is_refused(open_tiny, encode, tmp_path):
    base = open_tiny("deberta-v2")
    save_adapter(trained(base, encode(base), steps=1), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["modules_to_save"] = ["classifier", "score"]  # what PEFT alone would have saved
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"weights for pooler.*random"):
        load_finetuned(base, tmp_path / "adapter")


def test_no_adapter_or_one_of_other_labels_is_refused(open_tiny, encode, tmp_path):
    base = open_tiny()
    with pytest.raises(ModelError, match="holds no readable adapter"):
        load_finetuned(base, tmp_path / "nothing")
    save_adapter(trained(base, encode(base), steps=1), tmp_path / "adapter")
    three = open_tiny("bert", labels=("no", "maybe", "yes"))
    with pytest.raises(ModelError, match="does not fit"):
        load_finetuned(three, tmp_path / "adapter")


DAMAGES = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "nothing but zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_of_which_half_was_written_is_refused(damage, open_tiny, tmp_path):
    base, folder = open_tiny(), tmp_path / "adapter"
    save_adapter(adapted(base, 4), folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(DAMAGES[damage](weights.read_bytes()))
    with pytest.raises(ModelError, match=r"holds no readable adapter.*saved completely\?"):
        load_finetuned(base, folder)
