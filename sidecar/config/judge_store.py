"""Settings of what sidecars and judges share: the queue of escalations and the blocklist."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict, WithJsonSchema, model_validator

from sidecar import units
from sidecar.config.section import RESTART, Section
from sidecar.config.types import Boolean, Duration, FilePath, Integer, Name, parse_address, refused

ADDRESSES_MAX = 16
_HOST = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?"
_NAMED = re.compile(rf"({_HOST}):([0-9]{{1,5}})")


def _check_server(value: str) -> str:
    if "@" in value or "://" in value:
        # the value isn't repeated: there may be a password in it
        raise refused(
            "this is a URL or has a login in it",
            "write the bare redis.example:6379; the login goes to username and password_file, TLS is tls: true",
        )
    named = _NAMED.fullmatch(value)
    if named and not re.fullmatch(r"[0-9.]+", named[1]):
        if not 1 <= int(named[3]) <= 65535:
            raise refused(f"port {int(named[3])} does not exist", "use 1 to 65535")
    elif not value.startswith(("unix:", "[")) and named is None:
        raise refused(f"{units.shown(value)} is not a server's address", "write redis.example:6379 or unix:/path")
    else:
        parse_address(value)
    return value


Server = Annotated[
    str,
    Strict(),
    AfterValidator(_check_server),
    WithJsonSchema({"type": "string", "pattern": r"^(unix:/[^@]+|[^@/]+:[0-9]+)$", "x-kind": "HOST:PORT, unix:PATH"}),
]


def server_of(value: str) -> tuple[str, int | None]:
    """(host, port) of an address as it stands in the settings, or ("/path", None)."""
    named = _NAMED.fullmatch(value)
    return (named[1], int(named[3])) if named else parse_address(value)


_USER = r"^[!-~]{1,128}$"


def _check_user(value: str) -> str:
    if not re.fullmatch(_USER, value):
        raise refused("this is not a user name", "use 1 to 128 printable ASCII characters without spaces")
    return value


User = Annotated[
    str, Strict(), AfterValidator(_check_user), WithJsonSchema({"type": "string", "pattern": _USER})
]


class JudgeStore(Section):
    """What sidecars and judges share: escalations that wait to be judged, and decisions that hold. One box: a file.
    A mesh: Redis or Valkey."""

    backend: Literal["sqlite", "redis"] = Field(
        "sqlite",
        json_schema_extra=RESTART,
        description="sqlite: a file that the processes of one box share. redis: Redis 6.2 or later, or Valkey.",
    )
    path: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description=(
            "The file (mode 0600), on a local disk: several machines can't share it. null: beside the arena "
            "(PATH.judge.db), where it outlives the processes but not a restart of the machine. With backend redis, "
            "where escalations are kept while Redis can't be reached; in a pod that is to survive its restart, on a "
            "volume."
        ),
        examples=["/var/lib/outrider/judge.db"],
    )
    name: Name = Field(
        "outrider",
        json_schema_extra=RESTART,
        description=(
            "Whoever has the same name shares queue and blocklist. Every key in Redis begins with {outrider:NAME}, "
            "one slot of a Cluster; an ACL user needs ~{outrider:NAME}*."
        ),
    )
    addresses: tuple[Server, ...] = Field(
        (),
        max_length=ADDRESSES_MAX,
        json_schema_extra=RESTART,
        description=(
            "Redis: its address; with sentinel_master those of the Sentinels; with cluster: true those of some nodes."
        ),
        examples=[["redis.example:6379"], ["unix:/run/redis/redis.sock"]],
    )
    sentinel_master: Name | None = Field(
        None,
        json_schema_extra=RESTART,
        description="The name under which Sentinels watch the primary. null: there are no Sentinels.",
        examples=["mymaster"],
    )
    sentinel_username: User | None = Field(
        None, json_schema_extra=RESTART, description="User at the Sentinels, where they ask for one."
    )
    sentinel_password_file: FilePath | None = Field(
        None, json_schema_extra=RESTART, description="As password_file, for the Sentinels. null: they ask for none."
    )
    cluster: Boolean = Field(
        False, json_schema_extra=RESTART, description="true: Redis Cluster. All of one name lies in one slot of it."
    )
    database: Integer = Field(
        0, ge=0, le=1024, json_schema_extra=RESTART, description="Number of the database; 0 in a Cluster."
    )
    username: User | None = Field(None, json_schema_extra=RESTART, description="ACL user. null: the default one.")
    password_file: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description=(
            "File with the password, nobody else may read it (mode 0440 or 0400). Read on every connect, so that a new "
            "password is taken without a restart."
        ),
        examples=["/etc/outrider/redis/password"],
    )
    tls: Boolean = Field(
        False,
        json_schema_extra=RESTART,
        description=(
            "true: TLS, with the server's certificate and name checked. Without it, whoever can listen on the way "
            "reads redacted requests, and whoever can write on it blocks clients."
        ),
    )
    tls_ca_file: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description="Certificates (PEM) of the authorities to trust. null: the system's.",
        examples=["/etc/outrider/redis/ca.crt"],
    )
    tls_cert_file: FilePath | None = Field(
        None, json_schema_extra=RESTART, description="Client certificate chain (PEM), where Redis asks for one."
    )
    tls_key_file: FilePath | None = Field(
        None, json_schema_extra=RESTART, description="Private key (PEM) of tls_cert_file."
    )
    timeout_s: Annotated[float, Duration("50ms", "30s", "s", whole=False)] = Field(
        1.0,
        alias="timeout",
        json_schema_extra=RESTART,
        description=(
            "Longest wait for Redis to connect or answer, and for the file's lock. Off the request path: no request "
            "waits for it."
        ),
    )
    queue_max: Integer = Field(
        4096,
        ge=16,
        le=1048576,
        json_schema_extra=RESTART,
        description=(
            "Most escalations that wait or are being judged; further ones are shed and counted. One takes 1 to 20 KiB."
        ),
    )
    per_client_max: Integer = Field(
        32,
        ge=1,
        le=1048576,
        json_schema_extra=RESTART,
        description=(
            "Most of them for one client, so that a flood leaves room for the others. As the queue fills it shrinks: "
            "an eighth of the room that is left, at least 1."
        ),
    )
    deadline_s: Annotated[float, Duration("1s", "7d", "s", whole=False)] = Field(
        600.0,
        alias="deadline",
        json_schema_extra=RESTART,
        description="An escalation that waited longer is dropped and counted instead of judged.",
    )
    abandon_s: Annotated[float, Duration("100ms", "1h", "s", whole=False)] = Field(
        30.0,
        alias="abandon",
        json_schema_extra=RESTART,
        description=(
            "What a judge took and neither settled nor failed within this time goes to another; what failed is tried "
            "again after it. Keep it above the time of the slowest batch."
        ),
    )
    deliveries_max: Integer = Field(
        3,
        ge=1,
        le=100,
        json_schema_extra=RESTART,
        description="After so many tries an escalation goes to the dead letters (1,000 are kept).",
    )
    decisions_max: Integer = Field(
        65536,
        ge=16,
        le=1048576,
        json_schema_extra=RESTART,
        description=(
            "Most decisions at once; further ones are refused and counted until some run out. As arena.blocklist."
        ),
    )
    judgements_max: Integer = Field(
        1000, ge=1, le=100000, json_schema_extra=RESTART, description="Most judgements kept for the operator to see."
    )
    feedback_max: Integer = Field(
        10000,
        ge=1,
        le=1000000,
        json_schema_extra=RESTART,
        description="Most labels kept that operators gave; the oldest give way. outrider judge exports them.",
    )

    @model_validator(mode="after")
    def _fits(self) -> JudgeStore:
        if self.per_client_max > self.queue_max:
            raise refused(
                f"per_client_max {self.per_client_max} is above queue_max {self.queue_max}",
                "lower it: it is what keeps one client from filling the queue",
            )
        if self.backend == "redis":
            self._redis_fits()
        return self

    def _redis_fits(self) -> None:
        if not self.addresses:
            raise refused("backend redis has no addresses", "write addresses: [redis.example:6379]")
        if self.cluster and self.sentinel_master is not None:
            raise refused("cluster and sentinel_master exclude each other", "remove one of the two")
        if self.cluster and self.database:
            raise refused("a Cluster has database 0 only", "remove database")
        many = self.cluster or self.sentinel_master is not None
        if len(self.addresses) > 1 and not many:
            raise refused(
                f"{len(self.addresses)} addresses of one server", "name one, or set sentinel_master or cluster"
            )
        if many and any(address.startswith("unix:") for address in self.addresses):
            raise refused("Sentinels and Cluster nodes are reached by TCP", "write HOST:PORT")
        if self.username is not None and self.password_file is None:
            raise refused("a username without a password", "set password_file")
        if self.sentinel_username is not None and self.sentinel_password_file is None:
            raise refused("a sentinel_username without a password", "set sentinel_password_file")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise refused("a certificate needs its key", "set both tls_cert_file and tls_key_file")
        if not self.tls and (self.tls_ca_file or self.tls_cert_file):
            raise refused("certificates without TLS", "set tls: true")
