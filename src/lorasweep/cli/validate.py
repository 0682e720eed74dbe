"""``lorasweep validate``: every error at once, and nothing written."""

from __future__ import annotations

import click

from lorasweep.cli.options import read_spec, spec_argument


@click.command("validate", short_help="Check the spec, then its data and model.")
@spec_argument
@click.option("--spec-only", is_flag=True, help="Read neither data nor model.")
def command(spec_file: str, overrides: tuple[str, ...], spec_only: bool) -> None:
    """Check SPEC, its search, its data and that its model is there; nothing is trained.

    A model or data set from the Hub is fetched for that.

    Whether LoRA's targets fit the model is found by `run` and `doctor`, which load it.
    """
    spec = read_spec(spec_file, overrides)

    from lorasweep.core.errors import InputError, Problem
    from lorasweep.search.samplers import check

    problems: list[Problem] = list(check(spec.search, spec.lora.rank))
    sentences: tuple[str, ...] = ()
    if not spec_only:
        from lorasweep.data.corpus import load_corpus
        from lorasweep.data.summary import facts, leaks, missing_labels
        from lorasweep.model.files import locate

        try:
            corpus = load_corpus(spec.data, spec.seed)
            sentences = (*facts(corpus), *leaks(corpus), *missing_labels(corpus))
        except InputError as error:
            problems += error.problems
        try:
            locate(spec.model)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    click.echo(f"{spec_file}: valid, {spec.search.trials} trials")
    for sentence in sentences:
        click.echo(sentence)
