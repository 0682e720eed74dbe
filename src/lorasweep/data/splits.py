"""Rows held out of train, seeded: at random, by class, or so that no side knows the other.

``grouped`` exists because corpora repeat themselves. SST-2's 67,349 training rows are phrases
of 6,920 sentences: of a random tenth, 99 in 100 lie inside, or contain, a phrase that was
trained on. Here texts of three words or more that contain one another form a group, and a
group is never cut, unless one group is so large that nothing else is left to hold out.
Shorter texts ("the film") would chain a whole corpus together: they are no reason to join
groups, but follow the groups that contain them, to train if there is one there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.containment import containments, short_hosts, unique_texts

Strategy = Literal["random", "stratified", "grouped"]
Rows = NDArray[np.int64]

# A text that lies in more others than this no longer ties them together, but only when whole
# groups can't fill this part of the share. The last step leaves each text by itself.
_WHOLE = 2**62
_CUTS = (1024, 256, 64, 16, 4, 1, 0)
_ENOUGH = 0.5


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which rows stay and which are held out, both ascending, and what is worth knowing."""

    kept: Rows
    held: Rows
    notes: tuple[str, ...] = ()


def hold_out(
    texts: Sequence[str],
    labels: Sequence[int],
    share: float,
    strategy: Strategy,
    seed: int,
    where: str,
    names: Sequence[str] = (),
) -> HeldOut:
    """Hold out about ``share`` of the rows, every class on both sides.

    Args:
        texts: Row by row.
        labels: Class of each row: 0, 1, …
        share: Part of the rows to hold out, between 0 and 1.
        strategy: ``random`` draws rows, ``stratified`` keeps each class's share,
            ``grouped`` also keeps texts that contain one another together.
        seed: The same arguments give the same split.
        where: The spec's key that asks for the split, for messages.
        names: What the classes are called, for messages; their numbers if left out.

    Raises:
        DataError: A class can't be on both sides.
    """
    rng = np.random.default_rng(seed)
    target = np.asarray(labels, dtype=np.int64)
    counts = np.bincount(target)
    if (counts == 1).any() or len(counts) > len(target) // 2:
        what = f"{len(target)} rows can't hold {len(counts)} classes on both sides of a split"
        raise DataError(Problem(where, what, "Add rows, or name a split of its own in source."))
    notes: tuple[str, ...] = ()
    if strategy == "random":
        size = min(max(round(share * len(target)), 1), len(target) - 1)
        held = rng.permutation(len(target))[:size]
    elif strategy == "stratified":
        size = min(max(round(share * len(target)), len(counts)), len(target) - len(counts))
        held = draw_stratified(target, size, rng, leave=1)
    else:
        held, notes = _grouped(texts, target, share, rng)
    mask = np.zeros(len(target), dtype=bool)
    mask[held] = True
    lacking = [
        f"{side} has no row of class {names[label] if names else label}"
        for side, chosen in (("train", ~mask), ("the held-out side", mask))
        for label in np.flatnonzero(counts).tolist()
        if not (target[chosen] == label).any()
    ]
    if lacking:
        advice = "Take another share, strategy or seed, or name a split of its own in source."
        what = f"the {strategy} split is too small for its classes: {'; '.join(lacking)}"
        raise DataError(Problem(where, what, advice))
    return HeldOut(np.flatnonzero(~mask), np.flatnonzero(mask), notes)


