"""The allocator of CPU tensors: what it serves, how it shares out, what it gives back."""

import gc
import itertools
import logging
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from lorasweep.model import kernel_build
from lorasweep.model import step_memory as module
from lorasweep.model.heap import keep_freed_memory
from lorasweep.model.kernel_build import KernelBuildError, built_step_memory
from lorasweep.model.step_memory import StepMemory, step_memory

MIB = 1 << 20


@pytest.fixture
def memory() -> StepMemory:
    found = step_memory()
    assert found is not None, module.why_no_step_memory()
    gc.collect()
    return found


def blank(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def done_alone(script: str) -> str:
    """Run a script in a process of its own, where no other test has been; return what it says."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a forked child can't start OpenMP's again
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_large_tensors_are_its_and_small_ones_are_torchs(memory):
    before = memory.taken
    small = blank(memory.least - 1)
    assert memory.taken == before
    large = blank(memory.least)
    assert memory.taken == before + memory.least
    odd = blank(memory.least + 1)
    assert memory.taken == before + 2 * memory.least + os.sysconf("SC_PAGE_SIZE")
    del small, large, odd
    assert memory.taken == before


def test_tensors_start_where_wide_vectors_want_them(memory):
    kept = [blank(memory.least + 77 * n) for n in range(20)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)


def test_the_peak_is_that_since_it_was_last_asked(memory):
    memory.peak()
    before = memory.taken
    some = blank(8 * MIB)
    del some
    assert memory.peak() == before + 8 * MIB
    assert memory.peak() == before


def test_what_many_sizes_leave_serves_others():
    """Freed neighbours grow together, so pieces of ever other sizes need no more room."""
    assert (
        done_alone(
            """
import random, torch
from lorasweep.model.step_memory import step_memory
memory, draw = step_memory(), random.Random(0)
def blank(size):
    return torch.empty(size, dtype=torch.uint8)
def step():
    kept = [blank(draw.randrange(memory.least, 4 << 20)) for _ in range(60)]
    draw.shuffle(kept)
    while kept:
        kept.pop()
for _ in range(5):
    step()
grown = memory.grown
assert grown < 320 << 20, grown  # a step holds 120 MiB on average
for _ in range(200):
    step()
assert memory.grown == grown
whole = blank(100 << 20)  # none of the pieces was as large
assert memory.grown == grown
print("done")
"""
        )
        == "done"
    )


def test_no_two_tensors_share_a_byte_whatever_comes_and_goes(memory):
    draw = random.Random(1)
    kept: list[torch.Tensor] = []
    for number in range(3000):
        if kept and draw.random() < 0.5:
            tensor = kept.pop(draw.randrange(len(kept)))
            assert (tensor == tensor[0]).all()
        else:
            size = draw.choice([100, memory.least, 20_001, 200_000, 1_000_003])
            kept.append(blank(size).fill_(number % 251))
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in kept)
    assert all(at + size <= other for (at, size), (other, _) in itertools.pairwise(places))
    assert all((tensor == tensor[0]).all() for tensor in kept)


def test_threads_may_all_allocate_at_once(memory):
    before, wrong = memory.taken, []

    def work(number: int) -> None:
        draw = random.Random(number)
        kept: list[torch.Tensor] = []
        for _ in range(500):
            kept.append(blank(draw.randrange(memory.least, MIB)).fill_(number))
            if len(kept) > 5 and not (kept.pop(0) == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert memory.taken == before


def test_freed_memory_stays_until_it_is_wanted_back():
    assert (
        done_alone(
            """
import torch
from lorasweep.model.heap import give_freed_memory_back
from lorasweep.model.step_memory import step_memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
memory = step_memory()
kept = torch.full((1 << 20,), 7, dtype=torch.uint8)
before = resident()
first, fence = torch.full((200 << 20,), 1, dtype=torch.uint8), torch.ones(1 << 20)
assert resident() > before + (190 << 20)
at = first.data_ptr()
del first
assert resident() > before + (190 << 20)
again = torch.empty(200 << 20, dtype=torch.uint8)
assert again.data_ptr() == at and (again == 1).all()
del again
give_freed_memory_back()
assert resident() < before + (40 << 20)
late = torch.empty(200 << 20, dtype=torch.uint8)
assert late.data_ptr() == at
assert (late == 0).all()  # as fresh pages are
assert (kept == 7).all() and (fence == 1).all()
del late, fence
give_freed_memory_back()
assert memory.grown < 64 << 20  # what is free at the end counts no more
assert (torch.ones(50 << 20, dtype=torch.uint8) == 1).all()
print("done")
"""
        )
        == "done"
    )


def test_what_comes_from_elsewhere_and_what_goes_elsewhere():
    """Tensors of torch's own allocator and oneDNN's buffers may be freed after it came."""
    assert (
        done_alone(
            """
import torch
from lorasweep.model.step_memory import step_memory
early = [torch.randn(1000, 1000) for _ in range(3)]
weight = torch.randn(512, 512, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.randn(300, 512, dtype=torch.bfloat16), weight)
memory = step_memory()
early[0].resize_(2000, 1000)
assert early[0].untyped_storage().nbytes() == 8_000_000
del early
torch.nn.functional.linear(torch.randn(300, 512, dtype=torch.bfloat16), weight)
with torch.profiler.profile(profile_memory=True) as seen:
    large = torch.empty(10 << 20, dtype=torch.uint8)
assert max(event.self_cpu_memory_usage for event in seen.events()) == 10 << 20
copied = large.fill_(3).clone()
del large
assert (copied == 3).all()
storage = copied.untyped_storage()
try:
    storage.resize_(-1)
except RuntimeError:
    pass
else:
    raise AssertionError("a storage of -1 bytes was made")
assert (copied == 3).all()
print("done")
"""
        )
        == "done"
    )


def test_children_may_be_forked_while_other_threads_allocate():
    assert (
        done_alone(
            """
import os, signal, threading, warnings
warnings.simplefilter("ignore")
import torch
from lorasweep.model.step_memory import step_memory
memory = step_memory()
going = True
def allocate():
    while going:
        torch.empty(1 << 20, dtype=torch.uint8)
threads = [threading.Thread(target=allocate, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for a lock for ever is killed, and seen
        tensor = torch.empty(1 << 20, dtype=torch.uint8)
        os._exit(0 if memory.taken >= 1 << 20 else 1)
    assert os.waitpid(child, 0)[1] == 0
going = False
for thread in threads:
    thread.join()
print("done")
"""
        )
        == "done"
    )


def test_it_is_installed_once_however_often_it_is_asked_for():
    assert (
        done_alone(
            """
import threading, torch
from lorasweep.model import step_memory as module
found = []
threads = [threading.Thread(target=lambda: found.append(module.step_memory())) for _ in range(4)]
for thread in threads:
    thread.start()
kept = [torch.full((1 << 20,), n, dtype=torch.uint8) for n in range(50)]
for thread in threads:
    thread.join()
module._installed.cache_clear()
module.step_memory()
kept += [torch.full((1 << 20,), n, dtype=torch.uint8) for n in range(50, 100)]
assert len(found) == 4 and None not in found
assert all((tensor == n).all() for n, tensor in enumerate(kept))
import os
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
del kept
print("done")
"""
        )
        == "done"
    )


def test_arrays_keep_what_they_share_with_a_tensor(memory):
    before = memory.taken
    array = torch.full((MIB,), 5, dtype=torch.uint8).numpy()
    gc.collect()
    assert memory.taken == before + MIB
    assert (array == 5).all()
    assert (torch.from_numpy(np.zeros(MIB)) == 0).all()
    del array
    gc.collect()
    assert memory.taken == before


def test_what_is_free_at_the_end_is_charged_to_nobody():
    """A limit leaves room for exactly what is wanted, and what was given back leaves it again."""
    assert (
        done_alone(
            """
import resource, torch
from lorasweep.model.step_memory import step_memory
def charged():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
memory = step_memory()
memory.give_back()
before = charged()
resource.setrlimit(resource.RLIMIT_DATA, (before + (100 << 20),) * 2)
for _ in range(2):
    large = torch.empty(90 << 20, dtype=torch.uint8)  # twice 64 MiB would be too much
    assert memory.taken >= 90 << 20
    assert charged() >= before + (90 << 20)
    del large
    memory.give_back()
    assert charged() < before + (8 << 20)
print("done")
"""
        )
        == "done"
    )


def test_giving_back_installs_nothing():
    assert (
        done_alone(
            """
import torch
from lorasweep.model.heap import give_freed_memory_back
from lorasweep.model.step_memory import installed_step_memory, step_memory
give_freed_memory_back()
assert installed_step_memory() is None
assert step_memory() is installed_step_memory() is not None
print("done")
"""
        )
        == "done"
    )


def test_where_the_system_grants_no_more_torch_says_so():
    assert (
        done_alone(
            """
import resource, torch
from lorasweep.model.step_memory import step_memory
memory = step_memory()
kept = torch.ones(1 << 20)
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (taken + (300 << 20),) * 2)
for _ in range(3):
    try:
        torch.empty(2 << 30, dtype=torch.uint8)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error), error
    else:
        raise AssertionError("two GiB were found")
    assert (torch.ones(1 << 20) + kept == 2).all()
print("done")
"""
        )
        == "done"
    )


def test_where_addresses_are_counted_torchs_own_goes_on():
    assert "ulimit -v" in done_alone(
        """
import os, resource, torch
machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
with open("/proc/self/statm") as file:
    there = int(file.read().split()[0]) * 4096
limit = max(there + (2 << 30), machine)
assert limit < 2 * machine, "this machine is too small for the test"
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from lorasweep.model.heap import give_freed_memory_back, keep_freed_memory
from lorasweep.model.step_memory import step_memory, why_no_step_memory
keep_freed_memory()
assert step_memory() is None
assert (torch.ones(1 << 20) == 1).all()
give_freed_memory_back()
print(why_no_step_memory())
"""
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LORASWEEP_KERNELS": "0"}, "LORASWEEP_KERNELS=0 switches them off"),
        ({"CXX": "", "PATH": ""}, "no C\\+\\+ compiler"),
        ({"CXX": "false"}, "failed"),
    ],
)
def test_without_a_compiler_there_is_a_reason(environment, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KernelBuildError, match=said):
        built_step_memory()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        found = module._installed.__wrapped__()
    assert isinstance(found, str)
    assert found in caplog.text


def test_another_torch_is_another_build(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = built_step_memory()
    assert built_step_memory() == first
    monkeypatch.setattr(kernel_build.torch, "__version__", "2.99.0")
    assert built_step_memory() != first


def test_a_pack_asks_for_it(memory, monkeypatch):
    asked = []
    monkeypatch.setattr("lorasweep.model.heap.step_memory", lambda: asked.append(1))
    keep_freed_memory()
    assert asked
