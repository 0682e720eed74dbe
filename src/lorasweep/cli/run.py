"""``lorasweep run``: carry a sweep on to its total, then report."""

from __future__ import annotations

import click

from lorasweep.cli.options import again, read_spec, spec_argument


@click.command("run", short_help="Run a sweep, or go on where it stopped.")
@spec_argument
@click.option("--trials", type=click.IntRange(min=1), help="Trials in all (search.trials).")
@click.option("--quiet", is_flag=True, help="Only warnings, and the result.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
@click.option("--no-report", is_flag=True, help="Leave the test split closed; report later.")
def command(
    spec_file: str,
    overrides: tuple[str, ...],
    trials: int | None,
    quiet: bool,
    as_json: bool,
    no_report: bool,
) -> None:
    """Run SPEC to its total of trials, then open the test split once and report.

    The same command again goes on where it stopped. Ctrl-C is safe at any time.
    """
    if trials is not None:
        overrides = (*overrides, f"search.trials={trials}")
    spec = read_spec(spec_file, overrides)

    from lorasweep.cli.console import open_console

    with open_console(quiet=quiet, as_json=as_json) as console:
        console.say("Loading libraries")
        from lorasweep.api import run_sweep

        result, report = run_sweep(spec, listener=console.listen, report=not no_report)
        if report is None:
            console.result_without_report(again(spec_file, overrides), result)
        else:
            console.result(again(spec_file, overrides), report.finished, report.page)
