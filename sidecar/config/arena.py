"""Settings of the arena's file."""

from __future__ import annotations

from pydantic import Field

from sidecar.config.section import RESTART, Section
from sidecar.config.types import FilePath, Group, PowerOfTwo


class Arena(Section):
    """The shared-memory file in which clients, decisions and counters live. Everything in it
    has a fixed size."""

    path: FilePath = Field(
        "/dev/shm/outrider.arena",
        json_schema_extra=RESTART,
        description=(
            "Where the file is; on a memory file system (tmpfs; in a pod a volume with medium: Memory). Beside it, in "
            "PATH.models, lie the models for plugins in proxies: share the folder with them, under whatever path."
        ),
        examples=["/run/outrider/arena"],
    )
    group: Group | None = Field(
        None,
        json_schema_extra=RESTART,
        description=(
            "Group (name or number) that may open the file, for plugins in proxies that run as another user: "
            "mode 0660, the models beside it 0640. Outrider must be in it. null: Outrider's user only. "
            "Whoever may open the file can change every decision: take a group of the proxies only."
        ),
        examples=["www-data", 101],
    )
    clients: PowerOfTwo = Field(
        65536,
        ge=1024,
        le=4194304,
        json_schema_extra=RESTART,
        description=(
            "Most client entries (addresses and principals) remembered at once, a power of two, at most 1 "
            "KiB of memory "
            "each. When full, the entry with the fewest recent requests gives way."
        ),
    )
    events: PowerOfTwo = Field(
        4096,
        ge=64,
        le=1048576,
        json_schema_extra=RESTART,
        description=(
            "Decision records that may wait to be written, a power of two. When full, further ones are "
            "dropped and "
            "counted."
        ),
    )
    escalations: PowerOfTwo = Field(
        256,
        ge=16,
        le=4096,
        json_schema_extra=RESTART,
        description=(
            "Requests that may wait to be taken to the judge, a power of two, 11 KiB of memory each. When full, "
            "further ones are dropped and counted."
        ),
    )
    blocklist: PowerOfTwo = Field(
        65536,
        ge=1024,
        le=1048576,
        json_schema_extra=RESTART,
        description="Most blocked clients and payloads at once, a power of two.",
    )
