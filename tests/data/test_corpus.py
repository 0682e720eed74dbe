"""From a spec to a corpus: everything together, equal for equal input, refused with reasons."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorasweep.core.errors import DataError
from lorasweep.data.corpus import load_corpus
from lorasweep.spec.schema import DataSpec


def spec(train: Path | str, more: dict[str, str] | None = None, **values: object) -> DataSpec:
    source = {"kind": "files", "train": str(train), **(more or {})}
    return DataSpec.model_validate({"source": source, **values})


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Two hundred distinct reviews of unlike length, a quarter of them positive."""
    path = tmp_path / "reviews.csv"
    rows = [
        f"review {n} says {'word ' * (n % 7)}number {n},{'pos' if n % 4 == 0 else 'neg'}"
        for n in range(200)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A test file with a short, an empty and a repeated text."""
    path = tmp_path / "held.csv"
    path.write_text(
        "text,label\nfine,pos\n,neg\nso so film,neg\nso so film,neg\n"
        "review 1 says word number 1,pos\n",
        encoding="utf-8",
    )
    return path


def test_the_same_spec_and_seed_give_an_equal_corpus(reviews: Path, held: Path) -> None:
    wanted = spec(reviews, {"test": str(held)}, limit={"train": 50}, split={"validation": 0.25})
    first = load_corpus(wanted, 1)
    assert load_corpus(wanted, 1) == first
    other = load_corpus(wanted, 2)
    assert other.train.ids != first.train.ids
    assert other.fingerprint != first.fingerprint
    assert other.digests["test"] == first.digests["test"]


def test_what_a_corpus_holds(reviews: Path, held: Path) -> None:
    corpus = load_corpus(spec(reviews, {"test": str(held)}, split={"validation": 0.2}), 1)
    assert corpus.name == "reviews"
    assert corpus.label_names == ("neg", "pos")
    assert (len(corpus.train), len(corpus.validation)) == (160, 40)
    assert corpus.test is not None
    assert corpus.test.ids == ("held:1", "held:3", "held:4", "held:5")
    rows = {*corpus.train.ids, *corpus.validation.ids}
    assert rows == {f"reviews:{n}" for n in range(1, 201)}
    for split in (corpus.train, corpus.validation):
        assert [*split.ids] == sorted(split.ids, key=lambda name: int(name.split(":")[1]))
        for text, label, name in zip(split.texts, split.labels, split.ids, strict=True):
            number = int(name.split(":")[1]) - 1
            assert text.startswith(f"review {number} ")
            assert label == (number % 4 == 0)
    assert [report.held_out for report in corpus.leakage] == ["validation", "test"]
    assert corpus.leakage[1].contained == 1
    assert str(held) in corpus.source


def test_cleaning_is_reported_and_spares_the_test_split(reviews: Path, held: Path) -> None:
    wanted = spec(reviews, {"test": str(held)}, clean={"min_words": 6, "drop_duplicates": True})
    corpus = load_corpus(wanted, 1)
    train, validation, test = corpus.cleaning
    assert train.dropped == {"fewer than 6 words": 29}
    assert (train.read, train.kept) == (200, 171)
    assert len(corpus.train) + len(corpus.validation) == 171
    assert validation.kept == len(corpus.validation)
    assert (test.read, test.kept, test.dropped) == (5, 4, {"empty": 1})
    assert any("more than once" in note for note in test.notes)
    assert any("rows of train are held out (grouped)" in note for note in validation.notes)


def test_a_test_split_of_train_keeps_short_and_repeated_texts(tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    rows = [f"word{n},{n % 2}\nthree words {n},{n % 2}" for n in range(100)]
    path.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    wanted = spec(path, clean={"min_words": 3}, split={"test": 0.2, "validation": 0.2})
    corpus = load_corpus(wanted, 1)
    assert corpus.test is not None
    assert len(corpus.test) == 40
    assert any(len(text.split()) == 1 for text in corpus.test.texts)
    assert all(len(text.split()) >= 3 for text in corpus.train.texts + corpus.validation.texts)
    names = [*corpus.train.ids, *corpus.validation.ids, *corpus.test.ids]
    assert len(set(names)) == len(names)


def test_validation_of_its_own(reviews: Path, held: Path) -> None:
    corpus = load_corpus(spec(reviews, {"validation": str(held)}, clean={"min_words": 2}), 1)
    assert len(corpus.train) == 200
    assert corpus.validation.ids == ("held:3", "held:4", "held:5")
    assert corpus.test is None


def test_limits_are_stratified_and_keep_order_and_classes(reviews: Path, held: Path) -> None:
    wanted = spec(reviews, {"test": str(held)}, limit={"train": 40, "validation": 8, "test": 2})
    corpus = load_corpus(wanted, 1)
    assert corpus.train.labels.count(1) == 10
    assert corpus.validation.labels.count(1) == 2
    assert corpus.test is not None
    assert set(corpus.test.labels) == {0, 1}
    numbers = [int(name.split(":")[1]) for name in corpus.train.ids]
    assert numbers == sorted(numbers)
    assert any("40 of 169 rows were taken" in note for note in corpus.cleaning[0].notes)


def test_the_fingerprint_is_of_the_data_and_not_of_its_path(reviews: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "other.csv"
    moved.parent.mkdir()
    shutil.copy(reviews, moved)
    first, second = load_corpus(spec(reviews), 1), load_corpus(spec(moved), 1)
    assert (first.digests, first.fingerprint) == (second.digests, second.fingerprint)
    renamed = load_corpus(spec(reviews, labels=["no", "yes"]), 1)
    assert renamed.digests == first.digests
    assert renamed.fingerprint != first.fingerprint
    content = reviews.read_text(encoding="utf-8").replace("review 7 ", "review seven ")
    moved.write_text(content, encoding="utf-8")
    assert load_corpus(spec(moved), 1).fingerprint != first.fingerprint


def test_digests_tell_where_one_text_ends(tmp_path: Path) -> None:
    digests = set()
    for name, pairs in (("a", ("ab", "c")), ("b", ("a", "bc"))):
        path = tmp_path / f"{name}.csv"
        rows = [f"{pairs[n % 2]},{n % 2}" for n in range(4)]
        path.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
        corpus = load_corpus(spec(path, {"validation": str(path)}), 1)
        digests.add(corpus.digests["train"])
    assert len(digests) == 2


def test_bad_combinations_are_refused(reviews: Path, held: Path, tmp_path: Path) -> None:
    single = tmp_path / "single.csv"
    single.write_text("text,label\na b c,x\nd e f,x\ng h i,y\n", encoding="utf-8")
    twins = tmp_path / "twins.csv"
    twins.write_text("text,label\n" + "a b c,x\nd e f,y\n" * 4, encoding="utf-8")
    blank = tmp_path / "blank.csv"
    blank.write_text("text,label\n ,pos\n ,neg\n", encoding="utf-8")
    for wanted, what in (
        (spec(reviews, {"test": str(held)}, split={"test": 0.1}), "source has a test split"),
        (spec(single), "'y' has a single row left"),
        (spec(twins), "has no row of class [xy]"),
        (spec(reviews, clean={"min_words": 50}), "no row left after cleaning"),
        (spec(reviews, {"test": str(blank)}), "no row left after cleaning"),
        (spec(reviews, {"test": str(tmp_path / "no.csv")}), "doesn't exist"),
    ):
        with pytest.raises(DataError, match=what):
            load_corpus(wanted, 1)


def test_a_limit_below_the_number_of_classes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "three.csv"
    rows = [f"text number {n},{n % 3}" for n in range(60)]
    path.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_corpus(spec(path, limit={"train": 2, "validation": 2}), 1)
    assert [p.where for p in caught.value.problems] == ["data.limit.train", "data.limit.validation"]


def test_a_validation_split_of_one_label_is_refused(reviews: Path, tmp_path: Path) -> None:
    """As the first thousand rows of a file that is sorted by label are."""
    held = tmp_path / "sorted.csv"
    held.write_text("text,label\na dull film,neg\nit was a bore,neg\n", encoding="utf-8")
    with pytest.raises(DataError, match="of the label 'neg' only") as caught:
        load_corpus(spec(reviews, {"validation": str(held)}), 1)
    assert "sorted.csv" in str(caught.value)
    assert load_corpus(spec(reviews, {"test": str(held)}), 1).test is not None


def test_tags_follow_their_rows() -> None:
    wanted = DataSpec.model_validate({"source": {"kind": "embedded", "size": 400}})
    corpus = load_corpus(wanted, 1)
    assert corpus.test is not None
    for split in (corpus.train, corpus.validation, corpus.test):
        assert len(split.tags) == len(split)
    assert corpus.label_names == ("negative", "positive")
    assert corpus.leakage[0].share <= 0.01
    assert load_corpus(wanted, 1) == corpus


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("label_mixed_types.csv", "the labels mix 150 words"),
        ("label_float_with_gap.csv", "no label in 1 of 300 rows"),
        ("missing_labels.csv", "no label in 30 of 300 rows"),
        ("one_class.csv", "has one class only: 'negative'"),
    ],
)
def test_nasty_labels(real_data: Path, name: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        load_corpus(spec(real_data / "nasty" / name), 1)


@pytest.mark.data
def test_nasty_files_that_can_be_used(real_data: Path) -> None:
    nasty = real_data / "nasty"
    drop = {"drop_unlabelled": True}
    whole = load_corpus(spec(nasty / "label_float_with_gap.csv", clean=drop), 1)
    assert whole.label_names == ("0", "1", "2")
    words = load_corpus(spec(nasty / "missing_labels.csv", clean=drop), 1)
    assert words.label_names == ("negative", "neutral", "positive")
    assert words.cleaning[0].dropped == {"no label": 30}
    empty = load_corpus(spec(nasty / "empty_texts.csv"), 1)
    assert empty.cleaning[0].dropped == {"empty": 15}
    double = load_corpus(
        spec(nasty / "duplicates_and_conflicts.csv", clean={"drop_duplicates": True}), 1
    )
    assert double.cleaning[0].dropped == {"duplicate": 250}
    assert any("with different labels" in note for note in double.cleaning[0].notes)
    for name in ("cr_only.csv", "bom_utf8.csv", "good.jsonl"):
        assert load_corpus(spec(nasty / name), 1).label_names == words.label_names


@pytest.mark.data
def test_three_classes_and_an_imbalanced_set(real_data: Path) -> None:
    folder = real_data / "three_class"
    test = {"test": str(folder / "tse_tweets_test.csv")}
    names = ["negative", "neutral", "positive"]
    tweets = load_corpus(spec(folder / "tse_tweets_train.csv", test, labels=names), 1)
    assert tweets.test is not None
    assert len(tweets.test) == 3534
    assert tweets.leakage[0].share <= 0.01
    spam = load_corpus(spec(real_data / "imbalanced" / "sms_spam.csv"), 1)
    assert spam.label_names == ("ham", "spam")
    assert spam.leakage[0].contained == spam.leakage[0].duplicated == 0
