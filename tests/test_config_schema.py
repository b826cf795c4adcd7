"""Schema, example and reference are made from the models and agree with what the loader takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sidecar.config import ConfigError, Problem, Settings, load, loads
from sidecar.config import document as documents
from sidecar.config.schema import schema
from sidecar.config.walk import ALL, Setting

SCHEMA = schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
EXAMPLE = yaml.safe_load(documents.EXAMPLE.read_text(encoding="utf-8"))
BAD = Path(__file__).parent / "testdata" / "bad"


def words(path: tuple[str, ...]) -> str:
    return ".".join(path).replace(".[]", "[]")


# ---- example and reference


def test_documents_are_up_to_date() -> None:
    assert documents.EXAMPLE.read_text(encoding="utf-8") == documents.example(), documents.__doc__
    assert documents.REFERENCE.read_text(encoding="utf-8") == documents.reference(), documents.__doc__


def test_stale_documents_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "EXAMPLE", tmp_path / "example.yaml")
    monkeypatch.setattr(documents, "REFERENCE", tmp_path / "CONFIGURATION.md")
    assert documents.main(["--check"]) == 1
    assert documents.main([]) == 0
    assert documents.main(["--check"]) == 0
    (tmp_path / "example.yaml").write_text("{}")
    assert documents.main(["--check"]) == 1


def test_example_is_the_defaults() -> None:
    """All sections but the example routes are at their defaults, and written out as such."""
    found = load(documents.EXAMPLE, environment=False)
    assert found.model_copy(update={"routes": ()}) == Settings()
    assert found.routes


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: words(setting.path))
def test_every_setting_is_in_the_example(setting: Setting) -> None:
    nodes: list[Any] = [EXAMPLE]
    for part in setting.path:
        if part == "[]":
            nodes = [item for node in nodes for item in node]
        else:
            nodes = [node[part] for node in nodes if part in node]
    # a principal's source has one kind at a time: cookie is not among the defaults
    assert nodes or setting.path == ("client", "principal", "[]", "cookie")


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: words(setting.path))
def test_every_setting_is_told(setting: Setting) -> None:
    """A description, a row in the reference, and for whatever has no default an example."""
    assert setting.info.description
    assert setting.info.description[-1] in ".)"
    text = documents.REFERENCE.read_text(encoding="utf-8")
    if len(setting.path) > 1:
        parent = setting.path[:-1]
        section = text.split(f"## {words(parent[:-1] if parent[-1] == '[]' else parent)}\n")[1].split(
            "\n## "
        )[0]
        assert f"| `{setting.path[-1]}` |" in section
    else:
        assert f"\n## {setting.path[0]}\n" in text
    assert setting.info.examples or not setting.info.is_required()


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: words(setting.path))
def test_names_carry_their_unit(setting: Setting) -> None:
    """What is written with a unit is kept in a field whose name ends in it."""
    node = documents._node(setting.path)
    pattern = "".join(part.get("pattern", "") for part in [node, *node.get("anyOf", [])])
    if "KiB" in pattern:
        assert setting.attribute == f"{setting.path[-1]}_bytes"
    elif "ms|" in pattern or "10m|" in pattern:
        assert setting.attribute in (f"{setting.path[-1]}_us", f"{setting.path[-1]}_s")
    else:
        assert setting.attribute == setting.path[-1]


def test_restart_settings_stand_in_a_section() -> None:
    """take_up() relies on it."""
    restart = [setting for setting in ALL if setting.restart]
    assert {setting.path[0] for setting in restart} == {"listen", "admin", "arena", "client", "judge", "judge_store"}
    assert all(len(setting.path) == 2 for setting in restart)


# ---- schema


def test_schema_is_valid_and_self_contained() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    text = json.dumps(SCHEMA)
    assert "$ref" not in text
    for keyword in ('"x-minimum"', '"x-maximum"', '"x-kind"', '"x-restart"', '"$defs"'):
        assert keyword not in text


def nodes(node: Any) -> Any:
    if isinstance(node, dict):
        yield node
        for key, value in node.items():
            if key not in ("default", "examples"):
                yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


def test_groups_are_closed_and_settings_described() -> None:
    groups = [node for node in nodes(SCHEMA) if "properties" in node and "type" in node]
    assert len(groups) > 20
    for group in groups:
        assert group["additionalProperties"] is False
        for name, node in group["properties"].items():
            assert node["description"], name


def test_schema_takes_the_example_and_every_default() -> None:
    assert list(VALIDATOR.iter_errors(EXAMPLE)) == []
    assert list(VALIDATOR.iter_errors({})) == []
    for node in nodes(SCHEMA):
        for value in [*([node["default"]] if "default" in node else []), *node.get("examples", [])]:
            assert list(jsonschema.Draft7Validator(node).iter_errors(value)) == [], (node, value)


def test_schema_refuses() -> None:
    for bad in (
        {"servcie": {}},
        {"latency": {"budget": 5}},
        {"latency": {"budget": "5"}},
        {"service": {"mode": "off"}},
        {"routes": [{"name": "a"}]},
        {"text": {"values": 0}},
        {"thresholds": {"tag": 2}},
        {"client": {"principal": [{}]}},
        {"client": {"principal": [{"header": "a", "cookie": "b"}]}},
    ):
        assert not VALIDATOR.is_valid(bad), bad


ODD: list[Any] = [
    "sqlite",
    "cpu",
    "auto",
    [0],
    {},
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    5,
    100,
    255,
    256,
    404,
    429,
    1000,
    1024,
    4096,
    65536,
    10**9,
    0.0,
    0.5,
    1.0,
    1.5,
    -0.5,
    "",
    "x",
    "X",
    "a b",
    "0",
    "1",
    "5ms",
    "5 ms",
    "1.5ms",
    "30s",
    "60s",
    "1m",
    "10m",
    "1h",
    "2h",
    "0s",
    "1us",
    "1KiB",
    "64KiB",
    "64KB",
    "1MiB",
    "9GiB",
    "0B",
    "20%",
    "200%",
    "0.5",
    "enforce",
    "open",
    "grpcio",
    "flagged",
    "block",
    "allow",
    "buffered",
    "info",
    "json",
    "default",
    "-",
    "/a",
    "/api/**",
    "/a*",
    "a/b",
    "127.0.0.1:80",
    "[::1]:80",
    "::1:80",
    "localhost:1",
    "unix:/a",
    "unix:a",
    "10.0.0.0/8",
    "10.0.0.1/8",
    "::1",
    "GET",
    "get",
    [],
    ["x"],
    ["GET"],
    ["text"],
    ["block"],
    ["10.0.0.0/8"],
    [{}],
    [{"basic": True}],
    [{"header": "h"}],
    {},
    {"x": 1},
    {"tag": 0.1},
    "\n",
    "x\n",
    "é",
    "x" * 64,
    "x" * 65,
    "x" * 5000,
    "/" + "x" * 200,
]
# What a schema has no words for; everything else it must refuse where the loader does.
LOOSE = (
    "is above queue_max",
    "TLS",
    "outside 0 to 1",
    "above the maximum",
    "below the minimum",
    "power of two",
    "is not a whole number of",
    "bits set",
    "every address",
    "address range",
    "does not exist",
    "has no absolute path",
    "socket path",
    "is not an IP address",
    "is ambiguous",
    "brackets",
    "stands inside",
    "stands before",
    "empty segment",
    "characters that no path has",
    "in the list already",
    "has no effect",
    "threshold of",
    "no score reaches",
    "does not fit",
    "above text.body",
    "is also",
    "is taken",
    "bytes",
    "is not a path",
    "control characters",
)


def problems_of(text: str) -> tuple[Problem, ...] | None:
    try:
        loads(text)
    except ConfigError as error:
        return error.problems
    return None


def placed(path: tuple[str, ...], value: Any) -> Any:
    """A configuration with one value at a path, and what its group needs beside it."""
    for place in range(len(path) - 1, -1, -1):
        part = path[place]
        if part == "[]":
            value = [value]
        else:
            value = {part: value}
            if path[:place] == ("routes", "[]"):
                value = {"name": "r", "path": "/r", **value}
            if path[:place] == ("client", "principal", "[]") and part == "header":
                value = {"jwt_claim": "sub", **value}
    return value


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: words(setting.path))
def test_schema_and_loader_agree(setting: Setting) -> None:
    """For odd values at every setting: what the loader takes the schema takes; what the schema takes and the
    loader refuses is of a kind that a schema cannot express."""
    taken = 0
    for value in ODD:
        data = placed(setting.path, value)
        fits = VALIDATOR.is_valid(data)
        problems = problems_of(json.dumps(data))
        whole = isinstance(value, float) and value.is_integer()  # an integer to JSON Schema, none to YAML
        if problems is None:
            taken += 1
            assert fits, value
        elif fits and not whole:
            assert all(any(word in problem.what for word in LOOSE) for problem in problems), (value, problems)
    assert taken
