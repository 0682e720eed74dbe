"""Memory that this process may still take: what the machine has, or what its cgroups leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class _CgroupVersion:
    """Where a version of cgroups says what of memory may be taken, and what is.

    Attributes:
        mount: Folder of the groups below the root.
        limits: Files with a limit in bytes, ``max`` for none. Above ``memory.high`` the kernel
            slows a process down until it hardly moves.
        usage: File with the bytes taken, cached files included.
        cache: Line of ``memory.stat`` with the cached files that were not read lately: the
            kernel drops them before it refuses anything.
    """

    mount: str
    limits: tuple[str, ...]
    usage: str
    cache: str


_V1 = _CgroupVersion(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_V2 = _CgroupVersion(
    "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"
)


def host_bytes(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that this process can still take.

    psutil speaks of the whole machine. Containers and batch systems give a process less, by
    the limit of its cgroup or of any group around that.

    Args:
        root: Of the file system, for tests.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_by_cgroups(root)]))


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Yield what each group with a limit leaves, in bytes; below 0 where it is overdrawn."""
    try:
        own = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in own:
        _, controllers, path = line.split(":", 2)  # "0::/a" is version 2, "4:memory:/a" version 1
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        mount = root / version.mount
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, and nothing lies there; the mount itself is
        # the container's own group then.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _left_by(folder, version)


def _left_by(folder: Path, version: _CgroupVersion) -> Iterator[int]:
    usage = _number(folder / version.usage)
    if usage is None:  # the root of all groups has no such file
        return
    for limit in (_number(folder / name) for name in version.limits):
        if limit is not None:
            yield limit - usage + _cached(folder, version)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def _cached(folder: Path, version: _CgroupVersion) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    pairs = dict(line.split(maxsplit=1) for line in lines)
    return int(pairs.get(version.cache, 0))
