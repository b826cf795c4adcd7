"""The configuration: defaults, what is refused and how, places, bounds on hostile input."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sidecar.config import ConfigError, Problem, Settings, load, loads
from sidecar.config.checks import _covers
from sidecar.config.document import EXAMPLE
from sidecar.policy import compile_policy

BAD = sorted((Path(__file__).parent / "testdata" / "bad").glob("*.yaml"))


def problems_of(text: str | bytes, **more: bool) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        loads(text, "t.yaml", **more)
    return caught.value.problems


def refusal_of(text: str | bytes, **more: bool) -> ConfigError | None:
    try:
        loads(text, **more)
    except ConfigError as error:
        return error
    return None


# ---- one file per kind of mistake


def test_there_are_bad_files() -> None:
    assert len(BAD) > 40


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_file(path: Path) -> None:
    """Every problem that the file's `# expect:` lines name is found, with its place, and no other."""
    expected = [
        line.decode().removeprefix("# expect: ")
        for line in path.read_bytes().split(b"\n")
        if line.startswith(b"# expect: ")
    ]
    with pytest.raises(ConfigError) as caught:
        load(path, environment=False)
    found = []
    for problem in caught.value.problems:
        assert problem.where == f"{path}:{problem.line}:{problem.column}"
        subject = f"{problem.path}: " if problem.path else ""
        found.append(f"{problem.line}:{problem.column} {subject}{problem.what}; {problem.remedy}")
    assert found == expected
    assert str(caught.value).isascii()
    assert str(caught.value).replace("\n", "").isprintable()


def test_every_mistake_at_once() -> None:
    """Mistakes of every step (text, keys, values, between values) are reported together."""
    found = problems_of("""
service: {mode: observe, mode: enforce}
latency: {budget: 5}
typo: 1
thresholds: {tag: 0.9, block: 0.2}
routes: [{name: a, path: /a}, {name: a, path: /b, methods: [get]}]
log: {level: !x info}
""")
    assert [problem.path for problem in found] == [
        "service.mode",
        "latency.budget",
        "typo",
        "thresholds.throttle",
        "thresholds.block",
        "routes[1].name",
        "routes[1].methods[0]",
        "log.level",
    ]


def test_a_wrong_value_is_not_reported_twice() -> None:
    """What depends on a wrong value is not judged by the default that stands in for it."""
    assert [p.path for p in problems_of("thresholds: {throttle: lots, tag: 0.85}")] == ["thresholds.throttle"]
    assert [
        p.path for p in problems_of("text: {body: 1GiB}\nroutes: [{name: a, path: /a, body_limit: 128KiB}]")
    ] == ["text.body"]
    # the second route would be unreachable if the first took all methods, which its author didn't mean
    assert [
        p.path for p in problems_of("routes: [{name: a, path: /**, methods: [get]}, {name: b, path: /b}]")
    ] == ["routes[0].methods[0]"]


def test_indices_are_those_of_the_file() -> None:
    """A broken item before it doesn't shift the place of a later one."""
    found = problems_of(
        "routes:\n- {name: a}\n- {name: b, path: x}\n- {name: c, path: /c, body_limit: 1MiB}\n"
    )
    assert [(p.line, p.path) for p in found] == [
        (2, "routes[0].path"),
        (3, "routes[1].path"),
        (4, "routes[2].body_limit"),
    ]


def test_many_problems_are_counted() -> None:
    text = "routes:\n" + "".join(f"- {{name: r{n}, path: x}}\n" for n in range(150))
    with pytest.raises(ConfigError) as caught:
        loads(text)
    assert len(caught.value.problems) == 100
    assert caught.value.more == 50
    assert "and 50 more" in str(caught.value)


# ---- what is good


def test_defaults() -> None:
    assert loads("{}") == Settings()
    assert loads("service: {}\nroutes: []\n") == Settings()


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().service.mode = "observe"  # type: ignore[misc]


def test_units_are_canonical() -> None:
    found = loads(
        "latency: {budget: 1.5ms}\ntext: {body: 32KiB}\nlisten: {drain: 1.5s}\n"
        "detectors: {scanning: {window: 10m, share: 25%}}\nthresholds: {tag: 40%}"
    )
    assert found.latency.budget_us == 1500
    assert found.text.body_bytes == 32768
    assert found.listen.drain_s == 1.5
    assert found.detectors.scanning.window_s == 600
    assert found.detectors.scanning.share == 0.25
    assert found.thresholds.tag == 0.4


