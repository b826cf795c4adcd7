"""CONFIGURATION.md and sidecar/config/example.yaml, written from the models.

    python -m sidecar.config.document            write both
    python -m sidecar.config.document --check    exit 1 if either is out of date

Nothing in them is written by hand, so they cannot drift from what the program does.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidecar.config.schema import bounds, schema
from sidecar.config.settings import Settings
from sidecar.config.walk import Setting, settings_of

EXAMPLE = Path(__file__).with_name("example.yaml")
REFERENCE = Path(__file__).resolve().parents[2] / "CONFIGURATION.md"
WIDTH = 100

# Items for lists of groups, which are empty by default and would show nothing. The first item of a
# list shows every key there is.
ITEMS: dict[tuple[str, ...], list[dict[str, Any]]] = {
    ("routes",): [
        {
            "name": "login",
            "path": "/login",
            "methods": ["POST"],
            "mode": "enforce",
            "budget": "2ms",
            "body": "buffered",
            "body_limit": "8KiB",
            "thresholds": {"tag": 0.4, "throttle": 0.6, "challenge": None, "block": 0.8},
            "escalation": {
                "enabled": True,
                "uncertain_from": 0.3,
                "uncertain_to": 0.8,
                "novel": None,
                "sample": "1%",
            },
            "exempt": False,
            "login": True,
        },
        {"name": "health", "path": "/healthz", "exempt": True},
        {
            "name": "uploads",
            "path": "/files/**",
            "methods": ["PUT", "POST"],
            "body": "none",
            "budget": "250us",
        },
        {"name": "search", "path": "/users/*/search", "mode": "observe", "thresholds": {"block": None}},
    ],
}

EXAMPLE_HEAD = """\
# Outrider configuration: every setting there is, at its default; only the routes are examples.
# A file needs no more than what differs from the defaults. Check one with `outrider check FILE`.
#
# Durations: 250us 5ms 30s 10m 1h 1d. Sizes: 512B 64KiB 1MiB. Shares and scores: 0.2 or 20%.
# Environment variables are not substituted; secrets stand in files of their own.
#
# Written by `python -m sidecar.config.document`; editors check it against `outrider schema`:
# yaml-language-server: $schema=outrider.schema.json
"""

REFERENCE_HEAD = """\
# Configuration

One YAML file, read by `outrider serve -c FILE` and checked by `outrider check FILE`, which reports every
mistake at once, each with its line and the remedy. All settings have defaults: the smallest
configuration is `{}`. [sidecar/config/example.yaml](sidecar/config/example.yaml) shows all of them in place.

**Units.** Durations: `250us` `5ms` `30s` `10m` `1h` `1d`; sizes: `512B` `64KiB` `1MiB`; a number
without unit is refused. Shares and scores: `0.2` or `20%`.

**YAML 1.2.** `yes`, `no`, `on` and `off` are text, not truth values. Keys given twice, unknown keys, object
tags and files above 1 MiB are refused. Anchors and `<<` work.

**No substitution.** Environment variables are not expanded; secrets stand in files (`client.key_file`).

**Reload.** A changed file is taken up by itself, and at once on SIGHUP. A file with mistakes is reported
and the running settings stay. Settings marked *restart* keep their running value until the next start.

**Editors.** `outrider schema > outrider.schema.json`, and at the top of the file
`# yaml-language-server: $schema=outrider.schema.json`.

