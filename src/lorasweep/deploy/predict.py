"""An exported model at work: texts in, labels with their probabilities out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorasweep.core.corpora import TextSplit
from lorasweep.core.errors import DataError, InputError, ModelError, Problem
from lorasweep.data.tokens import encode
from lorasweep.model.base import quiet_transformers
from lorasweep.model.encoders import position_limit
from lorasweep.model.files import TOKENIZERS
from lorasweep.model.precision import pick_device
from lorasweep.model.scoring import predict_logits

# Tokenizers without a limit of their own carry a huge number instead.
_NO_LIMIT = 1_000_000
_DEFAULT_LENGTH = 512
_EXPORT = "Name a folder that `lorasweep export` wrote."


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one text.

    Attributes:
        label: Name of the most probable label.
        confidence: Its probability.
        probabilities: Of every label by name, in the model's order; they sum to 1.
    """

    label: str
    confidence: float
    probabilities: dict[str, float]


class SentimentAnalyzer:
    """Classifies texts with an exported model, or any transformers text classifier in a folder.

    The name is the task's most common one; the labels may be anything, two or more.

    Args:
        folder: Holds config.json, model.safetensors and a tokenizer. Nothing is downloaded
            and no code of the folder is run.
        device: ``auto``, ``cpu`` or a CUDA device such as ``cuda:0``.

    Raises:
        ModelError: The folder isn't there or holds no text classifier.

    Example:
        >>> analyzer = SentimentAnalyzer("my_export")             # doctest: +SKIP
        >>> analyzer.predict("A warm and funny film.").label      # doctest: +SKIP
        'positive'
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        path = Path(folder).expanduser()
        _check_folder(path)
        with quiet_transformers():
            config = _load_config(path)
            self._model = _load_model(path)
            self._tokenizer = _load_tokenizer(path)
        self._device = pick_device(device)
        self._model.to(self._device).eval()
        self.labels: tuple[str, ...] = tuple(
            str(config.id2label[index]) for index in range(config.num_labels)
        )
        own = int(self._tokenizer.model_max_length)
        limits = [own if own < _NO_LIMIT else None, position_limit(config)]
        self.max_length = min((n for n in limits if n is not None), default=_DEFAULT_LENGTH)

    def predict(self, text: str) -> Prediction:
        """Classify one text; what is longer than :attr:`max_length` tokens loses its end.

        Raises:
            DataError: It is empty, or not text.
        """
        return self.batch_predict([text])[0]

    def batch_predict(self, texts: Sequence[str], batch_size: int = 32) -> list[Prediction]:
        """Classify many texts, ``batch_size`` in one pass through the model.

        Texts of like length share a pass, each padded to the longest of its pass only; a
        prediction doesn't depend on its neighbours but for rounding.

        Args:
            texts: The texts; may be none at all.
            batch_size: Texts a pass.

        Returns:
            One prediction a text, in the order of the texts.

        Raises:
            DataError: With every text that is empty or not text.
        """
        _check_texts(texts)
        if batch_size < 1:
            raise InputError(Problem("batch_size", f"must be ≥ 1, got {batch_size}"))
        if not texts:
            return []
        rows = TextSplit(
            name="texts",
            texts=tuple(texts),
            labels=(0,) * len(texts),
            ids=tuple(f"texts:{row}" for row in range(1, len(texts) + 1)),
        )
        logits = predict_logits(
            self._model,
            encode(rows, self._tokenizer, self.max_length),
            pad_id=int(self._tokenizer.pad_token_id),
            batch_size=batch_size,
            device=self._device,
        )
        probabilities = torch.from_numpy(logits).double().softmax(dim=1)
        return [self._prediction(row) for row in probabilities.tolist()]

    def _prediction(self, probabilities: list[float]) -> Prediction:
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        named = dict(zip(self.labels, probabilities, strict=True))
        return Prediction(self.labels[best], probabilities[best], named)


def _check_texts(texts: Sequence[object]) -> None:
    if isinstance(texts, str):
        advice = "Write [text], or use predict(text)."
        raise DataError(Problem("texts", "must be a list of texts, got one text", advice))
    problems = []
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            kind = type(text).__name__
            problems.append(Problem(f"text {row}", f"must be text, got {kind} {text!r:.40}"))
        elif not text.strip():
            advice = "A model would answer even so, and the answer would mean nothing."
            problems.append(Problem(f"text {row}", "is empty", advice))
        elif any("\ud800" <= character <= "\udfff" for character in text):
            # What Python makes of bytes on a command line that aren't UTF-8, and of JSON's \ud800.
            problems.append(Problem(f"text {row}", f"is not Unicode text: {text!r:.40}"))
    if problems:
        raise DataError(problems)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ModelError(Problem(str(folder), what, _EXPORT))
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        what = "holds an adapter alone, without its base"
        raise ModelError(Problem(str(folder), what, "`lorasweep export` merges the two."))
    raise ModelError(Problem(str(folder), "holds no model: config.json is missing", _EXPORT))


def _load_config(folder: Path) -> PreTrainedConfig:
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in raw and not raw.get("model_type"):
            raise ValueError("it needs code of its own, which is never run")
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"its config.json can't be used: {_first_line(error)}"
        raise ModelError(Problem(str(folder), what, _EXPORT)) from error
    several = config.problem_type == "multi_label_classification"
    if several or config.num_labels < 2:
        kind = "gives several labels to one text" if several else "has fewer than two labels"
        what = f"the model {kind}; this is for one of two or more labels"
        raise ModelError(Problem(str(folder), what))
    return config


def _load_model(folder: Path) -> PreTrainedModel:
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a broken file raises whatever its parser raises
        what = f"its weights can't be loaded: {_first_line(error)}"
        raise ModelError(Problem(str(folder), what, _EXPORT)) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        what = f"it is no trained classifier: weights are missing for {', '.join(missing[:4])}"
        raise ModelError(Problem(str(folder), what, _EXPORT))
    classifier: PreTrainedModel = model
    return classifier


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Without a vocabulary transformers makes an empty tokenizer, to which every word is unknown:
    # the model would answer everything alike.
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(Problem(str(folder), "holds no tokenizer", _EXPORT))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as above
        what = f"its tokenizer can't be loaded: {_first_line(error)}"
        raise ModelError(Problem(str(folder), what, _EXPORT)) from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        lacks = "a padding token" if tokenizer.is_fast else "tokenizer.json"
        raise ModelError(Problem(str(folder), f"its tokenizer has no {lacks}", _EXPORT))
    return tokenizer


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
