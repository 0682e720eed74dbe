"""From a YAML file and ``--set`` words to a :class:`Spec`, or to every problem in it at once."""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lorasweep.core.errors import Problem, SpecError
from lorasweep.spec.schema import Spec
from lorasweep.spec.wording import explain

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class SpecSource:
    """The parsed file, able to say where a dotted path stands in it.

    Attributes:
        file: The file as the user named it.
        tree: Plain dicts, lists and scalars.
    """

    def __init__(self, file: str, marked: Any) -> None:
        self.file = file
        self._marked = marked
        self._set: dict[str, str] = {}
        self.tree: Any = _plain(marked)

    def where(self, path: Sequence[str | int]) -> str:
        """``sweeps/x.yaml:12 search.space.rank``, or the ``--set`` that gave the value."""
        dotted = ".".join(map(str, path))
        for key in self._set:
            if dotted == key or dotted.startswith(f"{key}."):
                return f"--set {dotted}"
        line = self._line(path)
        if line is None:
            for key in self._set:
                if key.startswith(f"{dotted}."):
                    return f"--set {key}"
        place = f"{self.file}:{line}" if line else self.file
        return f"{place} {dotted}".rstrip()

    def _line(self, path: Sequence[str | int]) -> int | None:
        """Line of the deepest part of ``path`` that the file contains, counted from 1."""
        node, line = self._marked, None
        for part in path:
            position = getattr(node, "lc", None)
            try:
                if isinstance(node, Mapping) and part in node:
                    line = position.key(part)[0] + 1 if position else line
                    node = node[part]
                elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node):
                    line = position.item(part)[0] + 1 if position else line
                    node = node[part]
                else:
                    break
            except (KeyError, TypeError):
                break
        return line

    def override(self, key: str, value: Any) -> Problem | None:
        """Put ``value`` at the dotted ``key``; the schema judges it later, like the rest."""
        parts = [int(part) if part.isdigit() else part for part in key.split(".")]
        self._set[key] = key
        node = self.tree
        for at, part in enumerate(parts):
            last = at == len(parts) - 1
            fits = isinstance(node, dict) or (
                isinstance(node, list) and isinstance(part, int) and part < len(node)
            )
            if not fits:
                stop = ".".join(map(str, parts[:at]))
                what = f"{stop} is {node!r} and has nothing called {part!r} inside"
                return Problem(f"--set {key}", what)
            if last:
                node[part] = value
            elif isinstance(node, dict):
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
            else:
                node = node[part]
        return None


