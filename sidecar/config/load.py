"""A configuration file into Settings, or every problem in it at once.

Steps: bytes -> text -> data with places (tree.py) -> single values (pydantic) -> what must hold
between them (checks.py). A value found wrong is left out before the next step, so that one mistake
doesn't hide the others and isn't reported twice. Environment variables are not substituted: a file
means the same wherever it is read, and secrets stand in files of their own.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable
from typing import Any

import annotated_types
from pydantic import ValidationError

from sidecar import units
from sidecar.config import checks, walk
from sidecar.config.problems import PROBLEMS_MAX, ConfigError, Path, Problem, dotted, printable
from sidecar.config.settings import Settings
from sidecar.config.tree import TEXT_BYTES_MAX, Tree, parse


def load(path: str | os.PathLike[str], *, environment: bool = True) -> Settings:
    """Settings of a file. With environment also what the machine must have (folders, key file) is
    checked. Raises ConfigError, also where the file can't be read."""
    return loads(read(path), os.fspath(path), environment=environment)


def loads(text: str | bytes, source: str = "configuration", *, environment: bool = False) -> Settings:
    """Settings of YAML text; source names it in messages. Raises ConfigError with all problems."""
    if isinstance(text, bytes):
        text = _decoded(text, source)
    elif len(text) > TEXT_BYTES_MAX:
        raise _one(source, f"the text has {len(text)} characters", "at most 1MiB is read")
    tree = parse(text.removeprefix("\ufeff"), source)
    if not isinstance(tree.data, dict):
        raise _error(tree.problems)
    settings = _validated(tree)
    if settings is None:
        raise _error(tree.problems)
    return _crossed(tree, settings, environment)


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most 1 MiB; ConfigError otherwise."""
    name = os.fspath(path)
    try:
        # non-blocking: opening a FIFO must not wait for a writer
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _one(name, "it is not a regular file", "name a YAML file")
            text = file.read(TEXT_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _one(name, f"the file cannot be read: {reason}", "check its name and permissions") from error
    if len(text) > TEXT_BYTES_MAX:
        raise _one(
            name, "the file is larger than 1MiB", "move address lists to the blocklist, or split the service"
        )
    return text


def _one(
    source: str, what: str, remedy: str, line: int | None = None, column: int | None = None
) -> ConfigError:
    return ConfigError([Problem(printable(source), line, column, "", what, remedy)])


def _error(problems: Iterable[Problem]) -> ConfigError:
    ordered = sorted(set(problems), key=lambda p: (p.line or 0, p.column or 0, p.path, p.what))
    return ConfigError(ordered[:PROBLEMS_MAX], max(0, len(ordered) - PROBLEMS_MAX))


def _decoded(data: bytes, source: str) -> str:
    if len(data) > TEXT_BYTES_MAX:
        raise _one(
            source,
            "the file is larger than 1MiB",
            "move address lists to the blocklist, or split the service",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode("utf-8", "replace")) + 1
        raise _one(
            source,
            f"the byte 0x{data[error.start]:02x} is not UTF-8",
            "save the file as UTF-8",
            before.count(b"\n") + 1,
            column,
        ) from error


# ---- single values


def _validated(tree: Tree) -> Settings | None:
    """Settings from what is right in the tree; problems and the paths left out go into the tree."""
    for _ in range(4):  # leaving out a broken value can make its group incomplete, which then goes too
        data, originals = _pruned(tree.data, (), tree.refused)
        try:
            tree.data_originals = originals
            return Settings.model_validate(data, by_alias=True, by_name=False)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                loc = _original(tuple(problem["loc"]), originals)
                _add(tree, loc, dict(problem))
    return None


def _add(tree: Tree, loc: Path, error: dict[str, Any]) -> None:
    kind = error["type"]
    if kind == "missing" and loc in tree.refused:
        # its value was wrong and is reported: the whole group can't be used
        tree.refuse(loc[:-1])
        return
    if isinstance(error.get("input"), dict) and kind == "outrider" and loc in tree.above:
        # the group is wrong only because a member of it is, and that is reported
        tree.refuse(loc)
        return
    what, remedy = _explained(loc, error)
    tree.problems.append(tree.at(loc, what, remedy, key=kind == "extra_forbidden"))
    tree.refuse(loc)
    if kind == "missing":
        tree.refuse(loc[:-1])


def _pruned(data: Any, path: Path, refused: set[Path]) -> tuple[Any, dict[Path, list[int]]]:
    """A copy without what stands at refused paths, and for every shortened list (by its original path)
    the original index of each item that is left."""
    originals: dict[Path, list[int]] = {}
    if isinstance(data, dict):
        kept: Any = {}
        for key, value in data.items():
            if (*path, key) not in refused:
                kept[key], below = _pruned(value, (*path, key), refused)
                originals |= below
        return kept, originals
    if isinstance(data, list):
        kept = []
        left = [index for index in range(len(data)) if (*path, index) not in refused]
        for index in left:
            value, below = _pruned(data[index], (*path, index), refused)
            kept.append(value)
            originals |= below
        if len(left) != len(data):
            originals[path] = left
        return kept, originals
    return data, originals


def _original(loc: Path, originals: dict[Path, list[int]]) -> Path:
    """A path in the pruned data as a path in the file."""
    path: Path = ()
    for part in loc:
        if isinstance(part, int) and path in originals:
            left = originals[path]
            part = left[part] if part < len(left) else part
        path = (*path, part)
    return path


def _explained(loc: Path, error: dict[str, Any]) -> tuple[str, str]:
    """What is wrong and what would be right, for one of pydantic's errors."""
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    shown = units.shown(value)
    setting = walk.setting_at(loc)
    if kind == "outrider":
        return str(context["what"]), str(context["remedy"])
    if kind == "extra_forbidden":
        return "there is no such setting", _did_you_mean(loc)
    if kind == "missing":
        return "is missing", f"add {loc[-1]}: {_example(setting)}"
    if kind == "literal_error":
        return f"{_kind(value)} is not one of the choices", _choice(value, _choices(error))
    if kind in ("greater_than_equal", "less_than_equal"):
        side = "below the minimum" if kind == "greater_than_equal" else "above the maximum"
        return f"{shown} is {side}", _bounds(setting)
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return f"{shown} is not a whole number", _bounds(setting)
    if kind in ("bool_type", "bool_parsing"):
        likely = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(str(value).lower())
        return f"{shown} is not true or false", f"write {likely or 'true or false'}"
    if kind == "string_type":
        if value is None:
            return "has no value", "write a value or remove the line"
        if isinstance(value, (dict, list)):
            return "is not text", "write one value"
        return f"{shown} is not text", f"put it in quotes: '{value}'"
    if kind in ("tuple_type", "list_type"):
        return f"{_kind(value)} is not a list", "write [a, b], or one item per line after a dash"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = ", ".join(walk.keys_at(loc)[:6])
        if value is None:
            return "has no settings", "remove it, or indent some below it: " + keys
        return f"{_kind(value)} is not a group of settings", f"indent settings below it: {keys}"
    if kind == "too_long":
        return f"has {context.get('actual_length')} items", f"use at most {context.get('max_length')}"
    return printable(str(error["msg"])), "see outrider schema"


