"""Arguments and options that several commands share."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lorasweep.spec.schema import Spec


def spec_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``SPEC`` and ``--set KEY=VALUE`` to a command."""
    command = click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        help="Override a value of the spec, e.g. --set search.trials=3. Repeatable.",
    )(command)
    return click.argument("spec_file", metavar="SPEC")(command)


def again(spec_file: str, overrides: tuple[str, ...]) -> str:
    """The words that name the same sweep on the next command line, quoted for a shell."""
    words = [spec_file]
    for override in overrides:
        words += ["--set", override]
    return in_shell(words)


def in_shell(words: Sequence[str]) -> str:
    """Words of a command line as a shell takes them, but without a store's password.

    >>> in_shell(["x.yaml", "--set", "tracking.uri=http://me:secret@hub"])
    "x.yaml --set 'tracking.uri=http://me:***@hub'"
    """
    from lorasweep.tracking.wording import redacted

    return shlex.join(redacted(word) if "://" in word else word for word in words)


def read_spec(spec_file: str, overrides: tuple[str, ...]) -> Spec:
    """Load the spec that the command line names."""
    from lorasweep.spec.loader import load_spec

    return load_spec(spec_file, overrides)
