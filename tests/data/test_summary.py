import numpy as np

from lorasweep.core.corpora import CleaningReport, Corpus, EncodedSplit, LeakageReport, TextSplit
from lorasweep.data.summary import facts, leaks, missing_labels


def corpus(**changes) -> Corpus:
    split = TextSplit("train", ("a b", "c d"), (0, 1), ("x:1", "x:2"))
    parts = {
        "name": "x",
        "label_names": ("no", "yes"),
        "train": split,
        "validation": split,
        "test": None,
        "cleaning": (),
        "leakage": (),
        "digests": {},
        "fingerprint": "",
        "source": "x.csv",
    }
    return Corpus(**(parts | changes))


def test_every_count_is_told():
    report = CleaningReport(
        "train", 1200, 2, {"whitespace collapsed": 7, "nothing": 0}, {"empty": 1198}, ("A note.",)
    )
    cut = EncodedSplit("train", np.zeros(2, np.int32), np.arange(3), np.zeros(2, np.int64), 1)
    assert facts(corpus(cleaning=(report,)), [cut]) == (
        "x: 2 train, 2 validation, no test split; labels no, yes",
        "train: left out 1,198 empty (of 1,200 rows)",
        "train: changed 7 whitespace collapsed (of 1,200 rows)",
        "train: A note.",
        "train: 1 of 2 texts are longer than max_length and lose their end",
    )


def test_leaks_are_told_where_there_are_some():
    reports = (LeakageReport("validation", 100, 0, 0, 0), LeakageReport("test", 200, 5, 1, 6))
    assert leaks(corpus(leakage=reports)) == (
        "test: 6 of 200 texts (3.0%) lie in, or contain, a training text, or are the same (1); "
        "scores on them flatter the model",
    )


def test_texts_of_one_or_two_words_leak_too_where_they_are_the_same():
    reports = (LeakageReport("validation", 100, 0, 3, 3), LeakageReport("test", 200, 5, 0, 5))
    assert leaks(corpus(leakage=reports)) == (
        "validation: 3 of 100 texts (3.0%) are the same as a training text; "
        "scores on them flatter the model",
        "test: 5 of 200 texts (2.5%) lie in, or contain, a training text; "
        "scores on them flatter the model",
    )


def test_labels_that_no_held_out_text_has_are_told():
    one = TextSplit("test", ("a b", "c d"), (0, 0), ("x:1", "x:2"))
    assert missing_labels(corpus()) == ()
    assert missing_labels(corpus(test=one)) == (
        "test: no text is labelled “yes”; what is measured on this split says nothing about how "
        "the label is recognised",
    )
