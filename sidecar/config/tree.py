"""YAML text into plain data, with the place of every key and value.

Only what configuration needs: mappings with text keys, lists, text, numbers, true/false, null;
scalars as in YAML 1.2 (`no`, `off` and `1:30` are text). Tags that would build objects, keys given
twice and anchors that expand into too much are refused. Nothing here raises on bad text; problems
are collected, so that one run reports them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sidecar import units
from sidecar.config.problems import Path, Problem, dotted, printable

TEXT_BYTES_MAX = 1 << 20
DEPTH_MAX = 16  # the settings need 5
NODES_MAX = 50_000  # after expansion of aliases

_TAG = "tag:yaml.org,2002:"
_KINDS = {"null", "bool", "int", "float", "str", "map", "seq", "merge"}
_DIGITS_MAX = 18


@dataclass(frozen=True, slots=True)
class Place:
    """1-based line and column of a value, and of its key where it has one."""

    line: int
    column: int
    key_line: int
    key_column: int


@dataclass
class Tree:
    source: str
    data: Any = None
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)  # paths that are left out of data
    # lists that were shortened for validation: by path, the original index of what is left
    data_originals: dict[Path, list[int]] = field(default_factory=dict)

    above: set[Path] = field(default_factory=set)  # paths below which something is left out

    def refuse(self, path: Path) -> None:
        """Leave out what stands at a path."""
        self.refused.add(path)
        self.above.update(path[:length] for length in range(1, len(path)))

    def at(self, path: Path, what: str, remedy: str, *, key: bool = False) -> Problem:
        """A problem at a path, or at the nearest path above that stands in the text."""
        known = path
        while known not in self.places and known:
            known = known[:-1]
            key = False
        place = self.places.get(known)
        if place is None:
            return Problem(self.source, None, None, dotted(path), what, remedy)
        line, column = (place.key_line, place.key_column) if key else (place.line, place.column)
        return Problem(self.source, line, column, dotted(path), what, remedy)


class _TooMuch(Exception):
    def __init__(self, mark: Any, what: str, remedy: str) -> None:
        self.mark, self.what, self.remedy = mark, what, remedy


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's way to declare them)
    depth = 0
    nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self.depth += 1
        self.nodes += 1
        if self.depth > DEPTH_MAX:
            raise _TooMuch(
                mark, f"nested deeper than {DEPTH_MAX} levels", "no setting lies that deep: remove levels"
            )
        if self.nodes > NODES_MAX:
            raise _TooMuch(mark, f"more than {NODES_MAX} values", "split or shorten the configuration")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))


def parse(text: str, source: str) -> Tree:
    """The data of a YAML text; tree.problems says what could not be read (data is then partial or None)."""
    tree = Tree(printable(source))
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except _TooMuch as error:
        tree.problems.append(_marked(tree, error.mark, error.what, error.remedy))
        return tree
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        tree.problems.append(
            Problem(
                tree.source,
                before.count("\n") + 1,
                error.position - (before.rfind("\n") + 1) + 1,
                "",
                f"the character U+{ord(text[error.position]):04X} is not allowed in YAML",
                "remove it, or write it as an escape in double quotes",
            )
        )
        return tree
    except yaml.MarkedYAMLError as error:
        tree.problems.append(_syntax(tree, error))
        return tree
    if root is None:
        tree.problems.append(
            Problem(
                tree.source, 1, 1, "", "the configuration is empty", "to run on the defaults alone write {}"
            )
        )
        return tree
    if not isinstance(root, MappingNode):
        tree.problems.append(
            _marked(
                tree,
                root.start_mark,
                "the configuration is not a mapping",
                "start with the name of a section, as service:",
            )
        )
        return tree
    builder = _Builder(tree)
    try:
        tree.data = builder.build(root, ())
    except _TooMuch as error:
        tree.data = None
        tree.problems.append(_marked(tree, error.mark, error.what, error.remedy))
    return tree


def _marked(tree: Tree, mark: Any, what: str, remedy: str) -> Problem:
    return Problem(tree.source, mark.line + 1, mark.column + 1, "", what, remedy)


def _syntax(tree: Tree, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    said = printable(error.problem or error.context or "not readable")
    remedy = "check the indentation, the colons and the quotes here and on the line before"
    if "'\\t'" in said:
        said, remedy = "a tab", "indent with spaces: YAML allows no tabs there"
    elif "another document" in said:
        said, remedy = "a second document starts", "keep one document: remove the --- line"
    elif "undefined alias" in said:
        remedy = "define it earlier with & or write the value out"
    elif "mapping values are not allowed" in said:
        remedy = "put a value that contains a colon in quotes, or check the indentation"
    return Problem(
        tree.source,
        mark.line + 1 if mark else None,
        mark.column + 1 if mark else None,
        "",
        f"not valid YAML: {said}",
        remedy,
    )


class _Builder:
    """Nodes to data. Aliases share nodes, so what is built is counted anew here."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.open: set[int] = set()
        self.built = 0

    def build(self, node: Node, path: Path, key: Node | None = None) -> Any:
        self.built += 1
        if self.built > NODES_MAX:
            raise _TooMuch(
                node.start_mark,
                f"aliases expand to more than {NODES_MAX} values",
                "write the values out instead of nesting aliases",
            )
        if id(node) in self.open:
            raise _TooMuch(node.start_mark, "an alias stands inside its own anchor", "write the value out")
        mark, key_mark = node.start_mark, (key or node).start_mark
        self.tree.places[path] = Place(mark.line + 1, mark.column + 1, key_mark.line + 1, key_mark.column + 1)
        if node.tag.removeprefix(_TAG) not in _KINDS:
            return self._refuse(
                path,
                f"the tag {units.shown(node.tag.replace(_TAG, '!!', 1))} is not allowed",
                "remove the tag",
            )
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            if isinstance(node, SequenceNode):
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open.discard(id(node))

    def _refuse(self, path: Path, what: str, remedy: str) -> None:
        self.tree.problems.append(self.tree.at(path, what, remedy))
        self.tree.refuse(path)

    def _problem(self, node: Node, path: Path, what: str, remedy: str) -> None:
        mark = node.start_mark
        self.tree.problems.append(
            Problem(self.tree.source, mark.line + 1, mark.column + 1, dotted(path), what, remedy)
        )

    def _merged(self, node: Node, path: Path) -> dict[str, Any]:
        """What `<<: *anchor` brings in; of several anchors the first that has a key gives it."""
        if isinstance(node, SequenceNode):
            built: dict[str, Any] = {}
            for source in reversed(node.value):
                built |= (
                    self._merged(source, path)
                    if isinstance(source, MappingNode)
                    else self._no_merge(source, path)
                )
            return built
        if not isinstance(node, MappingNode):
            return self._no_merge(node, path)
        self.built += 1
        if id(node) in self.open or self.built > NODES_MAX:
            raise _TooMuch(node.start_mark, "an alias stands inside its own anchor", "write the value out")
        self.open.add(id(node))
        try:
            return self._mapping(node, path)
        finally:
            self.open.discard(id(node))

    def _no_merge(self, node: Node, path: Path) -> dict[str, Any]:
        self._problem(
            node,
            path,
            "<< merges something that is not a mapping",
            "put the anchor before a mapping, or write the values out",
        )
        return {}

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        first: dict[str, int] = {}
        # merged values first, so that the mapping's own keys replace them
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                built = self._merged(value, path) | built
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, ScalarNode) or key.tag != f"{_TAG}str" or not key.value.isprintable():
                shown = units.shown(key.value) if isinstance(key, ScalarNode) else "a list or mapping"
                self._problem(key, path, f"{shown} cannot be a key", "use the name of a setting")
                continue
            name = key.value
            if name in first:
                self._problem(
                    key,
                    (*path, name),
                    f"the key stands twice, first in line {first[name]}",
                    "remove one of the two",
                )
                continue
            first[name] = key.start_mark.line + 1
            self.tree.refused.discard((*path, name))
            built[name] = self.build(value, (*path, name), key)
        return built

    def _scalar(self, node: Node, path: Path) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind in ("str", "merge"):
            if not text.isprintable():
                return self._refuse(path, f"{units.shown(text)} has control characters", "remove them")
            return text
        if kind == "null":
            return None
        if kind == "bool":
            if text.lower() not in ("true", "false"):
                return self._refuse(path, f"{units.shown(text)} is not a truth value", "write true or false")
            return text.lower() == "true"
        if len(text) > _DIGITS_MAX:
            return self._refuse(path, f"the number has {len(text)} characters", f"use at most {_DIGITS_MAX}")
        try:
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            number = float(text)
        except ValueError:
            return self._refuse(path, f"{units.shown(text)} is not a number", "write a number")
        if number != number or number in (float("inf"), float("-inf")):
            return self._refuse(path, f"{units.shown(text)} is not a usable number", "write a finite number")
        return number
