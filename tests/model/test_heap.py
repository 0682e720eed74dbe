"""A step's memory is kept for the next one, and lies on large pages where the system has them."""

from __future__ import annotations

import subprocess
import sys

from lorasweep.model import heap as module
from lorasweep.model.heap import Heap

# In a process of its own: the settings stay with a process.
SCRIPT = """
import resource
import torch
from lorasweep.model.heap import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return [torch.ones(3 << 20) for _ in range(20)]  # 12 MiB each

def advised():
    flags, inside = [], False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = line.rstrip().endswith("[heap]")
        elif inside and line.startswith("VmFlags:"):
            flags.append("hg" in line.split())
    return flags[-1]

kept = {kept}
if kept:
    heap().keep_freed_memory()
    heap().advise()
for _ in range(4):
    step()
before = faults()
step()
print(faults() - before, advised())
heap().advise()
"""


def said(kept: bool) -> tuple[int, bool]:
    script = SCRIPT.replace("{kept}", str(kept))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    faults, advised = done.stdout.split()
    return int(faults), advised == "True"


def test_later_steps_take_no_fresh_memory_and_the_heap_is_advised():
    faults, advised = said(kept=True)
    assert faults < 100
    assert advised
    # Left alone, glibc gives the memory back, and takes it again page by page.
    faults, advised = said(kept=False)
    assert faults > 1000
    assert not advised


def test_elsewhere_than_on_linux_nothing_happens(monkeypatch):
    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    heap = Heap()
    heap.keep_freed_memory()
    heap.advise()


def test_a_process_without_a_heap_of_its_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(module, "_heap_start", lambda: 0)
    heap = Heap()
    heap.keep_freed_memory()
    heap.advise()
