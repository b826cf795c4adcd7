"""What must hold between settings, and between the settings and the machine they run on.

Each check yields findings: the paths it looked at (the first is where the mistake is shown; if any of
them is already known to be wrong, the finding is dropped), what is wrong, and the remedy.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilesystemPath

from sidecar.config.problems import Path, dotted
from sidecar.config.settings import Route, Settings, Thresholds
from sidecar.config.types import Network, parse_address
from sidecar.sharing import group_id
from sidecar.units import format_size, shown

ORDER = ("tag", "throttle", "challenge", "block")
FRAME_BYTES = 1024  # what a message carries beside the body it brings
KEY_BYTES_MIN, KEY_BYTES_MAX = 16, 4096


@dataclass(frozen=True, slots=True)
class Finding:
    paths: tuple[Path, ...]
    what: str
    remedy: str


def between(settings: Settings) -> Iterator[Finding]:
    """Contradictions within the settings."""
    for check in (
        _thresholds,
        _escalation,
        _route_names,
        _bodies,
        _route_effects,
        _reachable,
        _lists,
        _addresses,
        _files,
        _tls,
        _repeated,
    ):
        yield from check(settings)


def environment(settings: Settings) -> Iterator[Finding]:
    """What the machine lacks: folders, permissions, the key file, the bundle."""
    for check in (_socket_folder, _arena_folder, _arena_group, _key_file, _tls_files, _models, _log_folder):
        yield from check(settings)


def _ascending(scores: Thresholds, path: Callable[[str], Path]) -> Iterator[Finding]:
    given = [(name, getattr(scores, name)) for name in ORDER if getattr(scores, name) is not None]
    for (lower, low), (higher, high) in itertools.combinations(given, 2):
        if low > high:
            yield Finding(
                (path(higher), path(lower)),
                f"{high} is below the threshold of {lower}, {low}",
                f"let the thresholds rise: {' <= '.join(ORDER)}",
            )


def _thresholds(settings: Settings) -> Iterator[Finding]:
    yield from _ascending(settings.thresholds, lambda name: ("thresholds", name))
    for index, (route, effective) in enumerate(
        zip(settings.routes, settings.effective_routes()[1:], strict=True)
    ):
        own = route.thresholds.model_fields_set

        def path(name: str, index: int = index, own: set[str] = own) -> Path:
            return ("routes", index, "thresholds", name) if name in own else ("thresholds", name)

        for finding in _ascending(effective.thresholds, path):
            # what is wrong in the service's thresholds is said there, once
            if any(part[0] == "routes" for part in finding.paths):
                yield Finding(
                    tuple(sorted(finding.paths, key=lambda p: p[0] != "routes")),
                    finding.what,
                    finding.remedy + "; what the route leaves out comes from thresholds",
                )


def _escalation(settings: Settings) -> Iterator[Finding]:
    """A band of scores with nothing in it."""
    for index, effective in enumerate(settings.effective_routes()):
        section = settings.routes[index - 1].escalation if index else settings.escalation
        own = section.model_fields_set
        shown, scores = effective.escalation, effective.thresholds
        begin = scores.tag if shown.uncertain_from is None else shown.uncertain_from
        end = scores.block if shown.uncertain_to is None else shown.uncertain_to
        if begin is None or end is None or begin < end or not own & {"uncertain_from", "uncertain_to"}:
            continue
        name = "uncertain_to" if "uncertain_to" in own else "uncertain_from"
        path: Path = ("routes", index - 1, "escalation", name) if index else ("escalation", name)
        first = "thresholds.tag" if shown.uncertain_from is None else "uncertain_from"
        last = "thresholds.block" if shown.uncertain_to is None else "uncertain_to"
        yield Finding(
            (path,),
            f"no score reaches {begin} ({first}) and stays below {end} ({last})",
            "let uncertain_from be below uncertain_to; to show the judge nothing, say enabled: false",
        )


def _route_names(settings: Settings) -> Iterator[Finding]:
    first: set[str] = set()
    for index, route in enumerate(settings.routes):
        path: Path = ("routes", index, "name")
        if route.name == "default":
            yield Finding(
                (path,), "the name default is taken by the service's own settings", "choose another name"
            )
        elif route.name in first:
            yield Finding(
                (path,),
                f"the name {shown(route.name)} is taken by an earlier route",
                "give each route a name of its own",
            )
        else:
            first.add(route.name)


def _bodies(settings: Settings) -> Iterator[Finding]:
    most = settings.listen.max_message_bytes - FRAME_BYTES
    if settings.text.body_bytes > most:
        yield Finding(
            (("text", "body"), ("listen", "max_message")),
            f"a body of {format_size(settings.text.body_bytes)} does not fit into a message of "
            f"{format_size(settings.listen.max_message_bytes)}",
            f"lower it to {most >> 10}KiB or raise listen.max_message",
        )
    for index, route in enumerate(settings.routes):
        if route.body_limit_bytes is not None and route.body_limit_bytes > settings.text.body_bytes:
            yield Finding(
                (("routes", index, "body_limit"), ("text", "body")),
                f"{format_size(route.body_limit_bytes)} is above text.body, "
                f"{format_size(settings.text.body_bytes)}",
                "lower it or raise text.body",
            )


def _route_effects(settings: Settings) -> Iterator[Finding]:
    for index, (route, effective) in enumerate(
        zip(settings.routes, settings.effective_routes()[1:], strict=True)
    ):
        if route.exempt:
            for key, given in (
                ("budget", route.budget_us),
                ("body", route.body),
                ("body_limit", route.body_limit_bytes),
                ("mode", route.mode),
                ("thresholds", route.thresholds.model_fields_set or None),
                ("login", route.login or None),
                ("escalation", route.escalation.model_fields_set or None),
            ):
                if given is not None and given != "none":
                    yield Finding(
                        (("routes", index, key), ("routes", index, "exempt")),
                        "has no effect on a route with exempt: true",
                        "remove it, or remove exempt",
                    )
        elif route.body_limit_bytes is not None and effective.body == "none":
            yield Finding(
                (("routes", index, "body_limit"), ("routes", index, "body"), ("text", "body_mode")),
                "has no effect where no body is read",
                "remove it, or set body: buffered",
            )


def _covers(wide: str, narrow: str) -> bool:
    """Every path that matches narrow matches wide."""
    wides, narrows = wide.split("/")[1:], narrow.split("/")[1:]
    for place, segment in enumerate(wides):
        if segment == "**":
            return len(narrows) >= place  # /api/** is also /api
        if place >= len(narrows):
            return False
        other = narrows[place]
        if other == "**" or (segment != other and not (segment == "*" and other != "")):
            return False
    return len(wides) == len(narrows)


def _reachable(settings: Settings) -> Iterator[Finding]:
    for index, route in enumerate(settings.routes):
        for earlier, other in enumerate(settings.routes[:index]):
            if _hides(other, route):
                yield Finding(
                    (
                        ("routes", index, "path"),
                        ("routes", index, "methods"),
                        ("routes", earlier, "path"),
                        ("routes", earlier, "methods"),
                    ),
                    f"is never reached: {other.name} ({other.path}) takes all its requests",
                    f"move it before {other.name}, or remove it",
                )
                break


def _hides(earlier: Route, later: Route) -> bool:
    methods = not earlier.methods or (bool(later.methods) and set(later.methods) <= set(earlier.methods))
    return methods and _covers(earlier.path, later.path)


def _lists(settings: Settings) -> Iterator[Finding]:
    allowed = settings.lists.allow
    index: dict[Network, int] = {}
    for place, network in enumerate(allowed):
        index.setdefault(network, place)
    lengths = {
        4: sorted({n.prefixlen for n in allowed if n.version == 4}),
        6: sorted({n.prefixlen for n in allowed if n.version == 6}),
    }
    for place, network in enumerate(settings.lists.block):
        for length in lengths[network.version]:
            if length > network.prefixlen:
                break
            found = index.get(network.supernet(new_prefix=length) if length < network.prefixlen else network)
            if found is not None:
                yield Finding(
                    (("lists", "block", place), ("lists", "allow", found)),
                    f"{network} is never blocked: {allowed[found]} in lists.allow wins",
                    "remove one of the two",
                )
                break


def _addresses(settings: Settings) -> Iterator[Finding]:
    """No port twice."""
    wildcards = {"0.0.0.0", "::"}
    taken: list[tuple[Path, str, int]] = []
    for path, address in (
        (("listen", "address"), settings.listen.address),
        (("listen", "auth_request"), settings.listen.auth_request),
        (("admin", "address"), settings.admin.address),
    ):
        host, port = parse_address(address) if address is not None else ("", None)
        if port is None:
            continue
        for earlier, other, other_port in taken:
            if port == other_port and (host == other or {host, other} & wildcards):
                yield Finding(
                    (path, earlier),
                    f"port {port} is taken by {dotted(earlier)}",
                    f"use another port, as {port + 1 if port < 65535 else port - 1}",
                )
                break
        taken.append((path, host, port))


def _socket_path(address: str | None) -> str | None:
    return address.removeprefix("unix:") if address is not None and address.startswith("unix:") else None


def _files(settings: Settings) -> Iterator[Finding]:
    named: list[tuple[Path, str | None]] = [
        (("listen", "address"), _socket_path(settings.listen.address)),
        (("listen", "auth_request"), _socket_path(settings.listen.auth_request)),
        (("arena", "path"), settings.arena.path),
        (("client", "key_file"), settings.client.key_file),
        (("decision_log", "path"), settings.decision_log.path),
    ]
    first: dict[str, Path] = {}
    for path, name in named:
        if name is None or name == "-":
            continue
        name = os.path.normpath(name)
        if name in first:
            yield Finding(
                (path, first[name]), f"{shown(name)} is also {dotted(first[name])}", "use a file of its own"
            )
        first.setdefault(name, path)


def _tls(settings: Settings) -> Iterator[Finding]:
    listen = settings.listen
    if listen.tls_cert_file is None and listen.tls_key_file is None:
        if listen.tls_client_ca_file is not None:
            path: Path = ("listen", "tls_client_ca_file")
            yield Finding(
                (path,),
                "clients are to show certificates, but there is no TLS",
                "set listen.tls_cert_file and listen.tls_key_file",
            )
        return
    for name, value in (("tls_cert_file", listen.tls_cert_file), ("tls_key_file", listen.tls_key_file)):
        if value is None:
            yield Finding((("listen", name),), "TLS needs a certificate and its key", f"set listen.{name} too")
    if listen.transport == "native":
        where: Path = ("listen", "transport")
        yield Finding((where,), "the native transport has no TLS", "say grpcio or auto, or leave TLS to the mesh")


def _repeated(settings: Settings) -> Iterator[Finding]:
    lists: list[tuple[Path, Iterable[object]]] = [
        (("latency", "skip"), settings.latency.skip),
        (("text", "headers"), settings.text.headers or ()),
        (("decision_log", "actions"), settings.decision_log.actions),
        (("client", "principal"), settings.client.principal),
        (("lists", "allow"), settings.lists.allow),
        (("lists", "block"), settings.lists.block),
        *((("routes", index, "methods"), route.methods) for index, route in enumerate(settings.routes)),
    ]
    for path, items in lists:
        first: dict[object, int] = {}
        for place, item in enumerate(items):
            if item in first:
                shown_item = f"{shown(str(item))} " if isinstance(item, str) or path[0] == "lists" else ""
                yield Finding(
                    ((*path, place), (*path, first[item])),
                    f"{shown_item}is in the list already",
                    "remove one of the two",
                )
            first.setdefault(item, place)


def _folder(path: Path, file: str, purpose: str) -> Iterator[Finding]:
    """The folder of a file that Outrider will create."""
    folder = os.path.dirname(file)
    if not os.path.isdir(folder):
        yield Finding(
            (path,),
            f"the folder {shown(folder)} for {purpose} does not exist",
            f"create it (mkdir -p {folder}) or mount it",
        )
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding(
            (path,),
            f"the folder {shown(folder)} for {purpose} is not writable",
            "give Outrider's user write permission, or choose another folder",
        )
    elif os.path.isdir(file):
        yield Finding((path,), f"{shown(file)} is a folder", "name a file in it")


def _socket_folder(settings: Settings) -> Iterator[Finding]:
    for key, address in (("address", settings.listen.address), ("auth_request", settings.listen.auth_request)):
        where = _socket_path(address)
        if where is None:
            continue
        path: Path = ("listen", key)
        yield from _folder(path, where, "the socket")
        try:
            mode = os.lstat(where).st_mode
        except OSError:
            continue
        if not stat.S_ISSOCK(mode) and not stat.S_ISDIR(mode):
            yield Finding(
                (path,), f"{shown(where)} exists and is not a socket", "remove it or choose another path"
            )


def _arena_folder(settings: Settings) -> Iterator[Finding]:
    yield from _folder(("arena", "path"), settings.arena.path, "the arena")


def _arena_group(settings: Settings) -> Iterator[Finding]:
    try:
        group_id(settings.arena.group)
    except KeyError:
        yield Finding(
            (("arena", "group"),),
            f"there is no group {shown(str(settings.arena.group))} on this machine",
            "create it, or give the number that the proxy's user has",
        )


def _key_file(settings: Settings) -> Iterator[Finding]:
    name = settings.client.key_file
    if name is None:
        return
    path: tuple[Path, ...] = (("client", "key_file"),)
    try:
        status = os.stat(name)
    except OSError as error:
        yield Finding(
            path,
            f"{shown(name)} cannot be read: {error.strerror}",
            "create it: head -c 32 /dev/urandom | base64 > FILE; chmod 0400 FILE",
        )
        return
    if not stat.S_ISREG(status.st_mode):
        yield Finding(path, f"{shown(name)} is not a file", "name a regular file")
        return
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o027:
        yield Finding(
            path,
            f"{shown(name)} has mode {mode:04o}: others may read or change the key",
            "chmod 0440 it, or set defaultMode: 0440 on the secret's volume",
        )
    if not os.access(name, os.R_OK):
        yield Finding(path, f"{shown(name)} is not readable", "give Outrider's user or group read permission")
    elif not KEY_BYTES_MIN <= status.st_size <= KEY_BYTES_MAX:
        yield Finding(
            path, f"{shown(name)} has {status.st_size} bytes", f"use {KEY_BYTES_MIN} to {KEY_BYTES_MAX}"
        )


def _tls_files(settings: Settings) -> Iterator[Finding]:
    listen = settings.listen
    for key, name in (
        ("tls_cert_file", listen.tls_cert_file),
        ("tls_key_file", listen.tls_key_file),
        ("tls_client_ca_file", listen.tls_client_ca_file),
    ):
        if name is None:
            continue
        path: tuple[Path, ...] = (("listen", key),)
        try:
            status = os.stat(name)
        except OSError as error:
            yield Finding(path, f"{shown(name)} cannot be read: {error.strerror}", "name an existing PEM file")
            continue
        if not os.access(name, os.R_OK):
            yield Finding(path, f"{shown(name)} is not readable", "give Outrider's user or group read permission")
        elif key == "tls_key_file" and stat.S_IMODE(status.st_mode) & 0o007:
            yield Finding(
                path,
                f"{shown(name)} has mode {stat.S_IMODE(status.st_mode):04o}: anyone may read the key",
                "chmod 0440 it, or set defaultMode: 0440 on the secret's volume",
            )


def _models(settings: Settings) -> Iterator[Finding]:
    bundle = settings.models.bundle
    if bundle != "default" and not FilesystemPath(bundle, "manifest.json").is_file():
        yield Finding(
            (("models", "bundle"),),
            f"{shown(bundle)} is not a model bundle: it has no manifest.json",
            "name the folder that outrider train --out wrote, or default",
        )
    cache = settings.models.cache
    if cache is not None:
        nearest = FilesystemPath(cache)
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            yield Finding(
                (("models", "cache"),),
                f"{shown(cache)} cannot be written",
                "give Outrider's user write permission, or choose another folder",
            )


def _log_folder(settings: Settings) -> Iterator[Finding]:
    if settings.decision_log.path not in (None, "-"):
        yield from _folder(("decision_log", "path"), str(settings.decision_log.path), "the decision log")
