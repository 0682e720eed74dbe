"""``lorasweep export``: the winner as a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

import click

from lorasweep.cli.options import read_spec, spec_argument


@click.command("export", short_help="Write the winner as a folder that transformers loads.")
@spec_argument
@click.option(
    "--to",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to make; an unchanged earlier export there is replaced.",
)
def command(spec_file: str, overrides: tuple[str, ...], to: Path) -> None:
    """Merge the best trial's adapter into its base and write the model to a folder."""
    spec = read_spec(spec_file, overrides)

    from lorasweep.cli.console import open_console

    with open_console(quiet=False, as_json=False) as console:
        console.say("Loading libraries")
        from lorasweep.api import export_sweep

        folder = export_sweep(spec, to, listener=console.listen)
    click.echo(f"{folder}")
    click.echo(f"try it: lorasweep predict {folder} 'A sentence to classify.'", err=True)
