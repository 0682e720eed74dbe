"""``lorasweep report``: the documents of a sweep, written again from what is stored."""

from __future__ import annotations

from pathlib import Path

import click

from lorasweep.cli.options import again, read_spec, spec_argument


@click.command("report", short_help="Write the report: JSON, figures and a page to read.")
@spec_argument
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to, instead of the sweep's own.",
)
@click.option("--quiet", is_flag=True, help="Only warnings, and the result.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def command(
    spec_file: str, overrides: tuple[str, ...], out: Path | None, quiet: bool, as_json: bool
) -> None:
    """Score the winner of SPEC on the test split, unless that was done, and write the report."""
    spec = read_spec(spec_file, overrides)

    from lorasweep.cli.console import open_console

    with open_console(quiet=quiet, as_json=as_json) as console:
        console.say("Loading libraries")
        from lorasweep.api import report_sweep

        report = report_sweep(spec, out=out, listener=console.listen)
        console.result(again(spec_file, overrides), report.finished, report.page)
