"""The frames of the embedded review corpus: how opinions are put together, and what decides.

Word counts are meant to fail here. The same opinion appears in frames that keep its polarity
and in frames that turn it round ("nobody would call the soup bland"), and a sentence with two
opposite opinions is labelled by the one that decides: the main clause, the clause after "but",
the thing that the writer will remember.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Frame:
    """One way to say something.

    ``main`` is the opinion that decides and ``other`` one of opposite polarity about another
    aspect of the same thing; ``also`` is a second opinion of ``main``'s polarity. Each gives
    ``{main}`` (a whole clause), ``{main_np}``, ``{main_was}``, ``{main_adj}``,
    ``{main_noun}``, ``{main_it}``; ``{main_antonym}`` is an adjective of opposite polarity
    that fits the same noun.

    Attributes:
        text: A template without the capital letter and the full stop.
        tags: What a sentence of this frame contains.
        flips: The label is the opposite of ``main``'s polarity.
        only: The only label that this frame can bear; None for both.
        merges: "…, and" may stand before it.
        fields: The placeholders in ``text``.
    """

    text: str
    tags: tuple[str, ...]
    flips: bool = False
    only: int | None = None
    merges: bool = True
    fields: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        names = {part.split("}")[0] for part in self.text.split("{")[1:]}
        object.__setattr__(self, "fields", frozenset(names))

    @property
    def main_needs_adjective(self) -> bool:
        return bool({"main_adj", "main_antonym"} & self.fields)

    @property
    def other_needs_adjective(self) -> bool:
        return "other_adj" in self.fields


def _frames(*texts: str, tags: str, flips: bool = False) -> tuple[Frame, ...]:
    return tuple(Frame(text, tuple(tags.split()), flips) for text in texts)


_PLAIN = (
    *_frames(
        "on the whole, {main}",
        "all in all, {main}",
        "to my mind, {main}",
        "if you ask me, {main}",
        "for what it is worth, {main}",
        "I have to say that {main}",
        "I found {main_np} {main_adj} from beginning to end",
        "{main}, and {also} as well",
        tags="plain",
    ),
    *_frames(
        "not only {main_was} {main_np} {main_adj}, but {also} too",
        "{main}; what is more, {also}",
        "{main}, and on top of that {also}",
        tags="addition",
    ),
)

_INTENSIFIER = _frames(
    "{main_np} {main_was} {very} {main_adj}, from the first minute to the last",
    "I thought {main_np} {very} {main_adj} from the start",
    "{main_np} {main_was} so {main_adj} that we talked about it all the way home",
    "{main_np} {main_was} so {main_adj} that I told everyone at work",
    "{main_np}, I must say, {main_was} {very} {main_adj}",
    tags="intensifier",
)

_NEGATION = _frames(
    "nobody {witness} would call {main_np} {main_adj}",
    "at no point did I find {main_np} {main_adj}",
    "there was nothing {main_adj} about {main_np}",
    "{main_np} {main_was} anything but {main_adj}",
    "{main_np} {main_was} by no means {main_adj}",
    "{main_np} did not strike me as {main_adj} at all",
    "neither I nor {person} thought {main_np} {main_adj}",
    "it is simply not true that {main}",
    tags="negation",
    flips=True,
)

_DOUBLE_NEGATION = _frames(
    "there is no denying that {main}",
    "nobody can deny that {main}",
    "hardly anyone {witness} would dispute that {main}",
    "at no point did I doubt that {main}",
    tags="double_negation",
)

_CONTRAST = _frames(
    "{other}, but {main}",
    "{other}; however, {main}",
    "{other}, and yet {main}",
    "{other}. Still, {main}",
    "granted, {other}, yet {main}, and that settles it",
    "{other}, I admit, but {main}",
    "{other}, but then {main}",
    tags="contrast",
)

_CONCESSION = _frames(
    "although {other}, {main}",
    "even though {other}, {main}",
    "{main}, even though {other}",
    "{main}, although {other}",
    "despite the {other_adj} {other_noun}, {main}",
    "{main}, despite the {other_adj} {other_noun}",
    "in spite of the {other_adj} {other_noun}, {main}",
    "while {other}, {main}",
    "it hardly matters that {other}, because {main}",
    tags="concession",
)

_MIXED = _frames(
    "{main} and {other}, and it is {main_np} that I will remember",
    "{other} and {main}, and it is {main_np} that I will remember",
    "{main}, {other}, and for me {main_np} outweighed {other_np}",
    "{other}, {main}, and for me {main_np} outweighed {other_np}",
    tags="mixed_opinion",
)

_VERDICT = (
    Frame(
        "{main} and {other}, and on balance I would {again}", ("mixed_opinion", "verdict"), only=1
    ),
    Frame(
        "{other} and {main}, and on balance I would {again}", ("mixed_opinion", "verdict"), only=1
    ),
    Frame(
        "{main} and {other}, and on balance I would hesitate to {again}",
        ("mixed_opinion", "verdict"),
        only=0,
    ),
    Frame(
        "{other} and {main}, and on balance I would hesitate to {again}",
        ("mixed_opinion", "verdict"),
        only=0,
    ),
)

_COMPARISON = (
    *_frames(
        "{main_np} {main_was} far less {main_adj} than {person} had told me",
        "{main_np} {main_was} a good deal less {main_adj} {here} than {rival}",
        tags="comparison",
        flips=True,
    ),
    *_frames(
        "{main_np} {main_was} not nearly as {main_adj} as {person} had told me",
        tags="comparison negation",
        flips=True,
    ),
    *_frames(
        "{main_np} {main_was} every bit as {main_adj} as {person} had told me",
        "{main_np} {main_was} {main_antonym} {rival}; {here} {main_it} {main_was} {main_adj}",
        "{main_np} {main_was} {main_adj} {here}; {rival} {main_it} {main_was} {main_antonym}",
        "{here} {main_np} {main_was} {main_adj}; {rival} {main_it} {main_was} {main_antonym}",
        tags="comparison",
    ),
)

_HEARSAY = (
    *_frames(
        "{person} had told me that {main}, which turned out to be true",
        "{person} had told me that {main}, and that was exactly right",
        "people say that {main}, and they are right",
        "I had read that {main}, and I can only confirm it",
        "I had expected {main_np} to be {main_adj}, and so it proved",
        tags="hearsay",
    ),
    *_frames(
        "{person} had told me that {main}, which turned out to be false",
        "{person} had told me that {main}, and that was plain wrong",
        "people say that {main}, and they are mistaken",
        "whoever wrote that {main} {elsewhere}",
        "I had expected {main_np} to be {main_adj}, and the opposite was true",
        tags="hearsay",
        flips=True,
    ),
)

# Each cry is heard with praise and with blame: only what follows tells whether it is meant.
_CHEERS = (
    "oh, wonderful: {main}",
    "how delightful: {main}",
    "what a treat: {main}",
    "bravo: {main}",
    "just what I needed: {main}",
)
_GROANS = (
    "be warned: {main}",
    "what a nuisance: {main}, and now I have to tell everyone",
    "my only complaint is that {main}",
    "if I must complain of something, it is that {main}",
)


def _cries(texts: tuple[str, ...], tag: str, label: int) -> tuple[Frame, ...]:
    return tuple(Frame(text, (tag,), only=label, merges=False) for text in texts)


_IRONY = (*_cries(_CHEERS, "irony", 0), *_cries(_GROANS, "irony", 1))
_EXCLAMATION = (*_cries(_CHEERS, "exclamation", 1), *_cries(_GROANS, "exclamation", 0))

# Share of the sentences, and the frames that make them up, each as often as the next.
GROUPS: Mapping[str, tuple[float, tuple[Frame, ...]]] = {
    "plain": (0.25, _PLAIN),
    "intensifier": (0.12, _INTENSIFIER),
    "negation": (0.14, _NEGATION),
    "double_negation": (0.04, _DOUBLE_NEGATION),
    "contrast": (0.15, _CONTRAST),
    "concession": (0.14, _CONCESSION),
    "mixed_opinion": (0.02, _MIXED),
    "verdict": (0.02, _VERDICT),
    "comparison": (0.05, _COMPARISON),
    "hearsay": (0.03, _HEARSAY),
    "irony": (0.03, _IRONY),
    "exclamation": (0.01, _EXCLAMATION),
}
