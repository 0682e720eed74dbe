"""What is exported is what was trained, for whoever loads it with plain transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from small_disk import room_for
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorasweep.core.errors import InputError, LoraSweepError, ModelError, StorageError
from lorasweep.deploy import export as module
from lorasweep.deploy.export import export
from lorasweep.model.checkpoint import load_finetuned

ARCHITECTURES = ["bert", "distilbert", "roberta", "deberta-v2", "modernbert", "xlnet"]


def _logits(model, tokenizer, texts, **more):
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt", **more)
    with torch.inference_mode():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_predicts_the_same(
    architecture, finetuned, tmp_path, texts, capfd, caplog
):
    base, adapter = finetuned(architecture)
    folder = export(base, adapter, tmp_path / "out", {})
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    said = "".join(capfd.readouterr()) + caplog.text
    assert "newly initialized" not in said
    assert "MISSING" not in said
    assert "UNEXPECTED" not in said
    original = load_finetuned(base, adapter)
    expected = [
        _logits(original, base.tokenizer, [text], max_length=24, return_token_type_ids=False)[0]
        for text in texts
    ]
    np.testing.assert_allclose(_logits(model.eval(), tokenizer, texts), expected, atol=1e-4)
    # The adapter has something to say, or the comparison would prove nothing.
    assert np.ptp(np.asarray(expected)[:, 0]) > 0.01


def test_a_stranger_in_another_process_loads_it_without_a_word(exported):
    folder = exported("bert", ("negative", "neutral", "positive"))
    program = """
        import sys
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
        AutoTokenizer.from_pretrained(sys.argv[1])
        assert not hasattr(model, "peft_config")
        print(model.config.id2label)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "{0: 'negative', 1: 'neutral', 2: 'positive'}"
    for word in ("initialized", "MISSING", "Warning", "warning"):
        assert word not in ran.stderr


def test_label_names_and_token_limit_are_in_the_files(exported):
    folder = exported("bert", ("no", "yes"))
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["label2id"] == {"no": 0, "yes": 1}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 24
    assert not list(folder.rglob("*.bin"))


def test_the_adapter_lies_beside_it_and_gives_the_same_model(finetuned, tmp_path, texts):
    base, adapter = finetuned("bert")
    folder = export(base, adapter, tmp_path / "out", {})
    one = _logits(load_finetuned(base, adapter), base.tokenizer, texts)
    other = _logits(load_finetuned(base, folder / "adapter"), base.tokenizer, texts)
    np.testing.assert_array_equal(one, other)
    stored = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == base.name


