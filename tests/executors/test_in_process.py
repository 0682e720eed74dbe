import json
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from filelock import Timeout

from lorasweep import load_spec
from lorasweep.core.errors import ConflictError, ModelError, StorageError
from lorasweep.core.paths import sweep_paths
from lorasweep.core.plans import AdapterPlan, LargestTrial
from lorasweep.engines import packed
from lorasweep.engines.packed import PackedEngine
from lorasweep.engines.trainer import TrainerEngine
from lorasweep.executors import in_process
from lorasweep.executors.in_process import choose_engine, open_sweep, useful_lanes
from lorasweep.model.packed_check import PROVEN, PackedCheck
from lorasweep.sweep.prepare import check_storage, prepare


def test_the_lock_dies_with_its_holder_and_names_it_meanwhile(small_sweep):
    spec = load_spec(small_sweep)
    code = (
        "import sys, time; from lorasweep import load_spec\n"
        "from lorasweep.executors.in_process import open_sweep\n"
        "with open_sweep(load_spec(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(small_sweep)],
        cwd=small_sweep.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(ConflictError, match=f"process {holder.pid} on"), open_sweep(spec):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with open_sweep(spec) as sweep:
        owner = json.loads((sweep.prepared.paths.sweep / "owner.json").read_text())
        assert owner["pid"] == os.getpid()


def test_a_holder_that_cannot_be_noted_is_a_sentence_and_holds_nothing(small_sweep):
    spec = load_spec(small_sweep)
    owner = sweep_paths(spec.output, spec.name).sweep / "owner.json"
    owner.mkdir(parents=True)
    with pytest.raises(StorageError, match="the name of the process can't be written"):
        open_sweep(spec).__enter__()
    owner.rmdir()
    with open_sweep(spec):
        assert owner.is_file()


def test_a_lock_of_somebody_else_is_a_sentence(small_sweep, monkeypatch):
    def refuse(self, **arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(in_process.FileLock, "acquire", refuse)
    with (
        pytest.raises(StorageError, match="can't be locked: Permission denied"),
        open_sweep(load_spec(small_sweep)),
    ):
        pass


def test_another_lock_that_is_waited_for_in_vain_is_not_taken_for_the_sweeps(small_sweep):
    with pytest.raises(Timeout, match="of a cache"), open_sweep(load_spec(small_sweep)):
        raise Timeout("of a cache")


def test_the_handler_of_a_kill_signal_is_put_back(small_sweep):
    before = signal.getsignal(signal.SIGTERM)
    with open_sweep(load_spec(small_sweep)):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_nearly_full_disk_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 5 * 2**20))
    with pytest.raises(StorageError, match="only 5 MiB are free"):
        check_storage(sweep_paths(str(tmp_path), "s"))


def test_a_disk_that_takes_no_more_is_refused(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        check_storage(sweep_paths(str(tmp_path), "s"))
    assert list((tmp_path / "sweeps/s").iterdir()) == []


def test_a_read_only_folder_is_refused():
    with pytest.raises(StorageError, match="can't be written"):
        check_storage(sweep_paths("/proc/nowhere", "s"))


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "sweeps").write_text("mine", encoding="utf-8")
    with pytest.raises(StorageError, match="can't be written"):
        check_storage(sweep_paths(str(tmp_path), "s"))
    assert (tmp_path / "sweeps").read_text(encoding="utf-8") == "mine"


def prepared(spec_file, *overrides):
    spec = load_spec(spec_file, overrides)
    paths = sweep_paths(spec.output, spec.name)
    return prepare(spec, paths, lambda event: None)


@pytest.fixture
def choose_on(monkeypatch):
    """``choose_on("cuda")``: have the choice see that device; engines run where they can."""

    def make(device):
        monkeypatch.setattr(in_process, "pick_device", lambda name: torch.device(device))

    return make


def test_the_engine_is_the_one_that_the_spec_names(small_sweep):
    engine, why = choose_engine(prepared(small_sweep, "engine=trainer"))
    assert (type(engine), why) == (TrainerEngine, "trainer")
    engine, why = choose_engine(prepared(small_sweep, "engine=packed", "lanes=3"))
    assert type(engine) is PackedEngine
    # What a lane takes is measured also where the spec says how many there are.
    assert re.fullmatch(r"packed, 3 lanes, about \d+(\.\d)? MiB each", why)
    assert engine.use.bytes_per_lane > 10_000


def test_the_engine_knows_the_most_that_the_spec_may_ask_for(small_sweep):
    ready = prepared(
        small_sweep,
        "engine=packed",
        "lanes=2",
        "search.space.batch_size={choices: [4, 24]}",
        "search.space.rank={low: 2, high: 12}",
        "lora.dropout=0.25",
        "lora.targets=all-linear",
    )
    engine, _ = choose_engine(ready)
    most = AdapterPlan(12, 12.0, 0.25, ("all-linear",))
    assert engine.settings.largest == LargestTrial(24, (most,))
    taken = engine.use.bytes_per_lane
    # It is measured with them, not only told.
    assert taken > choose_engine(prepared(small_sweep, "engine=packed"))[0].use.bytes_per_lane


