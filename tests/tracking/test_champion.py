"""The champion can be loaded and asked by name, offline, without lorasweep."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors import SafetensorError
from small_disk import room_for
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lorasweep.core.errors import StorageError
from lorasweep.tracking.champion import Champion, log_champion
from lorasweep.tracking.mlflow_tracker import MlflowTracker

LABELS = ["negative", "très bien", "positive"]
TEXTS = ["good film", "the bad film was bad bad bad", "bad", "film " * 90, ""]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "was"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def run_id(tracker: MlflowTracker) -> str:
    return tracker.start_trial(tracker.open_sweep("reviews", {}), 3, {"rank": 8}, {})


@pytest.fixture
def log(tracker: MlflowTracker, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    def call(run_id: str, **changes: Any) -> Champion:
        arguments = {
            "model_name": "reviews",
            "model": model,
            "tokenizer": tokenizer,
            "example_texts": ["good film", "bad film"],
            "label_names": LABELS,
            "metadata": {"trial": 3, "max_length": 12},
        }
        return log_champion(tracker, run_id, **(arguments | changes))

    return call


@pytest.fixture
def global_uri(tracker: MlflowTracker) -> Iterator[None]:
    """What a user does who loads the model by name."""
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    yield
    mlflow.set_tracking_uri(before)
    mlflow.set_tracking_uri(None)
    if environment is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def expected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Each text by itself, cut at 12 tokens."""
    rows = []
    for text in TEXTS:
        encoded = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**encoded).logits.softmax(-1)[0].double().numpy())
    return np.stack(rows)


@pytest.mark.usefixtures("global_uri")
def test_it_answers_as_the_model_does(
    log: Any, run_id: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    champion = log(run_id)
    assert champion.uri == "models:/reviews@champion"
    loaded = mlflow.pyfunc.load_model(champion.uri)
    answer = loaded.predict(TEXTS)
    want = expected(model, tokenizer)
    assert list(answer.columns) == ["label", "score", *(f"probability_{n}" for n in LABELS)]
    np.testing.assert_allclose(answer.iloc[:, 2:].to_numpy(dtype=float), want, atol=1e-5)
    np.testing.assert_allclose(answer["score"], want.max(axis=1), atol=1e-5)
    assert answer["label"].tolist() == [LABELS[i] for i in want.argmax(axis=1)]
    # Far more texts than a batch come back in their own order.
    many = loaded.predict(TEXTS * 20)
    np.testing.assert_allclose(
        many.iloc[:, 2:].to_numpy(dtype=float), np.tile(want, (20, 1)), atol=1e-5
    )


@pytest.mark.usefixtures("global_uri")
def test_signature_example_and_metadata(log: Any, run_id: str) -> None:
    loaded = mlflow.pyfunc.load_model(log(run_id).uri)
    assert [str(kind) for kind in loaded.metadata.signature.inputs.input_types()] == [
        "DataType.string"
    ]
    assert loaded.metadata.signature.outputs.input_names()[:2] == ["label", "score"]
    assert list(loaded.input_example) == ["good film", "bad film"]
    assert loaded.metadata.metadata == {"trial": 3, "max_length": 12, "label_names": LABELS}


def test_the_same_winner_is_registered_once(log: Any, run_id: str, client: MlflowClient) -> None:
    first, again = log(run_id), log(run_id)
    assert (first.created, again.created) == (True, False)
    assert (again.version, again.model_id) == (first.version, first.model_id)
    assert len(client.search_model_versions("name = 'reviews'")) == 1


FULL = r"the champion can't be written: File too large\. Make room there or set TMPDIR"


def test_no_room_for_the_weights_is_said_and_the_next_command_registers(
    log: Any, run_id: str
) -> None:
    with room_for(4000), pytest.raises(StorageError, match=FULL) as raised:
        log(run_id)
    assert isinstance(raised.value.__cause__, SafetensorError)
    assert log(run_id).created


def test_no_temporary_folder_is_not_the_stores_fault(
    log: Any, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(StorageError, match=r"a temporary folder: .* or set TMPDIR"):
            log(run_id)
    assert log(run_id).created


def test_no_room_for_what_mlflow_makes_of_them_is_said_too(
    log: Any, run_id: str, tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mlflow.pyfunc.save_model

    def full(**arguments: Any) -> None:
        with room_for(4000):
            save(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.pyfunc, "save_model", full)
        with pytest.raises(StorageError, match=FULL):
            log(run_id)
    (left,) = tracker.client.search_logged_models([tracker.experiment_id])
    assert str(left.status) == "FAILED"
    assert log(run_id).created


def champion_version(client: MlflowClient) -> str:
    return str(client.get_model_version_by_alias("reviews", "champion").version)


def test_another_winner_takes_the_alias(
    log: Any, run_id: str, tracker: MlflowTracker, client: MlflowClient
) -> None:
    first = log(run_id)
    other = tracker.start_trial(tracker.open_sweep("reviews", {}), 4, {}, {})
    second = log(other)
    assert second.version != first.version
    assert champion_version(client) == second.version
    assert log(run_id).version == first.version
    assert champion_version(client) == first.version


def test_the_run_knows_its_model(log: Any, run_id: str, client: MlflowClient) -> None:
    champion = log(run_id)
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [champion.model_id]
    logged = client.get_logged_model(champion.model_id)
    assert (str(logged.status), logged.source_run_id) == ("READY", run_id)
    assert logged.params == {"rank": "8"}
    version = client.get_model_version("reviews", champion.version)
    assert version.run_id == run_id


def test_global_state_and_the_callers_model_are_left_alone(
    log: Any,
    run_id: str,
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names, uri, environment = model.config.id2label, mlflow.get_tracking_uri(), dict(os.environ)
    log(run_id)
    assert model.config.id2label == names != dict(enumerate(LABELS))
    assert (mlflow.get_tracking_uri(), dict(os.environ)) == (uri, environment)
    assert mlflow.active_run() is None
    assert list(folder.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_it_is_served_where_lorasweep_is_not_installed(
    log: Any, run_id: str, tracker: MlflowTracker, tmp_path: Path
) -> None:
    champion = log(run_id)
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'lorasweep':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "frame = mlflow.pyfunc.load_model(sys.argv[2]).predict(['good film'])\n"
        "print(len(frame), frame['label'][0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tracker.uri, champion.uri],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, _, label = done.stdout.strip().partition(" ")
    assert count == "1"
    assert label in LABELS
