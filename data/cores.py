"""The CPU cores that this process may use: its affinity and the quotas of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def core_count() -> int:
    """Return the number of cores this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, quotas())]))


def quotas() -> Iterator[float]:
    """Yield the cores that each control group above this process allows, of version 1 and 2.

    A container sees its own group at the root, whatever path the kernel gives, so all parents are tried.
    """
    lines = []
    with suppress(OSError):
        lines = OWN_GROUPS.read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers or "cpu" in controllers.split(","):
            root, group = GROUPS / controllers, Path(path)
            for parent in (group, *group.parents):
                yield from quota_of(root / parent.relative_to("/"))


def quota_of(group: Path) -> Iterator[float]:
    """Yield the cores that a control group allows, if it has a quota."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with suppress(OSError, ValueError, ZeroDivisionError):  # not there, or "max": no quota
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            if quota > 0:  # -1: no quota
                yield quota / period