def draw_stratified(
    labels: NDArray[np.int64], size: int, rng: np.random.Generator, leave: int = 0
) -> Rows:
    """Draw ``size`` rows, ascending, each class in proportion and with one row at least.

    Args:
        labels: Class of each row, ``(rows,)``.
        size: At least the number of classes.
        rng: Where chance comes from.
        leave: Rows of each class that must not be drawn.
    """
    classes, counts = np.unique(labels, return_counts=True)
    room = counts - leave
    exact = size * counts / len(labels)
    quota = np.minimum(np.maximum(np.floor(exact).astype(np.int64), 1), room)
    while quota.sum() != size:
        # The class that is furthest from its exact share, and may still move, gives or takes.
        step = 1 if quota.sum() < size else -1
        movable = (quota < room) if step == 1 else (quota > 1)
        if not movable.any():
            break
        distance = np.where(movable, (exact - quota) * step, -np.inf)
        quota[int(distance.argmax())] += step
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _grouped(
    texts: Sequence[str], labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> tuple[Rows, tuple[str, ...]]:
    """Hold out whole groups; cut the largest only when nothing else is left to hold out."""
    unique = unique_texts(texts)
    pairs = containments(unique)
    hosts = short_hosts(unique)
    spread = np.bincount(pairs[0], minlength=len(unique))
    spread += np.bincount(hosts[0], minlength=len(unique))
    wanted = share * len(labels)
    best, used = np.empty(0, np.int64), _WHOLE
    for cut in (_WHOLE, *_CUTS):
        group, bound = _groups(
            len(unique),
            tuple(side[spread[pairs[0]] <= cut] for side in pairs),
            tuple(side[spread[hosts[0]] <= cut] for side in hosts),
        )
        held = _choose(group[unique.of_row], bound, labels, share, rng)
        sound = len(np.unique(labels[held])) == len(np.unique(labels))
        if len(held) > len(best):
            best, used = held, cut
        if sound and len(held) >= _ENOUGH * wanted:
            best, used = held, cut
            break
    notes = []
    if used != _WHOLE:
        notes.append(
            "So many texts contain one another that whole groups can't fill the split: texts "
            f"that lie in more than {used} others were separated from them."
        )
    if len(best) < 0.9 * wanted:
        notes.append(f"{len(best)} rows were held out, not {round(wanted)}: no other group fits.")
    return best, tuple(notes)


def _groups(
    size: int, long: tuple[Rows, ...], short: tuple[Rows, ...]
) -> tuple[Rows, NDArray[np.bool_]]:
    """Number the groups of unique texts, and say which of them must stay in train.

    Args:
        size: Number of unique texts.
        long: Inner and outer texts of three words or more.
        short: Shorter texts, and the long ones that they lie in.

    Returns:
        Group of each unique text, ``(texts,)``, and whether a group is bound to train,
        ``(groups,)``: a short text that lies in several groups would leak from any of them.
    """
    graph = coo_array((np.ones(len(long[0]), np.int8), (long[0], long[1])), shape=(size, size))
    count, group = connected_components(graph, directed=False)
    group = group.astype(np.int64)
    low, high = np.full(size, count), np.full(size, -1)
    np.minimum.at(low, short[0], group[short[1]])
    np.maximum.at(high, short[0], group[short[1]])
    follows = low == high
    bound = np.zeros(count, dtype=bool)
    bound[group[low < high]] = True
    group[follows] = low[follows]
    return group, bound


def _choose(
    group: Rows,
    bound: NDArray[np.bool_],
    labels: NDArray[np.int64],
    share: float,
    rng: np.random.Generator,
) -> Rows:
    """Choose groups in random order until each class has its share, and return their rows.

    Args:
        group: Group of each row, ``(rows,)``.
        bound: Groups that can't be chosen, ``(groups,)``.
        labels: Class of each row, ``(rows,)``.
        share: Part of the rows to choose.
        rng: Where chance comes from.
    """
    classes = int(labels.max()) + 1
    table = np.bincount(group * classes + labels, minlength=len(bound) * classes)
    sizes = table.reshape(len(bound), classes)
    total = sizes.sum(axis=0)
    target = share * total
    chosen = np.zeros(len(bound), dtype=bool)
    filled = np.zeros(classes, dtype=np.int64)
    order = rng.permutation(np.flatnonzero(~bound & sizes.any(axis=1)))
    # First what fits, then what brings the counts nearer to the target although it is too much.
    for fits in (True, False):
        for at in order[~chosen[order]]:
            after = filled + sizes[at]
            if fits:
                good = bool((after <= target + 0.5).all())
            else:
                good = float(abs(after - target).sum()) < float(abs(filled - target).sum())
            if good and bool((after < total)[total > 0].all()):
                chosen[at] = True
                filled = after
    for label in np.flatnonzero((filled == 0) & (total > 0)):
        able = order[(sizes[order, label] > 0) & ~chosen[order]]
        for at in able[np.argsort(sizes[able].sum(axis=1), kind="stable")]:
            if bool((filled + sizes[at] < total)[total > 0].all()):
                chosen[at] = True
                filled = filled + sizes[at]
                break
    return np.flatnonzero(chosen[group])
