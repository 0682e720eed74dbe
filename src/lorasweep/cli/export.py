"""``lorasweep export``: the winner as a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

import click

from lorasweep.cli.options import read_spec, spec_argument


@click.command("export", short_help="Write the winner as a folder that transformers loads.")
@spec_argument
@click.option(
    "--to", required=True, type=click.Path(file_okay=False, path_type=Path), help="New folder."
)
def command(spec_file: str, overrides: tuple[str, ...], to: Path) -> None:
    """Merge the best trial's adapter into its base and write the model to a folder."""
    spec = read_spec(spec_file, overrides)

    from lorasweep.cli.console import open_console

    with open_console(quiet=False, as_json=False) as console:
        console.say("Loading libraries")
        from lorasweep.deploy.export import export
        from lorasweep.executors.in_process import must_exist, open_sweep
        from lorasweep.sweep.conclude import winner_of

        must_exist(spec)
        with open_sweep(spec, console.listen) as sweep:
            prepared = sweep.prepared
            best = winner_of(prepared, sweep.study)
            console.say(f"Merging trial {best.number} into {prepared.base.name}")
            manifest = {
                "sweep": spec.name,
                "trial": best.number,
                "run_id": best.run_id,
                "parameters": dict(best.parameters),
                "validation_metrics": dict(best.metrics),
                "seed": best.seed,
                "spec_fingerprint": prepared.fingerprint,
                "data_fingerprint": prepared.corpus.fingerprint,
            }
            folder = export(prepared.base, prepared.paths.adapter(best.number), to, manifest)
    click.echo(f"{folder}")
    click.echo(f"try it: lorasweep predict {folder} 'A sentence to classify.'", err=True)
