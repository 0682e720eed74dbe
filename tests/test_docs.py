"""The documents say what the code does: keys and defaults, examples, links, commands."""

import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from lorasweep.cli.app import group
from lorasweep.core.plans import Scheduler
from lorasweep.spec.loader import load_spec
from lorasweep.spec.schema import Spec
from lorasweep.spec.space import LIMITS, Space

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------
# docs/spec.md against the schema
# --------------------------------------------------------------------------------------

Key = tuple[str, Any, tuple[str, ...]]  # dotted path, default, words that its type must hold
REQUIRED = "required"


def keys(model: type[BaseModel] = Spec, prefix: str = "") -> Iterator[Key]:
    """Walk the models; a union gives the keys of each of its branches."""
    for name, field in model.model_fields.items():
        branches = [] if model is Space else models_in(field.annotation)
        for branch in branches:
            yield from keys(branch, f"{prefix}{name}.")
        if not branches:
            default = REQUIRED if field.is_required() else as_yaml(field.default)
            bounds = limits_of(name) if model is Space else bounds_of(field)
            options = [f"`{word}`" for word in literals(field.annotation)]
            yield f"{prefix}{name}", default, (*options, *bounds)
    if model is Space:  # its ranges, once for all searchable keys
        annotations = [field.annotation for field in Space.model_fields.values()]
        for kind in dict.fromkeys(found for one in annotations for found in models_in(one)):
            yield from keys(kind, f"{prefix}KEY.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [word for part in typing.get_args(annotation) for word in literals(part)]


def as_yaml(value: Any) -> Any:
    return [as_yaml(item) for item in value] if isinstance(value, tuple) else value


def bounds_of(field: FieldInfo) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [
        f"{sign} {number(getattr(limit, name))}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]


def limits_of(key: str) -> list[str]:
    kind, low, low_allowed, high, high_allowed = LIMITS[key]
    if kind == "targets":
        return ["`auto`", "`all-linear`"]
    if kind == "scheduler":
        return [f"`{name}`" for name in typing.get_args(Scheduler)]
    return [
        f"{'≥' if low_allowed else '>'} {number(low)}",
        f"{'≤' if high_allowed else '<'} {number(high)}",
    ]


def number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def documented() -> list[tuple[str, Any, str]]:
    """Key, default and type of every row of a table in docs/spec.md that begins with a key."""
    rows = []
    for line in text_of(ROOT / "docs/spec.md").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| `"):
            key, kind, default, _meaning = cells
            value = default
            if default != REQUIRED:
                value = YAML(typ="safe").load(default.strip("`"))
            rows.append((key.strip("`"), value, kind))
    return rows


def test_every_key_of_the_spec_is_documented_with_its_default():
    # As text: True is not 1, and 16 is not 16.0.
    expected = sorted(f"{key} = {default!r}" for key, default, _ in keys())
    assert sorted(f"{key} = {default!r}" for key, default, _ in documented()) == expected


def test_every_option_and_bound_of_a_key_is_documented():
    lacking = [
        f"{key}: {word}"
        for key, default, words in keys()
        for word in words
        # A key of several kinds of source or range has several rows; the one with its options.
        if not any(
            word in kind for name, value, kind in documented() if (name, value) == (key, default)
        )
    ]
    assert lacking == []


# --------------------------------------------------------------------------------------
# Examples, links, commands
# --------------------------------------------------------------------------------------


def specs_in(page: Path) -> list[str]:
    blocks = [block for language, block in FENCE.findall(text_of(page)) if language == "yaml"]
    return [block for block in blocks if re.search(r"^name:", block, re.MULTILINE)]


def test_there_are_examples_to_check():
    assert specs_in(ROOT / "README.md")
    assert specs_in(ROOT / "docs/spec.md")


@each_page
def test_every_spec_that_is_shown_is_valid(page, tmp_path):
    for block in specs_in(page):
        spec = tmp_path / "shown.yaml"
        spec.write_text(block, encoding="utf-8")
        load_spec(spec, environment={"LORASWEEP_DATA": "/data"})


@each_page
def test_every_relative_link_leads_somewhere(page):
    prose = FENCE.sub("", text_of(page))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    broken = []
    for target in targets:
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(page: Path) -> list[list[str]]:
    """Every command line in a code block or in backticks, as words."""
    text = text_of(page)
    lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]
    parts = [part for line in lines for part in re.split(r"&&|;|\| ", line)]
    words = [part.strip().removeprefix("$ ").split() for part in parts]
    return [
        shlex.split(" ".join(found), comments=True) for found in words if found[:1] == ["lorasweep"]
    ]


def options(command: click.Command) -> set[str]:
    own = {word for parameter in command.params for word in parameter.opts}
    return own | {"--help", "-h"}


def all_commands() -> dict[str, click.Command]:
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def test_there_are_commands_to_check():
    # The program's name alone, as in a sentence about where it is installed, is no command.
    called = {words[1] for words in commands_in(ROOT / "README.md") if len(words) > 1}
    assert called == set(all_commands())


@each_page
def test_every_command_and_option_that_is_mentioned_exists(page):
    commands = all_commands()
    unknown = []
    for words in commands_in(page):
        mentioned = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
        if len(words) > 1 and not words[1].startswith("-"):
            known = options(commands[words[1]]) if words[1] in commands else None
        else:
            known = options(group)
        if known is None or mentioned - known:
            unknown.append(" ".join(words))
    assert unknown == []


@each_page
def test_every_option_that_is_mentioned_alone_is_one_of_some_command(page):
    known = set[str]().union(*map(options, all_commands().values()))
    spans = [span for span in SPAN.findall(FENCE.sub("", text_of(page))) if span.startswith("--")]
    assert [span for span in spans if re.split(r"[ =]", span)[0] not in known] == []
