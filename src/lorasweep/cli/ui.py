"""``lorasweep ui``: the MLflow UI on a sweep's store."""

from __future__ import annotations

import subprocess

import click

from lorasweep.cli.options import again, read_spec, spec_argument


@click.command("ui", short_help="Open the MLflow UI on this sweep's store.")
@spec_argument
@click.option(
    "--port",
    type=click.IntRange(min=1, max=65535),
    default=5000,
    show_default=True,
    help="Port on 127.0.0.1.",
)
def command(spec_file: str, overrides: tuple[str, ...], port: int) -> None:
    """Serve the MLflow UI for SPEC's store on this machine, until Ctrl-C."""
    spec = read_spec(spec_file, overrides)

    from lorasweep.core.errors import Problem, StorageError
    from lorasweep.core.paths import sweep_paths
    from lorasweep.tracking.store import ui_command
    from lorasweep.tracking.view import view_address
    from lorasweep.tracking.wording import redacted

    if spec.tracking.uri != "sqlite" and spec.tracking.uri.startswith(("http:", "https:")):
        click.echo(f"This sweep is tracked by a server; its UI is at {redacted(spec.tracking.uri)}")
        return
    paths = sweep_paths(spec.output, spec.name)
    if spec.tracking.uri == "sqlite" and not paths.mlflow_database.exists():
        advice = f"Run the sweep first: lorasweep run {again(spec_file, overrides)}"
        raise StorageError(Problem(str(paths.mlflow_database), "does not exist yet", advice))
    uri = paths.tracking_uri(spec.tracking.uri)
    words = ui_command(uri, paths.mlflow_artifacts, port)
    experiment = spec.tracking.experiment or spec.name
    address = view_address(uri, experiment, spec.name, f"http://127.0.0.1:{port}")
    click.echo(f"{spec.name}'s trials, in a few seconds (Ctrl-C ends it): {address}", err=True)
    raise SystemExit(subprocess.run(words, check=False).returncode)
