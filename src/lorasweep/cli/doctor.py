"""``lorasweep doctor``: what this machine has, and whether what a spec names can be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lorasweep.spec.schema import Spec


@click.command("doctor", short_help="Versions, machine, and reachability of what a spec names.")
@click.argument("spec_file", metavar="[SPEC]", required=False)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="As for run.")
def command(spec_file: str | None, overrides: tuple[str, ...]) -> None:
    """Describe this machine; with SPEC, also check its data, model, store and disk."""
    for name, value in _machine():
        click.echo(f"{name:<14} {value}")
    if spec_file is None:
        return
    from lorasweep.cli.options import read_spec

    spec = read_spec(spec_file, overrides)
    failures = 0
    for name, check in _checks(spec):
        try:
            click.echo(f"{name:<14} ok: {check()}")
        except Exception as error:
            # Whatever goes wrong in one check, the others are still worth knowing.
            failures += 1
            for line in str(error).splitlines() or [type(error).__name__]:
                click.echo(f"{name:<14} FAILED: {line}")
    if failures:
        raise SystemExit(1)


def _machine() -> Iterator[tuple[str, str]]:
    import shutil

    import psutil
    import torch

    from lorasweep.model.kernels import why_no_kernels
    from lorasweep.model.precision import pick_device, resolve
    from lorasweep.model.step_memory import why_no_step_memory
    from lorasweep.tracking.environment import describe

    environment = describe()
    for name, version in environment["versions"].items():
        yield name, str(version)
    yield "python", str(environment["python"])
    yield "platform", str(environment["platform"])
    yield "cores", f"{psutil.cpu_count(logical=False)} ({psutil.cpu_count()} logical)"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        yield "gpu", "none that torch can use"
    native = resolve("auto", pick_device("auto")) == "bf16"
    yield "bf16", "multiplied natively" if native else "not native; training uses fp32"
    missing = why_no_kernels()
    yield "kernels", "compiled for this processor" if missing is None else f"none: {missing}"
    missing = why_no_step_memory()
    yield "allocator", "compiled for this torch" if missing is None else f"torch's own: {missing}"
    yield "disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here"


def _checks(spec: Spec) -> Iterator[tuple[str, Callable[[], str]]]:
    from lorasweep.core.paths import sweep_paths

    paths = sweep_paths(spec.output, spec.name)

    def data() -> str:
        from lorasweep.data.corpus import load_corpus

        corpus = load_corpus(spec.data, spec.seed)
        test = f", {len(corpus.test)} test" if corpus.test else ""
        return f"{len(corpus.train)} train, {len(corpus.validation)} validation{test}"

    def model() -> str:
        from lorasweep.model.adapter import check_targets
        from lorasweep.model.base import open_base
        from lorasweep.spec.resolve import adapters_in

        base = open_base(spec.model, spec.data.labels or ("0", "1"))
        check_targets(base, adapters_in(spec))
        return f"{base.name} ({base.config.model_type}), sha256 {base.digest[:12]}…"

    def store() -> str:
        from lorasweep.tracking.store import answers

        if spec.tracking.uri == "sqlite" and not paths.mlflow_database.exists():
            return f"{paths.mlflow_database} will be made"
        return answers(paths.tracking_uri(spec.tracking.uri))

    def disk() -> str:
        from lorasweep.sweep.prepare import check_storage

        check_storage(paths)
        for folder in (paths.sweep, paths.sweep.parent, paths.root):
            with suppress(OSError):  # what the check has made, unless there is something in it
                folder.rmdir()
        return f"{paths.sweep} can be written"

    yield from {"data": data, "model": model, "tracking": store, "output": disk}.items()
