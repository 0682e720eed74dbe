"""The words of the embedded review corpus, read from the table of topics.

An adjective pool is shared by several aspects, so that a pair held out for the test, such as
(coffee, stale), is made of words that training knows from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorasweep.data.review_topics import TOPICS


@dataclass(frozen=True, slots=True)
class Pool:
    """Adjectives that fit the same nouns.

    Attributes:
        good, bad: Gradable adjectives that work both before a noun and after "was".
    """

    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Aspect:
    """One thing about what is reviewed that can be praised or blamed.

    Attributes:
        noun: Without the article.
        plural: Takes "were" and "they".
        pool: Adjectives that fit.
        good, bad: What it did: verb phrases in the past tense.
    """

    noun: str
    plural: bool
    pool: Pool
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Topic:
    """A kind of thing that is reviewed.

    Attributes:
        name: For people who read the table.
        leads: Neutral clauses that set the scene.
        phrases: ``witness``, ``again``, ``rival``, ``here`` and ``elsewhere``; see the table.
        aspects: What is praised or blamed.
    """

    name: str
    leads: tuple[str, ...]
    phrases: dict[str, str]
    aspects: tuple[Aspect, ...]


_POOLS = """\
story
  + gripping, inventive, moving, clever, suspenseful, original
  - predictable, muddled, contrived, tedious, forgettable, implausible
show
  + convincing, captivating, heartfelt, assured, lively
  - wooden, lifeless, stilted, uninspired, dreary
look
  + stunning, imaginative, elegant, striking, beautiful
  - drab, ugly, clumsy, uninspired, murky
tone
  + crisp, rich, warm, clear
  - tinny, muffled, harsh, shrill
text
  + vivid, witty, precise, graceful, fluent
  - clumsy, bloated, flat, pompous, laboured
figures
  + believable, complex, endearing, memorable, lifelike
  - shallow, implausible, dull, forgettable, flat
staff
  + attentive, kind, patient, helpful, courteous, cheerful
  - rude, indifferent, surly, dismissive, impatient, sullen
room
  + spotless, spacious, peaceful, airy, inviting, comfortable
  - grimy, cramped, noisy, stuffy, shabby, uncomfortable
seat
  + comfortable, soft, roomy, cosy
  - lumpy, uncomfortable, cramped, shabby
food
  + delicious, fragrant, fresh, flavourful, memorable
  - bland, soggy, stale, tasteless, insipid
drink
  + delicious, aromatic, smooth, flavourful, fragrant
  - watery, bitter, insipid, lukewarm, stale
value
  + reasonable, fair, modest, sensible
  - outrageous, exorbitant, unreasonable, steep
gadget
  + responsive, reliable, precise, dependable, handy
  - sluggish, unreliable, erratic, fiddly, feeble
build
  + sturdy, elegant, handsome, solid
  - flimsy, ugly, clumsy, shabby
lesson
  + lucid, engaging, thorough, stimulating, clear
  - confusing, dry, superficial, monotonous, muddled
flow
  + smooth, efficient, quick, effortless
  - chaotic, slow, frustrating, disorganised
amount
  + generous, ample, satisfying, filling
  - meagre, stingy, tiny, pitiful
humour
  + witty, sharp, inventive, clever
  - crude, stale, laboured, predictable
"""

PEOPLE = (
    *("my brother", "my sister", "a colleague", "my neighbour", "an old friend"),
    *("my flatmate", "my cousin", "my aunt", "my father", "my boss"),
)

TIMES = (
    *("in January", "in February", "in March", "in April", "in May", "in June", "in July"),
    *("in August", "in September", "in October", "in November", "in December"),
    *("last spring", "last summer", "last autumn", "last winter", "over Easter"),
    *("on a rainy Sunday", "on my birthday", "two weeks ago", "a month ago"),
    *("during the holidays",),
)

INTENSIFIERS = (
    *("truly", "really", "remarkably", "thoroughly"),
    *("downright", "astonishingly", "incredibly", "surprisingly"),
)


def _read_pools(table: str) -> dict[str, Pool]:
    pools = {}
    lines = iter(table.splitlines())
    for name, good, bad in zip(lines, lines, lines, strict=True):
        pools[name] = Pool(_listed(good, "+", ", "), _listed(bad, "-", ", "))
    return pools


def _listed(line: str, sign: str, separator: str) -> tuple[str, ...]:
    mark, _, rest = line.strip().partition(" ")
    if mark != sign:
        raise ValueError(f"the table of topics should have {sign} here: {line!r}")
    return tuple(rest.split(separator))


@dataclass(slots=True)
class _Draft:
    """A topic while its lines are read."""

    name: str
    leads: list[str] = field(default_factory=list)
    phrases: dict[str, str] = field(default_factory=dict)
    aspects: list[Aspect] = field(default_factory=list)

    def finished(self) -> Topic:
        return Topic(self.name, tuple(self.leads), self.phrases, tuple(self.aspects))


def _read_topics(table: str, pools: dict[str, Pool]) -> tuple[Topic, ...]:
    drafts: list[_Draft] = []
    lines = iter(table.splitlines())
    for line in lines:
        if not line.startswith(" "):
            drafts.append(_Draft(line))
            continue
        key, _, rest = line.strip().partition(" ")
        if key == "lead":
            drafts[-1].leads.append(rest)
        elif key in ("one", "many"):
            noun, _, pool = rest.partition(": ")
            good, bad = _listed(next(lines), "+", " / "), _listed(next(lines), "-", " / ")
            drafts[-1].aspects.append(Aspect(noun, key == "many", pools[pool], good, bad))
        else:
            drafts[-1].phrases[key] = rest
    return tuple(draft.finished() for draft in drafts)


ALL_TOPICS = _read_topics(TOPICS, _read_pools(_POOLS))
