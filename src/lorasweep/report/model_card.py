"""``model_card.md``: what the winner is, in the form that model hubs read."""

from __future__ import annotations

import json
from typing import Any

from lorasweep.evaluation.significance import format_p
from lorasweep.report.findings import Findings
from lorasweep.report.wording import tried


def card(findings: Findings) -> str:
    """Return the card: a YAML head for programs and a page for people."""
    sections = [
        _head(findings),
        f"# {_inline(findings.sweep.name)}",
        findings.conclusion,
        _about(findings),
        _scores(findings),
        _limits(findings),
        _origin(findings),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(findings: Findings) -> str:
    sweep = findings.sweep
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-classification",
        # A JSON string is a YAML string, whatever characters a path or a name holds.
        f"base_model: {json.dumps(sweep.base.get('name', ''))}",
        "tags: [lora, text-classification, lorasweep]",
        "metrics: [accuracy, f1]",
        "---",
    ]
    return "\n".join(lines)


def _about(findings: Findings) -> str:
    sweep = findings.sweep
    facts, labels = sweep.facts, ", ".join(map(_inline, sweep.corpus.label_names))
    rows = [
        f"- Task: {sweep.task} ({labels})",
        f"- Base: {_inline(sweep.base.get('name', ''))}, "
        f"{_inline(sweep.base.get('architecture', ''))}; frozen, with a LoRA adapter of "
        f"{facts.trainable_parameters:,} trained parameters (head included) of "
        f"{facts.all_parameters:,}",
        f"- Data: {_inline(sweep.corpus.name)} from {_inline(sweep.corpus.source)}; "
        f"{len(sweep.corpus.train):,} train and {len(sweep.corpus.validation):,} validation texts",
        f"- Chosen: trial {sweep.best.number} of {tried(sweep)} tried, by validation "
        f"{sweep.objective}",
    ]
    config = findings.configs.get(sweep.best.number, {})
    table = ["", "| setting | value |", "|---|---|"]
    table += [f"| {_inline(key)} | {_cell(value)} |" for key, value in config.items()]
    return "\n".join(["## What it is", "", *rows, *table])


def _scores(findings: Findings) -> str:
    test = findings.test
    if test is None:
        return "## Scores\n\nNo test split was named; only validation scores are known."
    lines = [
        "## Scores",
        "",
        f"On {test.rows:,} test texts. p: McNemar's exact test against the fine-tuned model.",
        "",
        "| model | accuracy | F1 | F1 macro | p |",
        "|---|---|---|---|---|",
        f"| fine-tuned | {_three(test.metrics)} | |",
    ]
    lines += [
        f"| {_inline(one.name)} | {_three(one.metrics)} | {format_p(one.mcnemar.p_value)} |"
        for one in test.comparisons.values()
    ]
    lines += ["", "| label | precision | recall | F1 | texts |", "|---|---|---|---|---|"]
    lines += [
        f"| {_inline(one.name)} | {one.precision:.4f} | {one.recall:.4f} | {one.f1:.4f} "
        f"| {one.support:,} |"
        for one in test.detail.per_class
    ]
    return "\n".join(lines)


def _limits(findings: Findings) -> str:
    told = list(findings.cautions)
    if findings.test is not None:
        told += findings.test.errors.suggestions
    if not told:
        return ""
    return "\n".join(["## Limits", "", *(f"- {_inline(sentence)}" for sentence in told)])


def _origin(findings: Findings) -> str:
    sweep = findings.sweep
    rows = [
        ("spec", sweep.spec_fingerprint),
        ("data", sweep.corpus.fingerprint),
        ("base", sweep.base.get("digest", "")),
        *((f"{name} seed", str(seed)) for name, seed in sweep.seeds.items()),
    ]
    return "\n".join(
        ["## Where it comes from", "", *(f"- {key}: `{value}`" for key, value in rows)]
    )


def _three(metrics: Any) -> str:
    return " | ".join(f"{metrics[key]:.4f}" for key in ("accuracy", "f1", "f1_macro"))


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _inline(" ".join(map(str, value)) if isinstance(value, list | tuple) else text)


def _inline(text: str) -> str:
    """Return one line that neither ends a table's cell nor starts markup."""
    line = " ".join(text.split())
    for mark in "\\`*_|<>[]":
        line = line.replace(mark, f"\\{mark}")
    return line
