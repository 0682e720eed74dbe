"""The analyzer answers as the model does, batches for real, and says what is wrong."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lorasweep import SentimentAnalyzer
from lorasweep.core.errors import DataError, InputError, ModelError


@pytest.mark.parametrize(
    ("architecture", "labels"),
    [
        ("bert", ("negative", "positive")),
        ("xlnet", ("negative", "neutral", "positive")),
        ("modernbert", ("a", "b", "c", "d", "e")),
    ],
)
def test_it_says_what_plain_transformers_says(architecture, labels, exported, texts):
    folder = exported(architecture, labels)
    analyzer = SentimentAnalyzer(str(folder), device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).logits.softmax(dim=1)[0].tolist()
        prediction = analyzer.predict(text)
        assert list(prediction.probabilities) == list(labels)
        np.testing.assert_allclose(list(prediction.probabilities.values()), expected, atol=1e-5)
        assert sum(prediction.probabilities.values()) == pytest.approx(1.0, abs=1e-9)
        assert prediction.label == labels[int(np.argmax(expected))]
        assert prediction.confidence == prediction.probabilities[prediction.label]


def test_a_batch_is_a_batch_and_keeps_the_order(exported, texts):
    analyzer = SentimentAnalyzer(exported("bert", ("x", "y", "z")), device="cpu")
    many = [f"{text} {n}" for n in range(8) for text in texts]
    random.Random(0).shuffle(many)
    shapes = []
    analyzer._model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    together = analyzer.batch_predict(many, batch_size=16)
    assert [rows for rows, _ in shapes] == [16, 16, 8]
    # Sorted by length: short texts are not padded to the longest of all.
    assert len({tokens for _, tokens in shapes}) > 1
    shapes.clear()
    alone = [analyzer.predict(text) for text in many]
    assert len(shapes) == len(many)
    for one, other in zip(together, alone, strict=True):
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_long_texts_are_cut_where_training_cut_them(exported):
    analyzer = SentimentAnalyzer(exported("bert"), device="cpu")
    assert analyzer.max_length == 24
    start = "the film was " + "very " * 30
    assert analyzer.predict(start + "good").probabilities == pytest.approx(
        analyzer.predict(start + "bad and awful").probabilities
    )


def test_no_texts_no_predictions(exported):
    assert SentimentAnalyzer(exported("bert")).batch_predict([]) == []


def test_texts_that_cant_be_classified_are_all_named(exported):
    analyzer = SentimentAnalyzer(exported("bert"))
    with pytest.raises(DataError) as raised:
        analyzer.batch_predict(["fine", "", " \n", 7, None, "half \ud800 a pair", "good"])
    places = [problem.where for problem in raised.value.problems]
    assert places == ["text 2", "text 3", "text 4", "text 5", "text 6"]
    assert "is empty" in str(raised.value)
    assert "int 7" in str(raised.value)
    assert "not Unicode text" in str(raised.value)
    assert raised.value.exit_code == 2
    with pytest.raises(DataError, match="list of texts"):
        analyzer.batch_predict("one text")
    with pytest.raises(InputError, match="batch_size"):
        analyzer.batch_predict(["fine"], batch_size=0)


def test_a_classifier_that_lorasweep_never_saw_works_too(tiny_base_folder, tmp_path, texts):
    folder = tmp_path / "plain"
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_base_folder("distilbert"), num_labels=4
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base_folder("distilbert")).save_pretrained(folder)
    analyzer = SentimentAnalyzer(folder)
    assert analyzer.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert analyzer.max_length == 128
    assert len(analyzer.batch_predict(list(texts))) == len(texts)


def _drop(name):
    return lambda folder: (folder / name).unlink()


def _rewrite(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def _garbage(name):
    return lambda folder: (folder / name).write_bytes(b"\x00garbage")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_drop("config.json"), "config.json is missing"),
        (_garbage("config.json"), "config.json can't be used"),
        (_rewrite(model_type="never-heard-of"), "config.json can't be used"),
        (_rewrite(problem_type="multi_label_classification"), "several labels"),
        (
            _rewrite(id2label={"0": "a"}, label2id={"a": 0}, problem_type="regression"),
            "fewer than two labels",
        ),
        (_drop("model.safetensors"), "weights can't be loaded"),
        (_garbage("model.safetensors"), "weights can't be loaded"),
        (_garbage("tokenizer.json"), "tokenizer can't be loaded"),
        (_drop("tokenizer.json"), "holds no tokenizer"),
    ],
)
def test_a_damaged_folder_is_told_in_a_sentence(damage, sentence, exported):
    folder = exported("bert")
    damage(folder)
    with pytest.raises(ModelError, match=sentence) as raised:
        SentimentAnalyzer(folder)
    assert str(folder) in str(raised.value)
    assert raised.value.exit_code == 2


def test_folders_that_are_no_model(exported, finetuned, tmp_path, tiny_base_folder):
    with pytest.raises(ModelError, match="no such folder"):
        SentimentAnalyzer(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        SentimentAnalyzer(tmp_path / "file")
    _, adapter = finetuned("bert")
    with pytest.raises(ModelError, match=r"adapter alone.*lorasweep export"):
        SentimentAnalyzer(adapter)
    # A base has no head: it would answer at random.
    base = shutil.copytree(tiny_base_folder("bert"), tmp_path / "base")
    with pytest.raises(ModelError, match=r"no trained classifier.*classifier"):
        SentimentAnalyzer(base)
