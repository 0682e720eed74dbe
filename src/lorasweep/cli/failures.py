"""From an exception to one sentence a problem and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from lorasweep.cli.options import in_shell
from lorasweep.core.errors import InputError, LoraSweepError

INTERRUPTED = 130


def report_failure(error: BaseException, words: Sequence[str]) -> int:
    """Tell a person what went wrong, on stderr, and return the exit code.

    Args:
        error: What left the command.
        words: The command line, to say how to go on.
    """
    debug = bool(os.environ.get("LORASWEEP_DEBUG"))
    if debug and not isinstance(error, click.exceptions.Exit | SystemExit):
        traceback.print_exception(error)
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else 1
        case click.UsageError():
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            return _say(f"{error.format_message().rstrip()}{where}", 2)
        case click.ClickException():
            return _say(error.format_message(), error.exit_code)
        case KeyboardInterrupt() | click.Abort():
            # Only `run` leaves something to go on with; the others are simply over.
            if words and words[0] == "run":
                command = in_shell(("lorasweep", *words))
                return _say(f"stopped. To go on where it stopped: {command}", INTERRUPTED, "")
            return _say("stopped.", INTERRUPTED, "")
        case BrokenPipeError():
            # The reader of our output has gone (`lorasweep predict … | head`). Python would
            # complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        case InputError():
            return _say(str(error), error.exit_code)
        case LoraSweepError():
            return _say(str(error), error.exit_code)
        case _:
            if not debug:
                traceback.print_exception(error)
            return _say("this is a bug in lorasweep; please report it with the lines above.", 1)


def _say(message: str, code: int, prefix: str = "error: ") -> int:
    for line in message.splitlines():
        print(f"{prefix}{line}", file=sys.stderr)
    return code
