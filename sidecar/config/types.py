"""Types of single settings: quantities with units, networks, names. Each brings its own
validation, its canonical in-memory form and its part of the JSON Schema.

A message says what is wrong; the remedy travels in the error's context, so that the loader can
show both (sidecar/config/load.py).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, Strict, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sidecar import units

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Integer = Annotated[int, Strict()]
Boolean = Annotated[bool, Strict()]


def refused(what: str, remedy: str) -> PydanticCustomError:
    """The error of a custom type: what is wrong, and what would be right."""
    return PydanticCustomError("outrider", "{what}", {"what": what, "remedy": remedy})


def _only_true(value: bool) -> bool:
    if not value:
        raise refused("false is not one of the choices", "use true, or remove it")
    return value


OnlyTrue = Annotated[
    bool, Strict(), AfterValidator(_only_true), WithJsonSchema({"type": "boolean", "const": True})
]


@dataclass(frozen=True)
class _Quantity:
    """Marks an int or float field as written with a unit. Bounds are in the written form."""

    lowest: str
    highest: str

    def parse(self, value: object) -> float:
        raise NotImplementedError

    def format(self, value: Any) -> str:
        raise NotImplementedError

    def json_schema(self) -> dict[str, Any]:
        raise NotImplementedError

    def validate(self, value: object) -> float:
        """The canonical number of a written value; a PydanticCustomError where it is none."""
        try:
            number = self.parse(value)
            low, high = self.parse(self.lowest), self.parse(self.highest)
        except units.UnitError as error:
            raise refused(error.what, error.remedy) from error
        if number < low or number > high:
            side = "below the minimum" if number < low else "above the maximum"
            raise refused(f"{units.shown(value)} is {side}", f"use {self.lowest} to {self.highest}")
        return number

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(self.format, when_used="json")
        return core_schema.no_info_plain_validator_function(self.validate, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return self.json_schema()


@dataclass(frozen=True)
class Duration(_Quantity):
    """A duration kept in `unit` (us, ms or s); `whole` refuses fractions of it."""

    unit: str = "us"
    whole: bool = True

    def parse(self, value: object) -> float:
        factor = units.DURATION_US[self.unit]
        microseconds = units.parse_duration(value)
        if not self.whole:
            return microseconds / factor
        if microseconds % factor:
            names = {"us": "microseconds", "ms": "milliseconds", "s": "seconds"}
            raise units.UnitError(
                f"{units.shown(value)} is not a whole number of {names[self.unit]}",
                f"round it, for instance to {max(1, round(microseconds / factor))}{self.unit}",
            )
        return microseconds // factor

    def format(self, value: Any) -> str:
        return units.format_duration(round(value * units.DURATION_US[self.unit]))

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "pattern": units.DURATION_PATTERN,
            "examples": [self.lowest, self.highest],
            "x-minimum": self.lowest,
            "x-maximum": self.highest,
        }


# Lengths of the windows that the data plane keeps for each client (native/windows.pxd).
WINDOWS_S = (1, 10, 60, 600, 3600)


@dataclass(frozen=True)
class Window(Duration):
    """The length of one of the windows that are kept for each client, in seconds."""

    lowest: str = "1s"
    highest: str = "1h"
    unit: str = "s"

    def validate(self, value: object) -> float:
        seconds = super().validate(value)
        if seconds not in WINDOWS_S:
            raise refused(f"no window of {units.shown(value)} is kept", f"use {self._choices(' or ')}")
        return seconds

    def _choices(self, last: str) -> str:
        names = [self.format(seconds) for seconds in WINDOWS_S]
        return ", ".join(names[:-1]) + last + names[-1]

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "pattern": "^(1s|10s|60s|600s|3600s|1m|10m|60m|1h)$",
            "examples": ["10s", "1m"],
            "x-kind": self._choices(", "),
        }


@dataclass(frozen=True)
class Size(_Quantity):
    """A size kept in bytes."""

    def parse(self, value: object) -> float:
        return units.parse_size(value)

    def format(self, value: Any) -> str:
        return units.format_size(value)

    def json_schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "pattern": units.SIZE_PATTERN,
            "examples": [self.lowest, self.highest],
            "x-minimum": self.lowest,
            "x-maximum": self.highest,
        }


@dataclass(frozen=True)
class Fraction(_Quantity):
    """A share or a score, kept as a float from 0 to 1."""

    lowest: str = "0"
    highest: str = "1"

    def parse(self, value: object) -> float:
        return units.parse_fraction(value)

    def format(self, value: Any) -> Any:
        return value

    def json_schema(self) -> dict[str, Any]:
        low, high = float(self.lowest), float(self.highest)
        return {
            "anyOf": [
                {"type": "number", "minimum": low, "maximum": high},
                {"type": "string", "pattern": units.FRACTION_PATTERN},
            ]
        }


_TOKEN = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}$"
_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
_METHOD = r"^[A-Z][A-Z-]{0,15}$"
_CLAIM = r"^[A-Za-z0-9_.:/-]{1,64}$"
_CIDR = r"^[0-9A-Fa-f.:]{2,45}(/[0-9]{1,3})?$"
ROUTE_PATH_MAX = 128  # native/policy.pxd
_PATH_SEGMENT = re.compile(r"[A-Za-z0-9._~!$&'()+,;=:@%-]+")


def _matches(pattern: str, kind: str, remedy: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.match(value) or value.endswith("\n"):
            raise refused(f"{units.shown(value)} is not {kind}", remedy)
        return value

    return check


def _text(pattern: str, kind: str, remedy: str, clean: Callable[[str], str] | None = None) -> Any:
    parts: list[Any] = [Strict(), AfterValidator(_matches(pattern, kind, remedy))]
    if clean:
        parts.append(AfterValidator(clean))
    words = kind.removeprefix("a ").removeprefix("an ")
    return (*parts, WithJsonSchema({"type": "string", "pattern": pattern, "x-kind": words}))


# Header names are kept in lower case, as HTTP/2 carries them.
HeaderName = Annotated[str, *_text(_TOKEN, "a header name", "write the bare name, as x-api-key", str.lower)]
CookieName = Annotated[str, *_text(_TOKEN, "a cookie name", "write the bare name, as session")]
ClaimName = Annotated[str, *_text(_CLAIM, "a claim name", "write the claim's name, as sub")]
Name = Annotated[str, *_text(_NAME, "a name", "use up to 63 letters, digits, dots, dashes and underscores")]
Method = Annotated[str, *_text(_METHOD, "an HTTP method", "write it in capitals, as GET or POST")]


def _check_pattern(value: str) -> str:
    if not value.startswith("/"):
        raise refused(
            f"{units.shown(value)} does not start with a slash", f"write {units.shown('/' + value)}"
        )
    if len(value) > ROUTE_PATH_MAX:
        raise refused(f"the path has {len(value)} characters", f"use at most {ROUTE_PATH_MAX}")
    if "?" in value:
        raise refused(f"{units.shown(value)} has a query", "leave out the question mark and what follows it")
    segments = value[1:].split("/")
    if len(segments) > 32:
        raise refused(f"the path has {len(segments)} segments", "use at most 32")
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        if segment == "**":
            if not last:
                raise refused(
                    f"** stands before the end of {units.shown(value)}",
                    "use ** only as the last segment, and * for one segment",
                )
        elif segment != "*" and "*" in segment:
            raise refused(
                f"* stands inside the segment {units.shown(segment)}",
                "use * for a whole segment, as /users/*/orders, or ** at the end",
            )
        elif segment == "" and not last:
            raise refused(f"{units.shown(value)} has an empty segment", "remove the doubled slash")
        elif segment not in ("", "*") and not _PATH_SEGMENT.fullmatch(segment):
            raise refused(
                f"the segment {units.shown(segment)} has characters that no path has",
                "percent-encode them, as %20 for a space",
            )
    return value


_GROUP = r"^[A-Za-z_][A-Za-z0-9_.-]{0,31}$"
GID_MAX = 2**32 - 2  # the last number means "none" to the system


def _check_group(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= GID_MAX:
            raise refused(f"{value} is not the number of a group", f"use 0 to {GID_MAX}")
        return value
    if not isinstance(value, str):
        raise refused(f"{units.shown(value)} is not a group", "write its name, as www-data, or its number")
    return _matches(_GROUP, "the name of a group", "write its name, as www-data, or its bare number")(value)


class _GroupType:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_check_group)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "type": ["string", "integer"],
            "pattern": _GROUP,
            "minimum": 0,
            "maximum": GID_MAX,
            "x-kind": "group name, number",
        }


Group = Annotated[int | str, _GroupType()]

PathPattern = Annotated[
    str,
    Strict(),
    AfterValidator(_check_pattern),
    WithJsonSchema(
        {"type": "string", "pattern": r"^/[^?#\s]*$", "maxLength": ROUTE_PATH_MAX, "x-kind": "path pattern"}
    ),
]


def parse_network(value: object) -> Network:
    """A CIDR range or a single address; bits behind the prefix are refused, not cut off."""
    if isinstance(value, (ipaddress.IPv4Network, ipaddress.IPv6Network)):
        return value
    if not isinstance(value, str):
        raise refused(f"{units.shown(value)} is not an address range", "write 192.0.2.0/24 or 2001:db8::/32")
    try:
        network = ipaddress.ip_network(value)
    except ValueError:
        try:
            wide = ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise refused(
                f"{units.shown(value)} is not an address range",
                "write 192.0.2.0/24, 2001:db8::/32 or a single address",
            ) from None
        raise refused(
            f"{units.shown(value)} has bits set behind its prefix",
            f"write {wide} for the range, or {value.split('/')[0]} for the one address",
        ) from None
    if network.prefixlen == 0:
        raise refused(
            f"{units.shown(value)} is every address there is",
            "to refuse nothing use service.mode: observe; to refuse all, stop the route at the proxy",
        )
    return network


class _NetworkType:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        return core_schema.no_info_plain_validator_function(parse_network, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "type": "string",
            "pattern": _CIDR,
            "x-kind": "CIDR range",
            "examples": ["192.0.2.0/24", "2001:db8::/32"],
        }


NetworkRange = Annotated[Network, _NetworkType()]

UNIX_PATH_MAX = 107  # sun_path holds 108 bytes with its terminator


def parse_address(value: str) -> tuple[str, int | None]:
    """("unix path", None) or (host, port) of a listening address; ValueError-like refusals."""
    remedy = "write unix:/run/outrider/outrider.sock, 127.0.0.1:9901 or [::1]:9901"
    if value.startswith("unix:"):
        path = value[len("unix:") :]
        if not path.startswith("/"):
            raise refused(
                f"{units.shown(value)} has no absolute path", "write unix:/run/outrider/outrider.sock"
            )
        if not path.isprintable() or path.endswith("/"):
            raise refused(f"{units.shown(value)} is not the path of a socket", remedy)
        if len(path.encode()) > UNIX_PATH_MAX:
            raise refused(
                f"the socket path has {len(path.encode())} bytes",
                f"use at most {UNIX_PATH_MAX}, a limit of the operating system",
            )
        return path, None
    host, colon, port_text = value.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port_text):
        raise refused(f"{units.shown(value)} is not an address with a port", remedy)
    port = int(port_text)
    if not 1 <= port <= 65535:
        raise refused(f"port {port} does not exist", "use 1 to 65535")
    literal = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        parsed = ipaddress.ip_address(literal)
    except ValueError:
        if literal != "localhost":
            raise refused(f"{units.shown(host)} is not an IP address", remedy) from None
    else:
        if (parsed.version == 6) != (literal != host):
            raise refused(
                f"{units.shown(value)} is ambiguous"
                if parsed.version == 6
                else f"{units.shown(value)} has brackets around an IPv4 address",
                remedy,
            )
    return literal, port


def _check_address(value: str) -> str:
    parse_address(value)
    return value


Address = Annotated[
    str,
    Strict(),
    AfterValidator(_check_address),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^(unix:/.+|localhost:[0-9]+|[0-9.]+:[0-9]+|\[[0-9A-Fa-f:.]+\]:[0-9]+)$",
            "x-kind": "unix:PATH, HOST:PORT",
        }
    ),
]


def _check_tcp(value: str) -> str:
    if parse_address(value)[1] is None:
        raise refused("probes and scrapers need TCP", "write 127.0.0.1:9902, or 0.0.0.0:9902 in a pod")
    return value


TcpAddress = Annotated[
    str,
    Strict(),
    AfterValidator(_check_tcp),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^(localhost|[0-9.]+|\[[0-9A-Fa-f:.]+\]):[0-9]+$",
            "x-kind": "HOST:PORT",
        }
    ),
]


def _check_file(value: str) -> str:
    if not value.startswith("/"):
        expanded = value.startswith("~") or "$" in value
        raise refused(
            f"{units.shown(value)} is not an absolute path",
            "write it out: ~ and $VARIABLES are not expanded" if expanded else "start it with a slash",
        )
    if not value.isprintable() or len(value.encode()) > 4095:
        raise refused(f"{units.shown(value)} is not a path", "use printable characters, at most 4095 bytes")
    return value


FilePath = Annotated[
    str,
    Strict(),
    AfterValidator(_check_file),
    WithJsonSchema({"type": "string", "pattern": "^/", "maxLength": 4095, "x-kind": "absolute path"}),
]


def power_of_two(value: int) -> int:
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise refused(f"{value} is not a power of two", f"use {below} or {below * 2}")
    return value


PowerOfTwo = Annotated[int, Strict(), AfterValidator(power_of_two)]


def _check_bundle(value: str) -> str:
    return value if value == "default" else _check_file(value)


def _check_target(value: str) -> str:
    return value if value == "-" else _check_file(value)


BundlePath = Annotated[
    str,
    Strict(),
    AfterValidator(_check_bundle),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": "^(default|/.+)$",
            "maxLength": 4095,
            "x-kind": "default, absolute path",
        }
    ),
]
LogTarget = Annotated[
    str,
    Strict(),
    AfterValidator(_check_target),
    WithJsonSchema(
        {"type": "string", "pattern": "^(-|/.+)$", "maxLength": 4095, "x-kind": "-, absolute path"}
    ),
]