def test_written_form_reads_back() -> None:
    found = load(EXAMPLE, environment=False)
    written = yaml.safe_load(found.model_dump_json(by_alias=True, exclude_unset=True))
    assert loads(yaml.safe_dump(written)) == found


def test_effective_routes() -> None:
    found = loads("""
service: {mode: observe}
thresholds: {tag: 0.4}
routes:
  - {name: a, path: /a, thresholds: {block: null}, budget: 2ms, mode: enforce, body_limit: 1KiB}
  - {name: b, path: /b/**, methods: [POST], body: none, login: true}
""")
    default, first, second = found.effective_routes()
    assert (default.index, default.name, default.path, default.budget_us, default.mode) == (
        0,
        "default",
        "/**",
        1000,
        "observe",
    )
    assert (first.index, first.mode, first.budget_us, first.body_limit_bytes) == (1, "enforce", 2000, 1024)
    assert first.thresholds.block is None
    assert first.thresholds.tag == 0.4
    assert (second.mode, second.body, second.methods, second.login) == ("observe", "none", ("POST",), True)
    assert second.thresholds == found.thresholds


def test_whatever_is_good_compiles_to_a_policy() -> None:
    """The bounds here are those of the policy that the data plane reads."""
    long = "/" + "x" * 127
    routes = ", ".join(f"{{name: r{n}, path: '{long[:100]}{n}', methods: [GET, PURGE]}}" for n in range(254))
    ranges = ", ".join(f"10.{n >> 7}.{(n & 127) * 2}.0/24" for n in range(1024))
    headers = ", ".join(f"{'h' * 60}{n}" for n in range(32))
    policy = compile_policy(
        loads(f"""
routes: [{{name: last, path: '{long}'}}, {routes}]
lists: {{block: [{ranges}]}}
text: {{headers: [{headers}], values: 4096, windows: 8192, decode_rounds: 5}}
client: {{principal: [{", ".join(f"{{header: h{n}}}" for n in range(8))}], trusted_hops: 16}}
detectors: {{scanning: {{window: 1h}}, request_flood: {{window: 1s}}, hold: 1h}}
answers: {{throttle: {{retry_after: 1h}}}}
""")
    )
    assert len(policy["routes"]) == 256
    assert len(policy["ranges"]) == 1024
    assert len(compile_policy(load(EXAMPLE, environment=False))["routes"]) == 5


def test_yaml_1_2_scalars() -> None:
    found = loads(
        "service: {name: no}\nlists: {block: ['192.0.2.1', 2001:db8::1]}\nclient: {trusted_hops: 0x3}"
    )
    assert found.service.name == "no"
    assert [str(network) for network in found.lists.block] == ["192.0.2.1/32", "2001:db8::1/128"]
    assert found.client.trusted_hops == 3


def test_merge_keys() -> None:
    found = loads("""
routes:
  - &base {name: a, path: /a, budget: 2ms, body: none}
  - {<<: *base, name: b, path: /b}
  - {<<: [*base, {mode: observe}], name: c, path: /c, budget: 3ms}
""")
    assert [(r.name, r.budget_us, r.body, r.mode) for r in found.routes] == [
        ("a", 2000, "none", None),
        ("b", 2000, "none", None),
        ("c", 3000, "none", "observe"),
    ]


def test_byte_order_mark_and_windows_line_ends() -> None:
    assert loads(b"\xef\xbb\xbfservice:\r\n  mode: observe\r\n").service.mode == "observe"


def test_principals() -> None:
    sources = loads(
        "client: {principal: [{header: X-API-Key}, {cookie: sid}, {jwt_claim: sub, header: X-Token}, "
        "{jwt_claim: sub}, {basic: true}]}"
    ).client.principal
    assert [source.kind for source in sources] == ["header", "cookie", "jwt_claim", "jwt_claim", "basic"]
    assert [source.header_name for source in sources] == [
        "x-api-key",
        "cookie",
        "x-token",
        "authorization",
        "authorization",
    ]


@pytest.mark.parametrize(
    ("wide", "narrow", "covers"),
    [
        ("/**", "/", True),
        ("/**", "/a/b", True),
        ("/api/**", "/api", True),
        ("/api/**", "/api/", True),
        ("/api/**", "/apix", False),
        ("/api/*", "/api/x", True),
        ("/api/*", "/api/x/y", False),
        ("/api/*", "/api/*", True),
        ("/api/*", "/api/**", False),
        ("/api/x", "/api/*", False),
        ("/*/x", "/a/x", True),
        ("/*/x", "/a/y", False),
        ("/a/**", "/a/*/b/**", True),
        ("/a/b/**", "/a/**", False),
    ],
)
def test_covers(wide: str, narrow: str, covers: bool) -> None:
    assert _covers(wide, narrow) is covers


