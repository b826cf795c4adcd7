"""The JSON Schema of the configuration file, made from the models for editors and for tests.

Draft 7 and without references, which is what every editor understands (yaml-language-server: put
`# yaml-language-server: $schema=outrider.schema.json` at the top of the file). What one value cannot
show, such as thresholds that must rise, only `outrider check` finds.
"""

from __future__ import annotations

import json
from typing import Any

from sidecar.config.settings import Settings

DIALECT = "http://json-schema.org/draft-07/schema#"


def schema(*, worded: bool = True) -> dict[str, Any]:
    """The schema as plain JSON data. worded=False leaves what JSON Schema has no words for (bounds with
    units, the need for a restart) as x- keywords instead of telling it in the descriptions."""
    raw = Settings.model_json_schema(by_alias=True, mode="validation")
    definitions = raw.pop("$defs")
    whole = _inlined(raw, definitions, worded)
    _default(whole, json.loads(Settings().model_dump_json(by_alias=True)))
    return {"$schema": DIALECT, "title": "Outrider configuration", **whole}


def _default(node: dict[str, Any], values: dict[str, Any]) -> None:
    """Defaults as an operator would write them; groups have none of their own."""
    for name, below in node["properties"].items():
        if "properties" in below:
            below.pop("default", None)
            _default(below, values[name])
        elif isinstance(values[name], list):
            below["default"] = [
                {key: value for key, value in item.items() if value is not None}
                if isinstance(item, dict)
                else item
                for item in values[name]
            ]
        else:
            below["default"] = values[name]


def _inlined(node: Any, definitions: dict[str, Any], worded: bool) -> Any:
    """A schema node with references replaced by what they name; the node's own words win."""
    if isinstance(node, list):
        return [_inlined(item, definitions, worded) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    result: dict[str, Any] = {}
    for key, value in node.items():
        if key == "properties":
            result[key] = {name: _inlined(below, definitions, worded) for name, below in value.items()}
        elif key in ("default", "examples", "required", "enum", "const"):
            result[key] = value
        elif key != "title":
            result[key] = _inlined(value, definitions, worded)
    return _worded(result) if worded else result


def _worded(node: dict[str, Any]) -> dict[str, Any]:
    """Bounds with units and the need for a restart are told in the description: JSON Schema has no words
    for them."""
    said = [" ".join(node["description"].split())] if "description" in node else []
    low, high = bounds(node)
    if low is not None and "description" in node:
        said.append(f"From {low} to {high}.")
    if node.pop("x-restart", False):
        said.append("Takes effect at the next start.")
    node.pop("x-kind", None)
    if "description" in node:
        for part in [node, *node.get("anyOf", [])]:
            part.pop("x-minimum", None)
            part.pop("x-maximum", None)
        node["description"] = " ".join(said)
    return node


def bounds(node: dict[str, Any]) -> tuple[object, object]:
    """Lowest and highest value that a schema node states, also where null is allowed beside it."""
    for part in [node, *node.get("anyOf", [])]:
        if "x-minimum" in part:
            return part["x-minimum"], part["x-maximum"]
    for part in [node, *node.get("anyOf", [])]:
        if "minimum" in part:
            return part["minimum"], part["maximum"]
    return None, None