def load_spec(
    file: str | Path,
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Spec:
    """Read, complete and check a spec.

    Args:
        file: The YAML file.
        overrides: ``KEY=VALUE`` words, dotted keys, values in YAML.
        environment: Where ``${VAR}`` is looked up; None for the process's own.

    Raises:
        SpecError: With every problem that was found, each with its place in the file.
    """
    source = _read(Path(file))
    problems = [problem for word in overrides if (problem := _override(source, word))]
    variables = os.environ if environment is None else environment
    source.tree = _fill_in(source, source.tree, (), variables, problems)
    try:
        spec = Spec.model_validate(source.tree)
    except ValidationError as error:
        problems += _schema_problems(source, error)
        raise SpecError(_in_file_order(problems)) from None
    if problems:
        raise SpecError(_in_file_order(problems))
    return spec


def dump_spec(spec: Spec) -> str:
    """The resolved spec as YAML: every default written out, readable by :func:`load_spec`."""
    buffer = io.StringIO()
    YAML(typ="rt").dump(spec.model_dump(mode="json"), buffer)
    return buffer.getvalue()


def _read(path: Path) -> SpecSource:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SpecError(_missing(path)) from None
    except IsADirectoryError:
        advice = "Name a YAML file inside it."
        raise SpecError(Problem(str(path), "is a folder, not a spec", advice)) from None
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: byte {error.start} can't be decoded"
        raise SpecError(Problem(str(path), what, "Save the file as UTF-8.")) from None
    except OSError as error:
        raise SpecError(Problem(str(path), f"can't be read: {error.strerror}")) from None
    try:
        marked = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        what = " ".join(str(error.problem or error.context).split())
        raise SpecError(Problem(place, f"is not valid YAML: {what}")) from None
    except YAMLError as error:
        what = " ".join(str(error).split())
        raise SpecError(Problem(str(path), f"is not valid YAML: {what}")) from None
    if not isinstance(marked, Mapping):
        what = "must be a mapping of keys such as name, data and search"
        came = "an empty file" if marked is None else f"a {type(_plain(marked)).__name__}"
        advice = "sweeps/quickstart.yaml is a short example."
        raise SpecError(Problem(str(path), f"{what}, got {came}", advice))
    return SpecSource(str(path), marked)


def _missing(path: Path) -> Problem:
    folder = path.parent
    names = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return Problem(str(path), "there is no such file", f"Did you mean {folder / near[0]}?")
    place = "This folder" if folder == Path() else str(folder)
    there = f"{place} holds {', '.join(sorted(names))}." if names else ""
    return Problem(str(path), "there is no such file", there)


def _override(source: SpecSource, word: str) -> Problem | None:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        advice = "For example --set search.trials=3."
        return Problem(f"--set {word}", "must be KEY=VALUE with a dotted key", advice)
    try:
        value = _plain(YAML(typ="rt").load(text)) if text.strip() else None
    except YAMLError:
        return Problem(f"--set {key}", f"{text!r} is not a YAML value", "Quote it.")
    return source.override(key.strip(), value)


def _plain(node: Any) -> Any:
    """Turn ruamel's round-trip nodes into plain dicts, lists and scalars."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_plain(value) for value in node]
    kinds: tuple[type, ...] = (bool, int, float, str)
    for kind in kinds:
        if isinstance(node, kind):
            return kind(node)
    return None if node is None else str(node)


def _fill_in(
    source: SpecSource,
    node: Any,
    path: tuple[str | int, ...],
    environment: Mapping[str, str],
    problems: list[Problem],
) -> Any:
    """Replace ``${VAR}`` and ``${VAR:-default}`` in every text of the tree."""
    if isinstance(node, dict):
        return {
            key: _fill_in(source, value, (*path, key), environment, problems)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [
            _fill_in(source, value, (*path, at), environment, problems)
            for at, value in enumerate(node)
        ]
    if not isinstance(node, str) or "${" not in node:
        return node

    def look_up(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = environment.get(name) or default
        if value is None:
            advice = f"Run `export {name}=…`, or write ${{{name}:-some/default}}."
            what = f"the environment variable {name} is not set, or empty"
            problems.append(Problem(source.where(path), what, advice))
            return match.group(0)
        return value

    return _VARIABLE.sub(look_up, node)


def _schema_problems(source: SpecSource, error: ValidationError) -> list[Problem]:
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _path_in_file(source.tree, detail)
        if detail["type"] == "too_short" and len(detail["input"]) > 0:
            continue  # its items are wrong, and each of them is told already
        what, advice = explain(detail, path, source.tree)
        problem = Problem(source.where(path), what, advice)
        # A union reports once per branch; a person needs the sentence once.
        found.setdefault(str(problem), problem)
    return list(found.values())


def _in_file_order(problems: Iterable[Problem]) -> list[Problem]:
    def line(problem: Problem) -> int:
        match = re.search(r":(\d+)( |$)", problem.where)
        return int(match.group(1)) if match else 0

    return sorted(problems, key=line)


def _path_in_file(tree: Any, detail: ErrorDetails) -> tuple[str | int, ...]:
    """Drop from pydantic's location what the file doesn't contain: the names of union branches."""
    path: list[str | int] = []
    node = tree
    for at, part in enumerate(detail["loc"]):
        inside_mapping = isinstance(node, dict) and part in node
        inside_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if inside_mapping or inside_list:
            path.append(part)
            node = node[part]
        elif at == len(detail["loc"]) - 1 and detail["type"] == "missing":
            path.append(part)
    return tuple(path)
