"""What differs between two Settings, and what of it can be taken up while serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sidecar.config import walk
from sidecar.config.settings import Settings

_SHOWN_MAX = 80
_MISSING = "(none)"


@dataclass(frozen=True, slots=True)
class Change:
    """One setting: dotted path (routes by name), old and new value as written, cut at 80 characters."""

    path: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}: {self.old} -> {self.new}"


@dataclass(frozen=True, slots=True)
class Changes:
    applied: tuple[Change, ...]
    needs_restart: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.applied or self.needs_restart)


def diff(old: Settings, new: Settings) -> Changes:
    """Every setting whose value differs, sorted into those that take effect now and those that wait."""
    before, after = dict(_leaves(_dump(old))), dict(_leaves(_dump(new)))
    restart = {".".join(setting.path) for setting in walk.ALL if setting.restart}
    applied: list[Change] = []
    waiting: list[Change] = []
    for path in [*before, *(path for path in after if path not in before)]:
        was, now = before.get(path, _MISSING), after.get(path, _MISSING)
        if was != now:
            (waiting if path in restart else applied).append(Change(path, _cut(was), _cut(now)))
    return Changes(tuple(applied), tuple(waiting))


def take_up(running: Settings, new: Settings) -> Settings:
    """The new settings with the running values where a change needs a restart."""
    sections: dict[str, BaseModel] = {}
    for setting in walk.ALL:
        if not setting.restart:
            continue
        # settings that need a restart stand directly in a section (a test holds the models to that)
        section, attribute = setting.path[0], setting.attribute
        current = sections.get(section, getattr(new, section))
        value = getattr(getattr(running, section), attribute)
        if getattr(current, attribute) != value:
            sections[section] = current.model_copy(update={attribute: value})
    return new.model_copy(update=sections) if sections else new


def _dump(settings: Settings) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(settings.model_dump_json(by_alias=True))
    # null and absent mean different things for a route's thresholds and escalation: only what is given counts
    for route, model in zip(data["routes"], settings.routes, strict=True):
        for section in ("thresholds", "escalation"):
            own = getattr(model, section)
            route[section] = json.loads(own.model_dump_json(by_alias=True, include=own.model_fields_set))
    return data


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    elif (
        isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value)
    ):
        for item in value:
            yield from _leaves(
                {key: below for key, below in item.items() if key != "name"}, f"{path}[{item['name']}]"
            )
        yield f"{path} (order)", json.dumps([item["name"] for item in value])
    elif path == "routes":
        yield f"{path} (order)", "[]"
    else:
        yield path, json.dumps(value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 3] + "..."
