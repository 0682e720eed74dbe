"""What every test shares: quiet, offline, single-threaded libraries, and the real data's folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch, transformers or mlflow are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    MPLBACKEND="agg",
)
# Most tests hold what a CPU does, also where there is a GPU; those that may run on one are named
# in docs/decisions/0010-nobody-waits-for-the-accelerator.md.
if "LORASWEEP_TEST_DEVICE" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets. Unset: skip, but never in CI."""
    folder = os.environ.get("LORASWEEP_DATA")
    if folder:
        path = Path(folder).resolve()
        if path.is_dir():
            return path
        pytest.fail(f"LORASWEEP_DATA names {path}, which is not a folder")
    if os.environ.get("CI"):
        pytest.fail("CI must export LORASWEEP_DATA")
    pytest.skip("LORASWEEP_DATA is not set")


# --------------------------------------------------------------------------------------
# tiny_base_folder(architecture: str = "bert", *, layers: int = 2, seed: int = 0) -> Path
#
# A session fixture that returns a factory. The factory makes (once per arguments) a local folder
# with config.json, random model.safetensors without a classifier, and a fast lower-case
# WordPiece tokenizer that splits unknown words into letters, so any English text will do:
# what a user's local base looks like, in 32 hidden units. Architectures: the keys of
# _TINY_CONFIGS. Never write into the folder; copy it first.
# Use: open_base(ModelSpec(name=str(tiny_base_folder("bert")), max_length=32), ("no", "yes"))
# --------------------------------------------------------------------------------------
_BERT_LIKE = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.15,
    "max_position_embeddings": 128,
}
_TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "albert": {**_BERT_LIKE, "embedding_size": 16},
    "bert": {**_BERT_LIKE},
    "camembert": {**_BERT_LIKE},
    "deberta": {**_BERT_LIKE},
    "deberta-v2": {
        **_BERT_LIKE,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "max_relative_positions": -1,
    },
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
    },
    "electra": {**_BERT_LIKE, "embedding_size": 16},
    "modernbert": {
        **_BERT_LIKE,
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
        "reference_compile": False,
    },
    "mpnet": {**_BERT_LIKE},
    "roberta": {**_BERT_LIKE},
    "xlm-roberta": {**_BERT_LIKE},
    "xlnet": {"d_model": 32, "n_head": 2, "d_inner": 48, "initializer_range": 0.15},
}
_LAYERS_CALLED = {"distilbert": "n_layers", "xlnet": "n_layer"}
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _tiny_vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words = "a the this film movie was is not very good bad great dull fine awful and but i it"
    tokens = [*_SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    return {token: at for at, token in enumerate(dict.fromkeys([*tokens, *words.split()]))}


def _save_tiny_tokenizer(architecture: str, folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordPiece(_tiny_vocabulary(), unk_token="[UNK]"))
    raw.normalizer = BertNormalizer(lowercase=True)
    raw.pre_tokenizer = BertPreTokenizer()
    at_end = architecture == "xlnet"
    raw.post_processor = TemplateProcessing(
        single="$A [SEP] [CLS]" if at_end else "[CLS] $A [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side="left" if at_end else "right",
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make tiny random bases as local folders; see above."""
    made: dict[tuple[str, int, int], Path] = {}

    def make(architecture: str = "bert", *, layers: int = 2, seed: int = 0) -> Path:
        key = (architecture, layers, seed)
        if key not in made:
            import torch
            from transformers import CONFIG_MAPPING, AutoModel

            folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
            config = CONFIG_MAPPING[architecture](
                vocab_size=len(_tiny_vocabulary()),
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
                cls_token_id=2,
                sep_token_id=3,
                **{_LAYERS_CALLED.get(architecture, "num_hidden_layers"): layers},
                **_TINY_CONFIGS[architecture],
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                AutoModel.from_config(config).save_pretrained(folder)
            _save_tiny_tokenizer(architecture, folder)
            made[key] = folder
        return made[key]

    return make


# --------------------------------------------------------------------------------------
# small_sweep(tmp_path): a whole sweep that takes seconds
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (120 rows) and test.csv (60 rows), learnable from one word a text."""
    import csv
    import itertools

    folder = tmp_path_factory.mktemp("reviews")
    good, bad = ("great", "fine", "very good"), ("dull", "awful", "bad")
    nouns = ("the film", "this movie", "it", "the movie", "this film", "a film")
    fillers = [f"number {n}" for n in range(5)]
    rows = [
        (f"{noun} was {word} , {filler}", label)
        for label, words in ((0, bad), (1, good))
        for noun, word, filler in itertools.product(nouns, words, fillers)
    ]
    # Every third row is held out, so that train and test hold the same words in other company.
    parts = {"train": [r for at, r in enumerate(rows) if at % 3], "test": rows[::3]}
    for name, chosen in parts.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *chosen])
    return folder


@pytest.fixture
def small_sweep(
    tmp_path: Path,
    tiny_base_folder: Callable[..., Path],
    small_reviews: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The path of a spec of three quick trials; the current folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    spec = tmp_path / "small.yaml"
    spec.write_text(
        f"""\
name: small
seed: 7
model: {{name: "{tiny_base_folder("bert")}", max_length: 32}}
data:
  source: {{kind: files, train: "{small_reviews}/train.csv", test: "{small_reviews}/test.csv"}}
  labels: [negative, positive]
  split: {{validation: 0.25, strategy: stratified}}
training: {{batch_size: 8, precision: fp32, log_every: 5}}
search:
  trials: 3
  sampler: {{kind: tpe, startup_trials: 2}}
  pruner: {{kind: none}}
  space:
    learning_rate: {{low: 1.0e-3, high: 3.0e-2, log: true}}
    epochs: {{choices: [1, 2]}}
    rank: {{choices: [2, 4]}}
    alpha: {{times_rank: [1, 2]}}
baselines: [untrained, majority]
""",
        encoding="utf-8",
    )
    return spec