_SEGMENT = st.sampled_from(["a", "b", "*"])
_PATTERN = st.builds(
    lambda parts, rest: "/" + "/".join([*parts, "**"] if rest else parts),
    st.lists(_SEGMENT, min_size=1, max_size=3),
    st.booleans(),
)


def _matches(pattern: str, path: str) -> bool:
    wanted, given_parts = pattern.split("/")[1:], path.split("/")[1:]
    for place, part in enumerate(wanted):
        if part == "**":
            return len(given_parts) >= place
        if place >= len(given_parts) or part not in ("*", given_parts[place]):
            return False
    return len(wanted) == len(given_parts)


@given(_PATTERN, _PATTERN)
def test_covers_means_what_it_says(wide: str, narrow: str) -> None:
    """By enumeration of short paths: covered patterns match nothing that the wider one doesn't, and a
    pattern that isn't covered has such a path (the letter c stands for any other segment)."""
    paths = ["/" + "/".join(parts) for parts in _paths(4)]
    escaped = [path for path in paths if _matches(narrow, path) and not _matches(wide, path)]
    assert _covers(wide, narrow) == (not escaped)


def _paths(longest: int) -> list[list[str]]:
    found: list[list[str]] = [[part] for part in "abc"]
    level = found
    for _ in range(longest - 1):
        level = [[*parts, part] for parts in level for part in "abc"]
        found = found + level
    return found


# ---- hostile and broken files


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes(data: bytes) -> None:
    """Anything is either good or a ConfigError with printable problems."""
    error = refusal_of(data)
    if error is not None:
        assert error.problems
        assert str(error).replace("\n", "").isprintable()


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["5ms", "64KiB", "/api/**", "block", "enforce", "10.0.0.0/8", "x-api-key"]),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.text(max_size=5)
            | st.sampled_from(
                sorted(
                    (
                        "service",
                        "routes",
                        "name",
                        "path",
                        "thresholds",
                        "block",
                        "client",
                        "principal",
                        "header",
                        "lists",
                        "allow",
                        "detectors",
                        "latency",
                        "budget",
                        "methods",
                        "text",
                        "body",
                    )
                )
            ),
            below,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(list(Settings.model_fields)), _JSON, max_size=4))
def test_any_structure(data: dict[str, Any]) -> None:
    """Wrong shapes at any depth are problems with a path, never another exception."""
    error = refusal_of(yaml.safe_dump(data))
    if error is not None:
        assert all(problem.what and problem.remedy for problem in error.problems)


@pytest.mark.parametrize(
    "text",
    [
        "service: " + "[" * 100_000,
        "service: " + "{a: " * 10_000,
        "- " * 100_000,
        "a: &a [x]\n"
        + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 50)}]" for n in range(50)),
        "&a a: *a",
        "a: &x {<<: *x}",
        "a: &x {<<: [*x, *x]}",
        "? [a]\n: b",
        "service: {name: " + "9" * 10_000 + "}",
        "!" * 1000,
        "%YAML 9.9\n---\na: b",
        "a: !!binary aGVsbG8=",
        "a: !!timestamp 2001-01-01",
        "a: !!set {b}",
        "a: !!int x",
        "a: !!float x",
        "a: !!bool x",
        "a: !!null x",
        "a: !!map x",
        "a: !!seq x",
        "!!str a: b",
        "lists:\n  allow:\n" + "".join(f"  - x{n}\n" for n in range(49_000)),
        "lists: {allow: [" + ", ".join(f"10.0.{n}.1/24" for n in range(256)) + ", 10.0.0.0/8" * 20_000 + "]}",
        "routes:\n" + "".join(f"- {{name: a, path: /a, x{n}: 1}}\n" for n in range(5_000)),
        "client:\n  principal:\n" + "  - {header: 1}\n" * 10_000,
        '"\\ud800": 1',
        'arena: {path: "/\\ud800"}',
    ],
    ids=itertools.count(),
)
def test_hostile_yaml_is_refused_quickly(text: str) -> None:
    start = time.process_time()
    assert problems_of(text)
    assert time.process_time() - start < 10


