"""How much of the machine this process may use: memory and cores, as a container or scheduler limits them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path('/sys/fs/cgroup')


def limits(*names: str) -> Iterator[list[str]]:
    """The words in files of control groups, of this process and of all groups that enclose it, of version 1 or 2."""
    groups = ['0::/', '1:memory:/', '1:cpu:/']
    with contextlib.suppress(OSError):  # a system without them
        groups += Path('/proc/self/cgroup').read_text().splitlines()
    for group in dict.fromkeys(groups):
        _, controllers, name = group.split(':', 2)
        root = CGROUPS / controllers
        folder = root / name.lstrip('/')
        while folder.is_relative_to(root):
            with contextlib.suppress(OSError):  # another version, or another controller
                yield [word for file in names for word in (folder / file).read_text().split()]
            folder = folder.parent


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of a container or scheduler."""
    found = [*limits('memory.max'), *limits('memory.limit_in_bytes')]
    sizes = [int(size) for (size,) in found if size.isdecimal()]  # 'max' is none
    return min([os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'), *sizes])


def cores() -> int:
    """Cores that this process may use: those it may run on, or the quota of a container, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    found = [*limits('cpu.max'), *limits('cpu.cfs_quota_us', 'cpu.cfs_period_us')]
    return min([count, *(-(-int(quota) // int(period)) for quota, period in found if quota.isdecimal())])
