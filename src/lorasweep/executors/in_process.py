"""Runs a sweep in this process: one command at a time per sweep, and a kill ends it cleanly."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from filelock import FileLock, Timeout

from lorasweep.core.engine_use import EngineUse, in_mebibytes
from lorasweep.core.errors import (
    ConflictError,
    ModelError,
    NothingToReportError,
    Problem,
    StorageError,
)
from lorasweep.core.outcomes import FinishedSweep
from lorasweep.core.paths import SweepPaths, sweep_paths
from lorasweep.core.protocols import Engine
from lorasweep.engines.engine_use import use_of
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.model.checkpoint import storing
from lorasweep.model.heap import give_freed_memory_back
from lorasweep.model.packed_check import PROVEN
from lorasweep.model.precision import pick_device
from lorasweep.model.torch_errors import is_out_of_memory
from lorasweep.search.study import Study
from lorasweep.spec.resolve import engine_settings
from lorasweep.spec.schema import Spec
from lorasweep.sweep import engine_ledger
from lorasweep.sweep.conclude import conclude
from lorasweep.sweep.events import Listener, Said, Warned, nobody
from lorasweep.sweep.prepare import Prepared, check_storage, prepare
from lorasweep.sweep.runs import parent_run
from lorasweep.sweep.worker import SweepResult, Worker
from lorasweep.tracking.mlflow_tracker import MlflowTracker


@dataclass(frozen=True, slots=True)
class OpenSweep:
    """A sweep with its data, study and store at hand, held by this process."""

    prepared: Prepared
    study: Study
    tracker: MlflowTracker


@contextmanager
def open_sweep(spec: Spec, listener: Listener = nobody) -> Iterator[OpenSweep]:
    """Check everything, then hold the sweep for as long as the block runs.

    Raises:
        InputError: For anything in the spec, data, model, store or disk that can't be used.
        ConflictError: When another process holds it, or its study is of another spec.
    """
    paths = sweep_paths(spec.output, spec.name)
    check_storage(paths)
    with _held(paths), _termination_as_interrupt():
        prepared = prepare(spec, paths, listener)
        tracker = MlflowTracker.open(
            paths.tracking_uri(spec.tracking.uri),
            spec.tracking.experiment or spec.name,
            paths.mlflow_artifacts if spec.tracking.uri == "sqlite" else None,
        )
        study = Study.open(
            paths.optuna_database,
            spec.name,
            spec.search,
            spec.seed,
            prepared.identity,
            rank=spec.lora.rank,
        )
        yield OpenSweep(prepared, study, tracker)


def train(sweep: OpenSweep, listener: Listener = nobody) -> SweepResult:
    """Carry the sweep on to its total, and keep how it was trained."""
    engine, reason = choose_engine(sweep.prepared)
    worker = Worker(sweep.prepared, engine, reason, sweep.study, sweep.tracker, listener)
    known = len(sweep.study.records())

    def keep_use() -> EngineUse:
        use = use_of(engine, reason, len(sweep.study.records()) - known)
        if use.trials:
            engine_ledger.keep(sweep.prepared.paths.engine, use, sweep.study.id)
        return use

    try:
        result = worker.run()
    except BaseException:
        # A report speaks of all that trained. But what cut the command off is to be told, not
        # that the disk, which may be the reason, refuses this as well.
        with suppress(StorageError):
            keep_use()
        raise
    give_freed_memory_back()  # no step is to come that would want it
    use = keep_use()
    if use.trials:
        sweep.tracker.log_metrics(result.run_id, engine_ledger.metrics(use), step=0)
        if told := engine_ledger.sentence(use):
            listener(Said(told))
    return result


def finish(sweep: OpenSweep, listener: Listener = nobody) -> FinishedSweep:
    """Score the winner on the test split (once) and gather what a report needs."""
    if left := sweep.study.remaining:
        listener(
            Warned(
                f"{left} of {sweep.prepared.spec.search.trials} trials are still to come; if one "
                "of them wins, the test split will have to be opened again."
            )
        )
    parent = parent_run(sweep.prepared, sweep.study, sweep.tracker)
    return conclude(sweep.prepared, sweep.study, sweep.tracker, parent, listener)


def choose_engine(prepared: Prepared) -> tuple[Engine, str]:
    """The engine that the spec asks for, and why it is this one.

    Raises:
        ModelError: When the packed engine is asked for and can't carry the base, or the device
            isn't there.
    """
    spec, settings = prepared.spec, engine_settings(prepared.spec)
    parts = (prepared.base, prepared.train, prepared.validation, settings)
    if spec.engine == "trainer":
        return TrainerEngine(*parts), "trainer"
    most = useful_lanes(spec)
    if spec.engine == "auto" and (why := _why_not_packed(spec, most, settings.device)):
        return TrainerEngine(*parts), f"trainer ({why})"

    def pack() -> PackedEngine:
        return PackedEngine(*parts, lanes=spec.lanes, most=most)

    packed = pack() if spec.engine == "packed" else _packed_or_why_not(pack, prepared)
    if isinstance(packed, PackedEngine):
        return packed, _pack_in_words(packed)
    gc.collect()  # a pack's modules refer to one another
    give_freed_memory_back()  # what one that isn't used had taken
    return TrainerEngine(*parts), f"trainer ({packed})"


def _packed_or_why_not(pack: Callable[[], PackedEngine], prepared: Prepared) -> PackedEngine | str:
    """Build a pack for ``auto``; or, where that can't be or is no use, why."""
    try:
        packed = pack()
        if (kind := prepared.base.architecture) not in PROVEN:
            return f"the packed engine has not been proven with {kind} yet; engine: packed tries it"
        return packed
    except ModelError as error:
        return error.problems[0].what
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return "memory ran out while the packed engine was built"