def test_size_limit(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (1 << 20) + b"\n{}")
    with pytest.raises(ConfigError, match="larger than 1MiB"):
        load(big)
    assert "larger" in problems_of(b"#" * (1 << 20) + b"\n{}")[0].what
    assert "1048579 characters" in problems_of("#" * (1 << 20) + "\n{}")[0].what


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"not a regular file|Is a directory"):
        load(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ConfigError, match="not a regular file"):
        load(fifo)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(f"{tmp_path}/a\0b")
    with pytest.raises(ConfigError) as caught:
        load(f"{tmp_path}/\x1b[31mred\n.yaml")
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranges_that_cut_one_another_fit_the_policy() -> None:
    """The longest lists that are taken, in the arrangement that makes the most separate ranges."""
    allow = ", ".join(f"10.{n >> 7}.{(n & 127) * 2}.0/24" for n in range(1024))
    block = ", ".join(["10.0.0.0/8", *(f"2001:db8:{n:x}::/48" for n in range(0, 2046, 2))])
    ranges = compile_policy(loads(f"lists: {{allow: [{allow}], block: [{block}]}}"))["ranges"]
    assert len(ranges) <= 4096
    found = problems_of(f"lists: {{allow: [{allow}, '::1'], block: [{block}, '::2']}}")
    assert [p.path for p in found] == ["lists.allow", "lists.block"]


# ---- the machine


def environment_problems(text: str) -> list[tuple[str, str]]:
    error = refusal_of(text, environment=True)
    return [(problem.path, problem.what) for problem in error.problems] if error else []


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o400)
    return path


def test_environment_is_only_checked_when_asked(tmp_path: Path) -> None:
    text = f"arena: {{path: {tmp_path}/missing/arena}}"
    loads(text)
    ((path, what),) = environment_problems(text)
    assert path == "arena.path"
    assert "does not exist" in what


def test_good_environment(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.sock")  # relative: the name of a test's folder can be too long for a socket
        text = (
            f"arena: {{path: {tmp_path}/arena}}\nclient: {{key_file: {key}}}\n"
            f"models: {{bundle: {bundle}, cache: {tmp_path}/new/cache}}\n"
            f"decision_log: {{path: {tmp_path}/log.jsonl}}\n"
        )
        if len(str(tmp_path)) < 100:
            text += f"listen: {{address: 'unix:{tmp_path}/s.sock'}}\n"
        assert environment_problems(text) == []


def test_socket_place_is_taken(tmp_path: Path) -> None:
    path = Path(f"/tmp/outrider-test-{os.getpid()}")
    path.write_text("")
    try:
        ((where, what),) = environment_problems(
            f"listen: {{address: 'unix:{path}'}}\narena: {{path: {tmp_path}/a}}"
        )
    finally:
        path.unlink()
    assert where == "listen.address"
    assert "not a socket" in what


@pytest.mark.parametrize("mode", [0o444, 0o604, 0o460, 0o777])
def test_key_open_to_others(tmp_path: Path, key: Path, mode: int) -> None:
    key.chmod(mode)
    ((path, what),) = environment_problems(f"arena: {{path: {tmp_path}/a}}\nclient: {{key_file: {key}}}")
    assert path == "client.key_file"
    assert f"mode {mode:04o}" in what
    assert stat.S_IMODE(key.stat().st_mode) == mode


@pytest.mark.parametrize("length", [0, 15, 4097])
def test_key_length(tmp_path: Path, key: Path, length: int) -> None:
    key.chmod(0o600)
    key.write_bytes(b"k" * length)
    ((path, what),) = environment_problems(f"arena: {{path: {tmp_path}/a}}\nclient: {{key_file: {key}}}")
    assert path == "client.key_file"
    assert f"{length} bytes" in what


def test_missing_key_bundle_and_log_folder(tmp_path: Path) -> None:
    found = environment_problems(
        f"arena: {{path: {tmp_path}}}\nclient: {{key_file: {tmp_path}/no}}\n"
        f"models: {{bundle: {tmp_path}}}\ndecision_log: {{path: {tmp_path}/no/log}}\n"
        f"listen: {{address: 'unix:/nonexistent/x.sock'}}"
    )
    assert [path for path, _ in found] == [
        "arena.path",
        "client.key_file",
        "models.bundle",
        "decision_log.path",
        "listen.address",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    ((path, what),) = environment_problems(f"arena: {{path: {folder}/a}}")
    assert path == "arena.path"
    assert "not writable" in what
