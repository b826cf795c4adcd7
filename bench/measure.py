"""What a process has used, and what the machine is: read from /proc."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from sidecar.commands.version import cpu_model

PROC = Path("/proc")
NS_PER_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def cpu_ns(pid: int) -> int:
    """CPU time of all threads so far, in ns: from the scheduler's own account (exact), else from the ticks in `stat`
    (10 ms steps). 0 for a process that has ended. Threads that ended are only in the ticks, so a process that
    replaces threads is undercounted; those measured here don't."""
    total = 0
    try:
        for thread in (PROC / str(pid) / "task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
        return total
    except (OSError, IndexError, ValueError):
        pass
    try:
        # the name, field 2, may hold spaces and brackets
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * NS_PER_TICK
    except (OSError, IndexError, ValueError):
        return 0


def children(pid: int) -> list[int]:
    """The process ids of a single-threaded process's children, zombies included; empty when it has ended."""
    try:
        return [int(child) for child in (PROC / f"{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []


@dataclass(frozen=True)
class Memory:
    """Resident memory in KiB. Private is what can leak; shared is mostly the arena, a file of fixed size."""

    rss_kib: int
    private_kib: int
    shared_kib: int


def memory(pid: int) -> Memory:
    """Zeros for a process that has ended."""
    try:
        text = (PROC / str(pid) / "status").read_text()
    except OSError:
        return Memory(0, 0, 0)
    found = {name: int(kib) for name, kib in re.findall(r"^(VmRSS|RssAnon|RssShmem):\s+(\d+) kB", text, re.M)}
    return Memory(found.get("VmRSS", 0), found.get("RssAnon", 0), found.get("RssShmem", 0))


def machine() -> dict[str, str]:
    """Facts for the head of a table; the host's name isn't among them, as reports are passed on."""
    kib = re.search(r"MemTotal:\s+(\d+)", (PROC / "meminfo").read_text())
    system = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return {
        "processor": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{int(kib[1]) / (1 << 20):.0f} GiB" if kib else "unknown",
        "system": f"{system.get('PRETTY_NAME', platform.system())}, Linux {platform.release()}",
        "python": platform.python_version(),
    }


def machine_cpu_ns() -> int:
    """CPU time that the whole machine has spent on work so far, in ns (10 ms steps per core), taken by a hypervisor
    included."""
    try:
        fields = (PROC / "stat").read_text().partition("\n")[0].split()
        # user nice system - - irq softirq steal
        return sum(int(fields[i]) for i in (1, 2, 3, 6, 7, 8)) * NS_PER_TICK
    except (OSError, IndexError, ValueError):
        return 0


def own_cpu_ns() -> int:
    """CPU time of this process and of its children that have ended (the load generators), in ns."""
    times = os.times()
    return round((times.user + times.system + times.children_user + times.children_system) * 1e9)