def _kind(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return units.shown(value)


def _example(setting: walk.Setting | None) -> str:
    examples = setting.info.examples if setting else None
    return str(examples[0]) if examples else "..."


def _choices(error: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str((error.get("ctx") or {}).get("expected", ""))) or ["true"]


def _choice(value: object, choices: list[str]) -> str:
    close = difflib.get_close_matches(value.lower(), choices, n=1) if isinstance(value, str) else []
    usual = choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    return f"did you mean {close[0]}? Use {usual}" if close else f"use {usual}"


def _bounds(setting: walk.Setting | None) -> str:
    low = high = None
    for mark in setting.info.metadata if setting else []:
        if isinstance(mark, annotated_types.Ge):
            low = mark.ge
        elif isinstance(mark, annotated_types.Le):
            high = mark.le
    return f"use a whole number from {low} to {high}" if low is not None else "write a whole number"


_UNIT_TAIL = re.compile(r"_(us|ms|s|sec|seconds|bytes|kib|mib)$")


def _plain(key: str) -> str:
    """A key with the ways of writing it evened out: failureMode, failure-mode -> failure_mode."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(" ", "_")


def _did_you_mean(loc: Path) -> str:
    name, parent = str(loc[-1]), loc[:-1]
    siblings = walk.keys_at(parent)
    plain = _plain(name)[:100]
    stripped = _UNIT_TAIL.sub("", plain)
    for candidate in (plain, stripped):
        if candidate in siblings:
            hint = ", with its unit in the value" if candidate != plain else ""
            return f"did you mean {candidate}{hint}?"
    # the same key elsewhere is a better guess than a merely similar one here
    elsewhere = [dotted(s.path).replace(".'[]'", "[]") for s in walk.ALL if s.path[-1] in (plain, stripped)]
    close = difflib.get_close_matches(stripped, siblings, n=1, cutoff=0.6)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    if close:
        return f"did you mean {close[0]}?"
    return f"remove it; here stand: {', '.join(siblings)}" if siblings else "remove it"


# ---- between values


def _crossed(tree: Tree, settings: Settings, environment: bool) -> Settings:
    findings = list(checks.between(settings))
    if environment:
        findings += checks.environment(settings)
    said: set[tuple[Path, str]] = set()  # one value against several others is one mistake
    for finding in findings:
        paths = [_original(path, tree.data_originals) for path in finding.paths]
        if any(
            path in tree.above or any(path[: n + 1] in tree.refused for n in range(len(path)))
            for path in paths
        ):
            continue  # what it looked at, something above it or something below it was left out
        if (paths[0], finding.remedy) in said:
            continue
        said.add((paths[0], finding.remedy))
        tree.problems.append(tree.at(paths[0], finding.what, finding.remedy))
    if tree.problems:
        raise _error(tree.problems)
    return settings


__all__ = ["ConfigError", "Problem", "load", "loads", "read"]
