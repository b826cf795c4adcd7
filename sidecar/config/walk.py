"""The settings as a list: every field with its path, for messages, documentation and comparison."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sidecar.config.problems import Path
from sidecar.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Setting:
    path: tuple[str, ...]  # as written; "[]" stands for any item of a list
    info: FieldInfo
    attribute: str
    section: type[BaseModel] | None  # of a group of settings, or of the items of a list of groups
    many: bool  # a list

    @property
    def restart(self) -> bool:
        """Takes effect only at the next start."""
        extra = self.info.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get("x-restart"))


def written(attribute: str, info: FieldInfo) -> str:
    """The key that an operator writes for a field."""
    return info.alias or attribute


def settings_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every setting below a model, groups before their members, in the order of declaration."""
    for attribute, info in model.model_fields.items():
        section, many = _section(info.annotation)
        here = (*path, written(attribute, info))
        yield Setting(here, info, attribute, section, many)
        if section is not None:
            yield from settings_of(section, (*here, "[]") if many else here)


def _section(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _section(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            found = _section(part)
            if found != (None, False):
                return found
        return None, False
    if origin is tuple:
        return _section(typing.get_args(annotation)[0])[0], True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    return None, False


ALL: tuple[Setting, ...] = tuple(settings_of(Settings))
_BY_PATH = {setting.path: setting for setting in ALL}


def general(path: Path) -> tuple[str, ...]:
    """A concrete path with its indices made general: ("routes", 2, "name") -> ("routes", "[]", "name")."""
    return tuple("[]" if isinstance(part, int) else part for part in path)


def setting_at(path: Path) -> Setting | None:
    """The setting at a concrete path, if there is one."""
    return _BY_PATH.get(general(path))


def keys_at(path: Path) -> tuple[str, ...]:
    """The keys that may be written in the group at a path."""
    parent = general(path)
    return tuple(s.path[-1] for s in ALL if s.path[:-1] == parent)
