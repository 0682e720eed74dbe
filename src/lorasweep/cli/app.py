"""The command ``lorasweep``: the group, what all commands share, and the way out."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from lorasweep.cli.failures import report_failure

# name -> module; a module is imported when its command is asked for, or listed in --help. None of
# them imports anything heavy at its top, which is what keeps --help fast.
_COMMANDS = {
    "validate": "lorasweep.cli.validate",
    "run": "lorasweep.cli.run",
    "status": "lorasweep.cli.status",
    "report": "lorasweep.cli.report",
    "export": "lorasweep.cli.export",
    "predict": "lorasweep.cli.predict",
    "ui": "lorasweep.cli.ui",
    "doctor": "lorasweep.cli.doctor",
}


class LazyGroup(click.Group):
    """Loads a command's module only when the command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            ctx.fail(f"there is no command {args[0]!r}.{hint} Known: {', '.join(_COMMANDS)}.")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorasweep", message="%(package)s %(version)s")
def group() -> None:
    """Sweep the hyperparameters of a LoRA text classifier, and compare honestly.

    Start with: lorasweep run sweeps/quickstart.yaml
    """
    # Libraries read these when they are first imported, which happens inside the commands.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would warn
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 (failed), 2 (bad input) or 130."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        group.main(args=words, prog_name="lorasweep", standalone_mode=False)
    except BaseException as error:
        return report_failure(error, words)
    return 0
