"""The reference that counts words: TF-IDF features and a logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from lorasweep.baselines.majority import label_shares, spread
from lorasweep.core.corpora import TextSplit

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Scripts that are written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
# Each of their characters is a token, so that single ones and pairs stand in for words.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# A character of those; or a word, also of one letter, with the apostrophes inside; or a symbol
# such as "!" or an emoji, which says much about a mood. Commas, stops, quotes and brackets are
# left out, so that word pairs reach across them.
_TOKEN = (
    rf"[{_UNSPACED}]"
    rf"|(?:(?![{_UNSPACED}])\w)+(?:['’](?:(?![{_UNSPACED}])\w)+)*"
    r"|[^\w\s.,;:'’‘\"“”()\[\]\-–—。、，；：「」]"
)


class TfidfBaseline:
    """Single words and pairs, weighted by TF-IDF, into a logistic regression.

    Term frequencies are damped (1 + log tf); the regularisation, C = 10, is weaker than
    scikit-learn's default, which holds the short rows of unit length too tight: a reference
    should be as strong as it is when somebody means it.
    """

    name = "tfidf"

    def predict(self, train: TextSplit, texts: Sequence[str], labels: int) -> NDArray[np.float64]:
        """Return probabilities, ``(texts, labels)``.

        Where nothing can be learnt, from one label only or from texts without any token,
        these are the label frequencies.
        """
        model = Pipeline(
            [
                (
                    "counts",
                    TfidfVectorizer(token_pattern=_TOKEN, ngram_range=(1, 2), sublinear_tf=True),
                ),
                ("classifier", LogisticRegression(C=10.0, max_iter=2000)),
            ]
        )
        tokens = model["counts"].build_tokenizer()
        if len(set(train.labels)) < 2 or not any(tokens(text) for text in train.texts):
            return np.tile(label_shares(train, labels), (len(texts), 1))
        model.fit(list(train.texts), np.asarray(train.labels, dtype=np.int64))
        if not len(texts):
            return np.zeros((0, labels), dtype=np.float64)
        return spread(model.predict_proba(list(texts)), model["classifier"].classes_, labels)