This page is written by `python -m sidecar.config.document`.
"""


def example() -> str:
    """The text of example.yaml."""
    lines = [EXAMPLE_HEAD.rstrip("\n")]
    defaults = json.loads(Settings().model_dump_json(by_alias=True))
    for setting in settings_of(Settings):
        if len(setting.path) > 1:
            continue
        assert setting.section is not None
        lines += ["", *_comment(_words(setting.section.__doc__), "")]
        if setting.many:
            lines += _items(setting, ITEMS[setting.path])
        else:
            lines.append(f"{setting.path[0]}:")
            lines += _group(setting, defaults[setting.path[0]], "  ")
    return "\n".join(lines) + "\n"


def _group(group: Setting, values: dict[str, Any], indent: str) -> Iterator[str]:
    assert group.section is not None
    for setting in settings_of(group.section, group.path):
        if len(setting.path) != len(group.path) + 1:
            continue
        key = setting.path[-1]
        yield from _comment(_meaning(setting), indent)
        if setting.section is not None and not setting.many:
            yield f"{indent}{key}:"
            yield from _group(setting, values[key], indent + "  ")
        else:
            yield from _written(indent, key, _lean(values[key]))


def _items(group: Setting, items: list[dict[str, Any]]) -> Iterator[str]:
    assert group.section is not None
    yield f"{group.path[0]}:"
    meanings = {
        s.path[-1]: _meaning(s)
        for s in settings_of(group.section, (*group.path, "[]"))
        if len(s.path) == len(group.path) + 2
    }
    for number, item in enumerate(items):
        for place, (key, value) in enumerate(item.items()):
            if number == 0:
                yield from _comment(meanings[key], "  " if place == 0 else "    ")
            yield from _written("  - " if place == 0 else "    ", key, value)


def _lean(value: Any) -> Any:
    """Items of a list without the keys that say nothing."""
    if isinstance(value, list):
        return [
            {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
            for item in value
        ]
    return value


def _written(indent: str, key: str, value: Any) -> Iterator[str]:
    line = f"{indent}{key}: {_flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, list):
        yield line
        return
    yield f"{indent}{key}:"
    for item in value:
        yield f"{indent}  - {_flow(item)}"


def _flow(value: Any) -> str:
    """A value as short YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str):
        plain = value and all(c.isalnum() or c in "_./:-*" for c in value) and value[0] not in "*-:"
        return value if plain and not value.endswith(":") else json.dumps(value)
    return json.dumps(value)


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _meaning(setting: Setting) -> str:
    """The description, with the values it takes."""
    said = _words(setting.info.description)
    if setting.section is None or setting.many:
        allowed = _allowed(setting)
        said += f" [{allowed}{', restart' if setting.restart else ''}]" if allowed else ""
    return said


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
        break_long_words=False,
    )


_RAW: dict[str, Any] = {}


def _node(path: tuple[str, ...]) -> dict[str, Any]:
    """The schema of a setting, with its bounds still as keywords."""
    if not _RAW:
        _RAW.update(schema(worded=False))
    node: dict[str, Any] = _RAW
    for part in path:
        node = node["items"] if part == "[]" else node["properties"][part]
    return node


def _allowed(setting: Setting) -> str:
    """Which values a setting takes, in few words."""
    node = _node(setting.path)
    parts = [
        part
        for part in [node, *node.get("anyOf", [])]
        if part is not node or "type" in part or "enum" in part
    ]
    low, high = bounds(node)
    words: list[str] = []
    for part in parts:
        if "enum" in part:
            words += [str(value) for value in part["enum"]]
        elif "const" in part:
            words.append(json.dumps(part["const"]) if not isinstance(part["const"], str) else part["const"])
        elif "x-kind" in part:
            words.append(part["x-kind"])
        elif part.get("type") == "boolean":
            words += ["true", "false"]
        elif part.get("type") == "array":
            items = part.get("items", {})
            choices = f" of {', '.join(items['enum'])}" if "enum" in items else ""
            choices = f" of {items['x-kind']}s" if "x-kind" in items else choices
            words.append(f"list{choices}, at most {part['maxItems']}")
    if low is not None:
        words.append(f"{low} to {high}" if (low, high) != (0.0, 1.0) else "0 to 1")
    if any(part.get("type") == "null" for part in _flat(node)):
        words.append("null")
    return ", ".join(words)


def _flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for part in node.get("anyOf", []):
        yield from _flat(part)


def reference() -> str:
    """The text of CONFIGURATION.md."""
    lines = [REFERENCE_HEAD]
    for setting in settings_of(Settings):
        if setting.section is None:
            continue
        name = ".".join(setting.path).replace(".[]", "[]")
        lines += [f"## {name}", "", _words(setting.section.__doc__)]
        if setting.many:
            lines.append(f"A list, {_allowed(setting).removeprefix('list, ')} items.")
        lines += ["", "| setting | default | values | meaning |", "|---|---|---|---|"]
        prefix = (*setting.path, "[]") if setting.many else setting.path
        for member in settings_of(setting.section, prefix):
            if len(member.path) == len(prefix) + 1:
                lines.append(_row(member))
        lines.append("")
    return "\n".join(lines)


def _row(setting: Setting) -> str:
    required = setting.info.is_required()
    if setting.section is not None and not setting.many:
        default, allowed = "", f"see {'.'.join(setting.path).replace('.[]', '[]')}"
    else:
        value = None if required else _node(setting.path)["default"]
        default = "*required*" if required else f"`{_flow(value)}`"
        allowed = _allowed(setting)
    meaning = _words(setting.info.description) + (" *Restart.*" if setting.restart else "")
    cells = [f"`{setting.path[-1]}`", default, allowed, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str]) -> int:
    """Write both files, or with --check only compare; the exit code."""
    stale = 0
    for path, text in ((EXAMPLE, example()), (REFERENCE, reference())):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if "--check" in arguments:
            print(f"{path} is out of date: run python -m sidecar.config.document", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