def test_the_manifest_says_what_it_is_and_vouches_for_every_file(finetuned, tmp_path):
    base, adapter = finetuned("bert")
    about = {
        "sweep": "tiny",
        "parameters": {"rank": 4, "targets": ("query", "value")},
        "validation_metrics": {"f1": 0.9, "auc": float("nan")},
    }
    folder = export(base, adapter, tmp_path / "out", about)
    manifest = json.loads((folder / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["format"] == "lorasweep-export"
    assert manifest["created"].endswith("+00:00")
    assert manifest["sweep"] == "tiny"
    assert manifest["parameters"] == {"rank": 4, "targets": ["query", "value"]}
    assert manifest["validation_metrics"] == {"f1": 0.9, "auc": None}
    assert manifest["labels"] == ["no", "yes"]
    assert manifest["base"]["sha256"] == base.digest
    assert {"lorasweep", "torch", "transformers", "peft"} <= set(manifest["versions"])
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } - {"manifest.json"}
    assert set(manifest["files"]) == there
    assert {"model.safetensors", "config.json", "adapter/adapter_model.safetensors"} <= there
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_an_earlier_export_is_replaced(finetuned, tmp_path):
    base, adapter = finetuned("bert")
    folder = export(base, adapter, tmp_path / "out", {"trial": 1})
    assert export(base, adapter, tmp_path / "out", {"trial": 2}) == folder
    assert json.loads((folder / "manifest.json").read_text())["trial"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-bert", "out"]


def test_an_empty_folder_is_filled_and_missing_ones_are_made(finetuned, tmp_path):
    base, adapter = finetuned("bert")
    (tmp_path / "empty").mkdir()
    assert (export(base, adapter, tmp_path / "empty", {}) / "model.safetensors").is_file()
    assert (export(base, adapter, tmp_path / "a" / "b", {}) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "what", ["thesis", "a file in an export", "an edited export", "file", "here", "foreign"]
)
def test_nothing_of_the_users_is_overwritten(what, finetuned, tmp_path, monkeypatch):
    base, adapter = finetuned("bert")
    target = tmp_path / "out"
    if what == "file":
        target.write_text("mine")
    elif what == "a file in an export":
        export(base, adapter, target, {})
        (target / "notes.txt").write_text("mine")
    elif what == "an edited export":
        export(base, adapter, target, {})
        (target / "config.json").write_text("mine")
    else:
        target.mkdir()
        if what == "thesis":
            (target / "thesis.tex").write_text("mine")
        if what == "foreign":
            (target / "manifest.json").write_text('{"format": "web-app"}')
        if what == "here":
            monkeypatch.chdir(target)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError) as raised:
        export(base, adapter, target, {})
    assert str(target) in str(raised.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_model_that_came_out_wrong_is_not_handed_over(finetuned, tmp_path, monkeypatch):
    base, adapter = finetuned("bert")
    merge = module.merge

    def badly(model):
        merged = merge(model)
        with torch.no_grad():
            merged.classifier.bias[0] += 0.1
        return merged

    monkeypatch.setattr(module, "merge", badly)
    with pytest.raises(LoraSweepError, match="differ") as raised:
        export(base, adapter, tmp_path / "out", {})
    assert raised.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter-bert"]


def test_a_model_without_its_head_is_not_handed_over(finetuned, tmp_path, monkeypatch):
    base, adapter = finetuned("bert")
    monkeypatch.setattr(module, "merge", lambda model: model.merge_and_unload().bert)
    with pytest.raises(LoraSweepError, match=r"not whole.*classifier"):
        export(base, adapter, tmp_path / "out", {})


def test_a_failure_on_disk_leaves_the_earlier_export(finetuned, tmp_path, monkeypatch):
    base, adapter = finetuned("bert")
    folder = export(base, adapter, tmp_path / "out", {"trial": 1})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copytree", full)
    with pytest.raises(StorageError, match="No space left"):
        export(base, adapter, folder, {"trial": 2})
    assert json.loads((folder / "manifest.json").read_text())["trial"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-bert", "out"]


def test_a_full_disk_is_said_by_whoever_writes_the_weights(finetuned, tmp_path):
    base, adapter = finetuned("bert")
    folder = export(base, adapter, tmp_path / "out", {"trial": 1})
    said = "the model can't be written: File too large"
    with room_for(16_000), pytest.raises(StorageError, match=said) as raised:
        export(base, adapter, folder, {"trial": 2})
    assert isinstance(raised.value.__cause__, SafetensorError)
    assert json.loads((folder / "manifest.json").read_text())["trial"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-bert", "out"]


def test_a_swap_that_fails_half_way_puts_the_earlier_export_back(finetuned, tmp_path, monkeypatch):
    base, adapter = finetuned("bert")
    folder = export(base, adapter, tmp_path / "out", {"trial": 1})
    rename = Path.rename

    def failing(path, target):
        if path.name.endswith(".writing"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        export(base, adapter, folder, {"trial": 2})
    assert json.loads((folder / "manifest.json").read_text())["trial"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-bert", "out"]


def test_a_missing_adapter_is_said(finetuned, tmp_path):
    base, _ = finetuned("bert")
    with pytest.raises(ModelError, match="holds no readable adapter"):
        export(base, tmp_path / "nowhere", tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_the_manifest_keeps_its_own_words(finetuned, tmp_path):
    base, adapter = finetuned("bert")
    with pytest.raises(ValueError, match="files"):
        export(base, adapter, tmp_path / "out", {"files": []})
    assert not Path(tmp_path / "out").exists()
