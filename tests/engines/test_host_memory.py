"""What a process may take of the host's memory, below limits of cgroups laid out as files."""

from collections import namedtuple

import psutil
import pytest
import torch

from lorasweep.engines import lane_memory
from lorasweep.engines.host_memory import host_bytes

GIB = 2**30
MACHINE = 100 * GIB
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(MACHINE))


@pytest.fixture
def tree(tmp_path):
    """``tree(lines, {"sys/fs/cgroup/a/memory.max": …})`` lays out a root."""

    def lay_out(own: str, files: dict[str, object]):
        for path, content in {"proc/self/cgroup": own, **files}.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return tmp_path

    return lay_out


def v2(group: str, limit: object, usage: int, **more: object) -> dict[str, object]:
    folder = f"sys/fs/cgroup{group}"
    files = {"max": limit, "current": usage, **more}
    return {f"{folder}/memory.{name}": value for name, value in files.items()}


def v1(group: str, limit: int, usage: int, stat: str = "cache 0") -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{group}"
    files = {"limit_in_bytes": limit, "usage_in_bytes": usage, "stat": stat}
    return {f"{folder}/memory.{name}": value for name, value in files.items()}


def test_without_cgroups_it_is_what_the_machine_has(tmp_path):
    assert host_bytes(tmp_path) == MACHINE


def test_the_tightest_group_on_the_way_up_counts(tree):
    own = v2("/job/step", 32 * GIB, 2 * GIB)
    beside = v2("/job/other", GIB, 0)
    root = tree("0::/job/step", {**own, **beside})
    assert host_bytes(root) == 30 * GIB
    tree("0::/job/step", v2("/job", 24 * GIB, 10 * GIB))  # the other steps take some, too
    assert host_bytes(root) == 14 * GIB


def test_a_group_without_a_limit_leaves_it_to_the_machine_or_to_the_one_above(tree):
    root = tree("0::/job/step", v2("/job/step", "max", 2 * GIB, high="max"))
    assert host_bytes(root) == MACHINE
    tree("0::/job/step", v2("/job", 7 * GIB, 2 * GIB))
    assert host_bytes(root) == 5 * GIB


def test_a_limit_above_what_the_machine_has_changes_nothing(tree):
    assert host_bytes(tree("0::/a", v2("/a", 2 * MACHINE, 0))) == MACHINE


def test_a_process_is_slowed_down_before_it_is_refused_anything(tree):
    assert host_bytes(tree("0::/a", v2("/a", 8 * GIB, GIB, high=6 * GIB))) == 5 * GIB


def test_an_overdrawn_group_leaves_nothing(tree):
    assert host_bytes(tree("0::/a", v2("/a", GIB, 2 * GIB))) == 0


def test_files_that_were_read_long_ago_can_be_dropped(tree):
    stat = f"anon {GIB}\nfile {4 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}"
    assert host_bytes(tree("0::/a", v2("/a", 8 * GIB, 7 * GIB, stat=stat))) == 4 * GIB


def test_in_a_container_the_mount_is_its_own_group(tree):
    """Where the path is the host's, it leads nowhere; ``0::/`` is what most containers say."""
    root = tree("0::/", v2("", 4 * GIB, GIB))
    assert host_bytes(root) == 3 * GIB
    tree("0::/system.slice/docker-1.scope", {})
    assert host_bytes(root) == 3 * GIB
    tree("0::/../../elsewhere", {})
    assert host_bytes(root) == 3 * GIB


V1_LINES = "9:name=systemd:/job\n4:memory,hugetlb:/job/step\n3:cpuset:/\n0::/"


def test_version_1_has_other_names(tree):
    root = tree(V1_LINES, v1("/job/step", NO_LIMIT_V1, GIB))
    assert host_bytes(root) == MACHINE
    stat = f"inactive_file 0\ntotal_inactive_file {GIB}"
    tree(V1_LINES, v1("/job", 6 * GIB, 3 * GIB, stat))
    assert host_bytes(root) == 4 * GIB


def test_only_the_line_about_memory_counts(tree):
    files = {**v1("/elsewhere", GIB, 0), **v1("/job", 6 * GIB, 0)}
    assert host_bytes(tree("9:cpu:/elsewhere\n4:memory:/job", files)) == 6 * GIB


def test_a_pack_on_a_cpu_is_held_to_it(monkeypatch):
    monkeypatch.setattr(lane_memory, "host_bytes", lambda: 5 * GIB)
    assert lane_memory.free_bytes(torch.device("cpu")) == 5 * GIB
