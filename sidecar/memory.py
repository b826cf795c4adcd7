"""Where short-lived memory files go: a file system in memory where it has room, else the temporary folder.

A container's /dev/shm is often 64 MiB, less than an arena of the default size."""
from __future__ import annotations

import os
import tempfile

SHARED = "/dev/shm"


def memory_folder(bytes_needed: int) -> str:
    """SHARED where it can be written and has this much free, else the temporary folder."""
    try:
        room = os.statvfs(SHARED)
    except OSError:
        return tempfile.gettempdir()
    fits = room.f_bavail * room.f_frsize >= bytes_needed
    return SHARED if fits and os.access(SHARED, os.W_OK | os.X_OK) else tempfile.gettempdir()
