from __future__ import annotations

import pytest

from lorasweep.evaluation.patterns import CUES, kinds_of

FOUND = {
    "negation": ("it isn’t funny", "never dull", "hardly a thrill"),
    "double negation": ("not without charm", "it isn't never good"),
    "contrast": ("slow but lovely", "Although long, it works"),
    "mixed opinion (words of praise and of blame)": ("great cast, awful script",),
    "irony marker": ("Oh, great, another sequel", 'a real "masterpiece"', "yeah, right", "wow..."),
    "comparison": ("better than the book", "as bad as it gets"),
    "question": ("why was this made?",),
    "hedge": ("it is kind of sweet", "perhaps"),
    "intensifier": ("so very long",),
}


@pytest.mark.parametrize("cue", CUES, ids=lambda cue: cue.name)
def test_each_cue_finds_its_texts_and_not_a_plain_one(cue) -> None:  # type: ignore[no-untyped-def]
    assert FOUND[cue.name]
    assert all(cue.finds(text) for text in FOUND[cue.name])
    assert not cue.finds("a film about a nobleman and his butler at noon")


def test_tags_take_the_place_of_cues_and_lengths_stay() -> None:
    texts = ["not good", "a b c d e f g", "x"]
    by_words = {kind.name: kind.rows.tolist() for kind in kinds_of(texts)}
    assert by_words["negation"] == [True, False, False]
    assert by_words["5 words or fewer"] == [True, False, True]
    assert by_words["6 to 10 words"] == [False, True, False]
    by_tag = {kind.name: kind for kind in kinds_of(texts, [("irony", "x"), (), ("irony",)])}
    assert list(by_tag) == ["irony", "x", "5 words or fewer", "6 to 10 words"]
    assert by_tag["irony"].rows.tolist() == [True, False, True]
    assert by_tag["irony"].source == "tag"


def test_every_row_has_one_length() -> None:
    texts = ["w " * count for count in range(130)]
    lengths = [kind.rows for kind in kinds_of(texts) if kind.source == "length"]
    assert (sum(mask.astype(int) for mask in lengths) == 1).all()
