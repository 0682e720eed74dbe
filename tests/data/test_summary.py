import numpy as np

from lorasweep.core.corpora import CleaningReport, Corpus, EncodedSplit, LeakageReport, TextSplit
from lorasweep.data.summary import facts, leaks


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
    reports = (LeakageReport("validation", 100, 0, 0), LeakageReport("test", 200, 5, 1))
    assert leaks(corpus(leakage=reports)) == (
        "test: 5 of 200 texts (2.5%) lie in, or contain, a training text; "
        "scores on them flatter the model",
    )
