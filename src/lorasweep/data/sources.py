"""From what the spec names to raw tables, one a split: files, the Hub, or the generated corpus."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import datasets

from lorasweep.core.errors import DataError, Problem
from lorasweep.data.files import read_file
from lorasweep.data.tables import RawTable, did_you_mean, refuse, throw_away_cache
from lorasweep.data.typed import typed_table
from lorasweep.spec.schema import DataSpec, EmbeddedSource, FilesSource, HubSource

SPLITS = ("train", "validation", "test")


def read_source(spec: DataSpec, seed: int) -> dict[str, RawTable]:
    """Read every split that the source names: ``train`` always, the others where it has them.

    Args:
        spec: The spec's data part.
        seed: Seed of the generated corpus; files and the Hub don't use it.

    Raises:
        DataError: Everything that is wrong with any of the splits.
    """
    source = spec.source
    if isinstance(source, EmbeddedSource):
        return _generated(source, seed)
    if spec.text == spec.label:
        where = "data.text, data.label"
        raise DataError(Problem(where, f"both name the column {spec.text!r}, expected two columns"))
    tables: dict[str, RawTable] = {}
    problems: list[Problem] = []
    # Only `datasets` has a cache, so only the Hub's layout needs one that is thrown away.
    with throw_away_cache() if isinstance(source, HubSource) else nullcontext("") as cache:
        for split in SPLITS:
            named: str | None = getattr(source, split)
            if named is None:
                continue
            try:
                if isinstance(source, FilesSource):
                    tables[split] = read_file(named, spec.text, spec.label)
                else:
                    tables[split] = _from_hub(source, named, spec.text, spec.label, cache)
            except DataError as error:
                # The same missing configuration would be told once for each split.
                problems += [found for found in error.problems if found not in problems]
    refuse(problems)
    return tables


def describe_source(spec: DataSpec) -> tuple[str, str]:
    """Return a short name for the data, and where it comes from in words."""
    source = spec.source
    if isinstance(source, EmbeddedSource):
        return source.name, f"embedded/{source.name}, {source.size:,} sentences"
    named = {split: getattr(source, split) for split in SPLITS if getattr(source, split)}
    splits = ", ".join(f"{split} {name}" for split, name in named.items())
    if isinstance(source, FilesSource):
        return Path(source.train).stem, splits
    return Path(source.path).name, f"{_hub_name(source)}: {splits}"


# --------------------------------------------------------------------------------------
# The Hub, and folders of its layout
# --------------------------------------------------------------------------------------


def _hub_name(source: HubSource) -> str:
    details = [source.config] if source.config else []
    details += [f"revision {source.revision}"] if source.revision else []
    return f"{source.path} ({', '.join(details)})" if details else source.path


def _from_hub(source: HubSource, split: str, text: str, label: str, cache: str) -> RawTable:
    """Load one split. A local folder goes through a cache that is thrown away afterwards.

    What comes from the Hub is cached under its commit and can't be stale; a folder on disk can.
    """
    folder = Path(source.path).expanduser()
    local = folder.is_dir()
    origin = f"{_hub_name(source)} split {split}"
    if not local and (folder.is_absolute() or source.path.startswith((".", "~"))):
        raise DataError(Problem(source.path, "is no folder", "Give a Hub id or a folder."))
    path = str(folder) if local else source.path
    try:
        table = datasets.load_dataset(
            path,
            source.config,
            split=split,
            revision=source.revision,
            cache_dir=cache if local else None,
        )
    except Exception as error:
        # The Hub's client, its transport and the file readers share no base class.
        raise DataError(_why_not(source, path, split, error, cache if local else None)) from error
    return typed_table(table, origin, split, text, label)


def _why_not(
    source: HubSource, path: str, split: str, error: Exception, cache: str | None
) -> Problem:
    """Find out which part of the name is wrong: the data set, its configuration or its split."""
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    unknown = Problem(
        _hub_name(source),
        f"can't be loaded: {reason[0]}",
        "Check the name, the network, and access if the data set is gated.",
    )
    try:
        configs = datasets.get_dataset_config_names(path, revision=source.revision)
        if (source.config or "default") not in configs and not (
            source.config is None and len(configs) == 1
        ):
            what = "has several configurations, none is named"
            if source.config:
                what = f"has no configuration {source.config!r}"
            hint = did_you_mean(source.config or "", configs)
            advice = f"{hint} Set data.source.config to one of {', '.join(configs)}.".strip()
            return Problem(source.path, what, advice)
        splits = datasets.get_dataset_split_names(
            path, source.config, revision=source.revision, cache_dir=cache
        )
    except Exception:
        # Asking failed as loading did: the first reason is the one to tell.
        return unknown
    if split.split("[")[0] in splits:
        return unknown
    advice = f"{did_you_mean(split, splits)} Its splits are {', '.join(splits)}.".strip()
    return Problem(_hub_name(source), f"has no split {split!r}", advice)


# --------------------------------------------------------------------------------------
# The generated corpus
# --------------------------------------------------------------------------------------


def _generated(source: EmbeddedSource, seed: int) -> dict[str, RawTable]:
    # Here and not above: only a sweep on the generated corpus needs the grammar.
    from lorasweep.data.embedded import generate_reviews

    reviews = generate_reviews(source.size, seed)
    tables = {}
    for split, rows in (("train", reviews.train), ("test", reviews.test)):
        tables[split] = RawTable(
            origin=f"embedded/{source.name} {split}",
            stem=split,
            unit="row",
            places=tuple(range(1, len(rows) + 1)),
            texts=tuple(review.text for review in rows),
            labels=tuple(review.label for review in rows),
            class_names=("negative", "positive"),
            tags=tuple(review.tags for review in rows),
        )
    return tables
