"""``lorasweep status``: trials by state, the best so far, where things lie."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lorasweep.cli.options import again, read_spec, spec_argument

if TYPE_CHECKING:
    from lorasweep.core.outcomes import TrialRecord
    from lorasweep.search.ledger import Ledger


@click.command("status", short_help="Trials by state, the best so far, where things lie.")
@spec_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(spec_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show how SPEC's sweep stands; reads only."""
    spec = read_spec(spec_file, overrides)

    from lorasweep.cli.console import print_json, print_trials
    from lorasweep.core.outcomes import TrialState
    from lorasweep.core.paths import sweep_paths
    from lorasweep.search.study import Study, reachable

    paths = sweep_paths(spec.output, spec.name)
    study = Study.peek(paths.optuna_database, spec.name)
    records = _as_they_are(study, time.time()) if study else ()
    best = study.best() if study else None
    counts = Counter(record.state for record in records)
    done = sum(counts[state] for state in TrialState if state.is_final)
    done -= counts[TrialState.INTERRUPTED]
    report = paths.report / "index.html"
    if as_json:
        print_json(
            {
                "name": spec.name,
                "trials": spec.search.trials,
                "states": {state.value: counts[state] for state in TrialState},
                "best": best,
                "folder": str(paths.sweep),
                "report": str(report) if report.exists() else None,
            }
        )
        return
    if study is None:
        click.echo(
            f"{spec.name}: not started. Start it with: lorasweep run {again(spec_file, overrides)}"
        )
        return
    facts = {
        record.number: study.facts(record.number)
        for record in records
        if record.state is TrialState.RUNNING
    }
    lanes = {number: found.lane for number, found in facts.items() if found}
    print_trials(records, best, spec.search.objective, lanes)
    states = ", ".join(f"{count} {state.value}" for state, count in sorted(counts.items()))
    click.echo(f"{spec.name}: {done} of {spec.search.trials} trials done ({states})")
    click.echo(f"folder: {paths.sweep}")
    if report.exists():
        click.echo(f"report: {report}")
    if done < reachable(spec.search):
        click.echo(f"go on: lorasweep run {again(spec_file, overrides)}")
    elif not report.exists():
        click.echo(f"next: lorasweep report {again(spec_file, overrides)}")


def _as_they_are(study: Ledger, now: float) -> tuple[TrialRecord, ...]:
    """The study's trials; one whose process was killed is interrupted, though nobody wrote it."""
    from lorasweep.core.outcomes import TrialState

    whys = study.abandoned(now)
    return tuple(
        replace(record, state=TrialState.INTERRUPTED, reason=whys[record.number])
        if record.number in whys and record.state is TrialState.RUNNING
        else record
        for record in study.records()
    )