def test_auto_is_the_default_and_says_why_it_trains_one_by_one(
    small_sweep, tiny_base_folder, choose_on
):
    choose_on("cpu")
    for overrides, reason in (
        (["search.trials=1"], "trainer (there is only one trial)"),
        (["lanes=1", "search.trials=30"], "trainer (the spec says lanes: 1)"),
        ([], "trainer (3 trials are too few to train any at once: tpe learns from each)"),
    ):
        engine, why = choose_engine(prepared(small_sweep, *overrides))
        assert (type(engine), why) == (TrainerEngine, reason)
    xlnet = f"model.name={tiny_base_folder('xlnet')}"
    engine, why = choose_engine(prepared(small_sweep, "lanes=2", xlnet))
    assert type(engine) is TrainerEngine
    assert re.fullmatch(r"trainer \(the packed engine can't carry this xlnet: .+\)", why)
    with pytest.raises(ModelError):
        choose_engine(prepared(small_sweep, "engine=packed", xlnet))


def test_auto_does_not_pack_where_nobody_has_proven_it(small_sweep, choose_on):
    choose_on("cuda:0")
    engine, why = choose_engine(prepared(small_sweep, "search.trials=6"))
    assert type(engine) is TrainerEngine
    assert why == (
        "trainer (the packed engine has not been proven on a GPU yet; engine: packed tries it)"
    )
    # What was asked for is done there, too; and a pack of one would be no use anywhere.
    assert type(choose_engine(prepared(small_sweep, "engine=packed"))[0]) is PackedEngine
    assert choose_engine(prepared(small_sweep))[1].startswith("trainer (3 trials are too few")


def test_auto_does_not_pack_what_no_test_holds_to_a_trainer(small_sweep, choose_on, monkeypatch):
    choose_on("cpu")
    monkeypatch.setattr(in_process, "PROVEN", PROVEN - {"bert"})
    engine, why = choose_engine(prepared(small_sweep, "search.trials=6"))
    assert type(engine) is TrainerEngine
    assert why == (
        "trainer (the packed engine has not been proven with bert yet; engine: packed tries it)"
    )
    assert type(choose_engine(prepared(small_sweep, "engine=packed"))[0]) is PackedEngine


@pytest.mark.parametrize(
    ("overrides", "lanes"),
    [
        (["search.trials=12"], 4),  # tpe: two thirds of the trials know how others ended
        (["search.trials=12", "search.sampler={kind: random}"], 12),
        (["search.trials=12", "lanes=6"], 6),
        (["search.trials=2"], 1),
    ],
)
def test_a_sampler_that_learns_is_left_something_to_learn(small_sweep, overrides, lanes):
    assert useful_lanes(load_spec(small_sweep, overrides)) == lanes


def test_auto_lanes_keep_to_that(small_sweep, choose_on):
    choose_on("cpu")
    engine, why = choose_engine(prepared(small_sweep, "search.trials=6"))  # auto is the default
    assert type(engine) is PackedEngine
    assert why.startswith("packed, 2 lanes, about ")


def test_auto_stays_with_a_pack_where_memory_has_room_for_one_lane(
    small_sweep, choose_on, monkeypatch
):
    """What trials of one study give must not depend on the memory of the hour."""
    choose_on("cpu")
    monkeypatch.setattr(packed, "free_bytes", lambda device: 10_000)
    engine, why = choose_engine(prepared(small_sweep, "search.trials=6"))
    assert type(engine) is PackedEngine
    assert why.startswith("packed, 1 lane, about ")


def test_auto_trains_one_by_one_where_memory_runs_out_while_a_pack_is_built(
    small_sweep, choose_on, monkeypatch
):
    def full(self, pack):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    choose_on("cpu")
    monkeypatch.setattr(PackedCheck, "prove", full)
    engine, why = choose_engine(prepared(small_sweep, "search.trials=6"))
    assert (type(engine), why) == (
        TrainerEngine,
        "trainer (memory ran out while the packed engine was built)",
    )
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        choose_engine(prepared(small_sweep, "engine=packed"))


def test_the_spec_may_ask_for_a_pack_of_one(small_sweep):
    engine, why = choose_engine(prepared(small_sweep, "engine=packed", "lanes=1"))
    assert type(engine) is PackedEngine
    assert why.startswith("packed, 1 lane, about ")


def test_lanes_that_do_not_fit_alone_are_said_without_their_size(small_sweep, monkeypatch):
    def full(self, batch, *, training):
        raise MemoryError

    ready = prepared(small_sweep, "engine=packed", "lanes=2")
    make = PackedEngine.__init__

    def make_then_fill(self, *args, **kwargs):
        make(self, *args, **kwargs)
        monkeypatch.setattr(type(self.model), "forward", full)

    monkeypatch.setattr(PackedEngine, "__init__", make_then_fill)
    assert choose_engine(ready)[1] == "packed, 2 lanes"