def _pack_in_words(packed: PackedEngine) -> str:
    """``packed, 8 lanes, about 143 MiB each``; measured here where the spec fixes the number."""
    lanes = packed.capacity
    told = f"packed, {lanes} lane{'' if lanes == 1 else 's'}"
    needed = packed.use.bytes_per_lane or packed.measure_lane()
    if needed is None:
        return told
    return f"{told}, about {in_mebibytes(needed)} each"


def _why_not_packed(spec: Spec, most: int, device: str) -> str | None:
    """Why ``auto`` doesn't even try the packed engine; None where it does.

    Args:
        spec: The spec.
        most: Lanes that are of any use.
        device: As the engines' settings have it.

    Raises:
        ModelError: The device isn't there.
    """
    if most == 1:
        return _why_one_lane(spec)
    if pick_device(device).type != "cpu":
        # Equal results and less time were shown on CPUs alone: see docs/decisions/0007.
        return "the packed engine has not been proven on a GPU yet; engine: packed tries it"
    return None


def _why_one_lane(spec: Spec) -> str:
    """Why a pack would train one trial at a time, and so is no use."""
    if spec.lanes == 1:
        return "the spec says lanes: 1"
    trials, kind = spec.search.trials, spec.search.sampler.kind
    if trials == 1:
        return "there is only one trial"
    return f"{trials} trials are too few to train any at once: {kind} learns from each"


def useful_lanes(spec: Spec) -> int:
    """Lanes beyond which a pack wins nothing, or the sampler learns nothing.

    A sampler that models earlier results is asked blindly for every trial that starts before
    any has ended; a third of the trials may, rounded up.
    """
    if spec.lanes != "auto":
        return spec.lanes
    if spec.search.sampler.kind in ("tpe", "gp", "cmaes"):
        return -(-spec.search.trials // 3)
    return spec.search.trials


def must_exist(spec: Spec) -> None:
    """Refuse to go on for a sweep that was never run, before anything is loaded or created.

    Raises:
        NothingToReportError: When the study isn't there.
    """
    paths = sweep_paths(spec.output, spec.name)
    if Study.peek(paths.optuna_database, spec.name) is None:
        raise NothingToReportError(
            f"{spec.name} has not been run in {paths.root}. Start it with lorasweep run."
        )


@contextmanager
def _held(paths: SweepPaths) -> Iterator[None]:
    lock = FileLock(paths.lock)
    owner = paths.sweep / "owner.json"
    try:
        lock.acquire(timeout=0)  # the kernel frees it when its holder dies, however it dies
    except Timeout:
        try:
            who = json.loads(owner.read_text())
            holder = f"process {who['pid']} on {who['host']}"
        except (OSError, ValueError, KeyError):
            holder = "another process"
        what = f"is being worked on by {holder}"
        advice = "Wait for it, stop it, or give this spec another name."
        raise ConflictError(Problem(f"sweep {paths.name}", what, advice)) from None
    except OSError as error:
        what = f"can't be locked: {error.strerror or error}"
        advice = "Have its owner give you the right to write it, or choose another output folder."
        raise StorageError(Problem(str(paths.lock), what, advice)) from None
    try:
        with storing(owner, "the name of the process"):
            owner.write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
        yield
    finally:
        lock.release()


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a sweep the way Ctrl-C does: trials marked, database closed."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # only the main thread may set handlers; elsewhere the caller owns them
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
