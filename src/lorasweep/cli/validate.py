"""``lorasweep validate``: every error at once, and nothing written."""

from __future__ import annotations

import click

from lorasweep.cli.options import read_spec, spec_argument


@click.command("validate", short_help="Check a spec and its data; every error at once.")
@spec_argument
@click.option("--spec-only", is_flag=True, help="Don't read the data.")
def command(spec_file: str, overrides: tuple[str, ...], spec_only: bool) -> None:
    """Check SPEC, and read its data with all checks; nothing is trained or written."""
    spec = read_spec(spec_file, overrides)
    click.echo(f"{spec_file}: the spec is valid ({spec.search.trials} trials)")
    if spec_only:
        return
    from lorasweep.data.corpus import load_corpus

    corpus = load_corpus(spec.data, spec.seed)
    splits = [corpus.train, corpus.validation] + ([corpus.test] if corpus.test else [])
    rows = ", ".join(f"{len(split)} {split.name}" for split in splits)
    click.echo(f"{corpus.name}: {rows}; labels {', '.join(corpus.label_names)}")
    for report in corpus.cleaning:
        for note in report.notes:
            click.echo(f"note: {report.split}: {note}")
