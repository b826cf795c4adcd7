"""From Treelite models to packed trees: the bytes that native/packed.pxd scores with.

Trees are read through Treelite's accessors (its JSON is not valid where a threshold is infinite). The result
is exact for float32 rows: `x <= t` and `x < t` become one comparison of int32 keys that sort as floats do,
thresholds in float64 are floored to float32 first. Leaves are rounded to float32 and summed in float64.

Accepted are regressors and binary classifiers with one number per leaf, and forests of classifiers with two
(the second class's share is the output). Limits: LIMITS below and those that native/packed.pxd names.
"""
from __future__ import annotations

import contextlib
import io
import json
import struct
import sys
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEATURES_MAX = 127
TREES_MAX = 512 * 16
NODES_MAX = 1 << 22
DEPTH_MAX = 124                   # levels of a tree

MAGIC = b"ORPACKED"
VERSION = 1
HEADER = struct.Struct("<8s6IQddQ")
GROUP = np.dtype({"names": ["key", "slot", "depth"], "formats": [("<i4", (15, 16)), ("u1", (15, 16)), ("u1", 2)],
                  "offsets": [0, 960, 1200], "itemsize": 1280})
NODE = np.dtype([("word", "<i4"), ("link", "<u4")])

TOP = 4                           # levels that are laid out as complete trees
ENTRIES = 1 << TOP
LANES = 16
RIGHT = 128                       # slot of a feature's key whose missing value goes right
LEAF_SLOT = 127
NEVER = 0x7FFFFFFF                # no key is higher: goes left always
LINE_NODES = 8                    # nodes on a cache line

# Treelite's operators, as its accessors number them
EQUAL, LESS, LESS_EQUAL, GREATER, GREATER_EQUAL = range(1, 6)


class PackingError(Exception):
    """A model that can't be packed; the text says why."""


@dataclass(frozen=True)
class Packed:
    """One packed model. ratio > 0: the score is 2^(-output / ratio)."""
    content: bytes
    features: int
    trees: int
    ratio: float


@dataclass
class _Tree:
    """Nodes by number; left < 0 marks a leaf. A split goes right where the key in `slot` is above `key`."""
    left: list[int]
    right: list[int]
    slot: list[int]
    key: list[int]
    leaf: NDArray[np.float32]
    height: list[int]


def keys_of(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """int32 keys (as int64) that sort as the values do; -0.0 and 0.0 are the same."""
    bits: NDArray[np.int64] = (np.asarray(values, np.float32) + np.float32(0)).view(np.int32).astype(np.int64)
    bits[bits < 0] ^= 0x7FFFFFFF
    return bits


def split_keys(thresholds: NDArray[np.float64], strict: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The key k for which, of every float32 x, x goes left exactly where key(x) <= k.

    strict: left is x < threshold, else x <= threshold."""
    exact = np.asarray(thresholds, np.float64)
    with np.errstate(over="ignore"):
        floor = exact.astype(np.float32)
    above = floor.astype(np.float64) > exact
    floor[above] = np.nextafter(floor[above], np.float32(-np.inf))
    # below a threshold that no float32 equals lie the same values with < and with <=
    keys = keys_of(floor)
    keys[strict & (floor.astype(np.float64) == exact)] -= 1
    return keys


# ---------------------------------------------------------------- reading

def _read_tree(tree: Any, index: int, column: int | None, features: int) -> _Tree:
    """column: which of a leaf vector's numbers counts, None where leaves are numbers."""
    if tree.get_field("has_categorical_split")[0]:
        raise PackingError(f"tree {index} has a categorical split: only comparisons with a number can be packed; "
                           "encode categories as numbers before training")
    left, right = tree.get_field("cleft").tolist(), tree.get_field("cright").tolist()
    compare = np.asarray(tree.get_field("cmp"), np.int64)
    threshold = np.asarray(tree.get_field("threshold"), np.float64)
    feature = np.asarray(tree.get_field("split_index"), np.int64)
    default = np.asarray(tree.get_field("default_left"), bool)
    inner = np.asarray(left) >= 0
    if not np.isin(compare[inner], [EQUAL, LESS, LESS_EQUAL, GREATER, GREATER_EQUAL]).all():
        raise PackingError(f"tree {index} has a split with an operator that is not known")
    if np.isnan(threshold[inner]).any():
        raise PackingError(f"tree {index} has a split whose threshold is not a number")
    if ((feature[inner] < 0) | (feature[inner] >= features)).any():
        raise PackingError(f"tree {index} splits on a feature beyond the {features} declared")
    if column is None:
        leaf = np.asarray(tree.get_field("leaf_value"), np.float64)
    else:
        values = np.asarray(tree.get_field("leaf_vector"), np.float64)
        at = np.asarray(tree.get_field("leaf_vector_begin")).astype(np.int64) + column
        leaf = np.where(inner, 0.0, values[np.minimum(at, len(values) - 1)])
    leaf = np.where(inner, 0.0, leaf)
    if not (np.abs(leaf) < 1e30).all():
        raise PackingError(f"tree {index} has a leaf whose value is not a finite number below 1e30")

    strict = (compare == LESS) | (compare == GREATER_EQUAL) | (compare == EQUAL)
    keys = split_keys(threshold, strict)
    # x > t and x >= t are x <= t and x < t with the sides exchanged; the missing value goes where it went
    turned = (compare == GREATER) | (compare == GREATER_EQUAL)
    slots = np.where(default ^ turned, feature, feature + RIGHT).tolist()
    key: list[int] = keys.tolist()
    for node in np.flatnonzero(inner & turned).tolist():
        left[node], right[node] = right[node], left[node]
    for node in np.flatnonzero(inner & (compare == EQUAL)).tolist():
        # x == t: to the right below t, else left up to t; a missing value reaches left through the second split
        yes, no = left[node], right[node]
        second = len(left)
        left[node], right[node] = no, second
        left.append(yes)
        right.append(no)
        key.append(int(split_keys(threshold[node:node + 1], np.zeros(1, bool))[0]))
        slots[node] = int(feature[node]) + (RIGHT if default[node] else 0)
        slots.append(int(feature[node]))
    out = _Tree(left, right, slots, key, np.resize(leaf.astype(np.float32), len(left)), [0] * len(left))
    _heights(out, index)
    return out


def _heights(tree: _Tree, index: int) -> None:
    """Fill in the nodes' heights; refuses what is no tree and what is too deep."""
    order, depth = [0], {0: 0}
    for node in order:
        if tree.left[node] < 0:
            continue
        for child in (tree.left[node], tree.right[node]):
            if not 0 <= child < len(tree.left):
                raise PackingError(f"tree {index} has a link to a node that is not there")
            depth[child] = depth[node] + 1
            if depth[child] > DEPTH_MAX:
                raise PackingError(f"tree {index} is deeper than {DEPTH_MAX} levels; limit max_depth in training")
            order.append(child)
            if len(order) > NODES_MAX:
                raise PackingError(f"tree {index} has more than {NODES_MAX} nodes")
    for node in reversed(order):
        if tree.left[node] >= 0:
            tree.height[node] = 1 + max(tree.height[tree.left[node]], tree.height[tree.right[node]])


def _vector_column(header: Any) -> int | None:
    """Which number of a leaf vector is the output; None for plain leaves. Raises PackingError."""
    shape = header.get_field("leaf_vector_shape").tolist()
    classes = header.get_field("num_class").tolist()
    if header.get_field("num_target").tolist() != [1] or classes not in ([1], [2]):
        raise PackingError("gives more than one number per row; train a regressor or a binary model")
    if shape == [1, 1] and classes == [1]:
        return None
    if shape == [1, 2] and classes == [2]:
        return 1
    raise PackingError(f"leaves of shape {shape} for {classes} classes can't be packed")


# ---------------------------------------------------------------- laying out

class _Layout:
    """Nodes below the entries, in the order in which they lie in memory.

    Two siblings lie together, and with them their children where there are any: a cache line holds two levels of
    a walk. Children always lie behind their parents."""

    def __init__(self, entries: int) -> None:
        self.word: list[int] = [0] * entries
        self.link: list[int] = [(i << 8) | LEAF_SLOT for i in range(entries)]

    def put_leaf(self, at: int, bits: int) -> None:
        self.word[at] = bits
        self.link[at] = (at << 8) | LEAF_SLOT

    def _pair(self) -> int:
        at = len(self.word)
        if at + 2 > NODES_MAX:
            raise PackingError(f"more than {NODES_MAX} nodes; train fewer or smaller trees")
        for i in (at, at + 1):
            self.word.append(0)
            self.link.append((i << 8) | LEAF_SLOT)
        return at

    def tree(self, tree: _Tree, bits: list[int], first: int, roots: list[int]) -> None:
        """Put the subtrees below the entries first .. first + 15 of one tree."""
        # waiting: clusters (parent's place, node) by the number of nodes they take: the pair, and its pairs' children
        waiting: dict[int, deque[tuple[int, int]]] = {2: deque(), 4: deque(), 6: deque()}

        def wait(place: int, node: int) -> None:
            inner = sum(tree.left[child] >= 0 for child in (tree.left[node], tree.right[node]))
            waiting[2 + 2 * inner].append((place, node))

        def put(place: int, node: int) -> bool:
            if tree.left[node] < 0:
                self.put_leaf(place, bits[node])
                return False
            self.word[place] = tree.key[node]
            return True

        def open_pair(place: int, node: int) -> tuple[tuple[int, int], tuple[int, int]]:
            at = self._pair()
            self.link[place] = (at << 8) | tree.slot[node]
            return (at, tree.left[node]), (at + 1, tree.right[node])

        for i, node in enumerate(roots):
            if put(first + i, node):
                wait(first + i, node)
        while any(waiting.values()):
            free = LINE_NODES - len(self.word) % LINE_NODES
            size = next((n for n in (6, 4, 2) if n <= free and waiting[n]), 0)
            if size == 0:
                self._pair()                           # leaves that nothing leads to fill the line
                continue
            below = [child for child in open_pair(*waiting[size].popleft()) if put(*child)]
            for child in below:
                for grandchild in open_pair(*child):
                    if put(*grandchild):
                        wait(*grandchild)


def _top(tree: _Tree, group: Any, lane: int) -> list[int]:
    """Write the four top levels; the 16 nodes that they lead to."""
    level = [0]
    for depth in range(TOP):
        below: list[int] = []
        for i, node in enumerate(level):
            row = (1 << depth) - 1 + i
            if tree.left[node] < 0:
                group["key"][row, lane] = NEVER
                below += [node, node]
            else:
                group["key"][row, lane] = tree.key[node]
                group["slot"][row, lane] = tree.slot[node]
                below += [tree.left[node], tree.right[node]]
        level = below
    return level


def pack(model: Any) -> Packed:
    """Pack a treelite.Model. Raises PackingError for what can't be packed, saying why."""
    header = model.get_header_accessor()
    column = _vector_column(header)
    features, count = int(model.num_feature), int(model.num_tree)
    if not 1 <= features <= FEATURES_MAX:
        raise PackingError(f"{features} features; packed trees take 1 to {FEATURES_MAX}")
    if not 1 <= count <= TREES_MAX:
        raise PackingError(f"{count} trees; packed are 1 to {TREES_MAX}")
    trees = [_read_tree(model.get_tree_accessor(i), i, column, features) for i in range(count)]
    # equally deep trees walk together
    trees.sort(key=lambda tree: -tree.height[0])
    groups = np.zeros((count + LANES - 1) // LANES, GROUP)
    groups["key"] = NEVER
    layout = _Layout(ENTRIES * LANES * len(groups))
    for i, tree in enumerate(trees):
        group, lane = groups[i // LANES], i % LANES
        roots = _top(tree, group, lane)
        deep = max(tree.height[node] for node in roots)
        group["depth"][lane // 8] = max(int(group["depth"][lane // 8]), deep)
        layout.tree(tree, tree.leaf.view(np.int32).tolist(), i * ENTRIES, roots)
    nodes = np.zeros(len(layout.word), NODE)
    nodes["word"], nodes["link"] = layout.word, layout.link
    base = float(header.get_field("base_scores")[1 if column else 0])
    scale = 1.0 / count if header.get_field("average_tree_output")[0] else 1.0
    ratio = float(header.get_field("ratio_c")[0]) \
        if header.get_field("postprocessor") == "exponential_standard_ratio" else 0.0
    body = groups.tobytes() + nodes.tobytes()
    return Packed(HEADER.pack(MAGIC, VERSION, features, count, len(groups), len(nodes), 0, HEADER.size + len(body),
                              base, scale, 0) + body, features, count, ratio)


# ---------------------------------------------------------------- the child process

def pack_checked(checkpoint: Path) -> Packed:
    """Pack a Treelite checkpoint and compare it with Treelite's own interpreter on rows from far corners.

    Raises PackingError for what can't be packed, CompileError for what is no checkpoint or differs."""
    import treelite

    from native.models import ModelsError, packed_predict
    from sidecar.compilers import CompileError, check_rows, reference

    try:
        model = treelite.Model.deserialize(checkpoint)
    except treelite.TreeliteError as e:
        raise CompileError(f"{checkpoint}: not a Treelite checkpoint: {e}") from e
    packed = pack(model)
    rows = check_rows(model)
    want = reference(model, rows)
    for wide in (False, True):
        try:
            got = packed_predict(packed.content, rows, wide)
        except ModelsError as e:
            raise CompileError(f"{checkpoint}: packed, but refused: {e}") from e
        worst = float(np.max(np.abs(got - want) / np.maximum(1.0, np.abs(want))))
        if not worst < 1e-5:
            raise CompileError(f"{checkpoint}: the packed model differs from Treelite's own result by {worst:.3g}")
    return packed


def main(arguments: list[str]) -> int:
    """The child: FOLDER SLOT=CHECKPOINT...; writes SLOT.packed, answers with one JSON object by slot."""
    from sidecar.compilers import CompileError

    folder = Path(arguments[0])
    noise = io.StringIO()
    answer: dict[str, Any] = {}
    for argument in arguments[1:]:
        slot, _, checkpoint = argument.partition("=")
        try:
            with contextlib.redirect_stdout(noise), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                packed = pack_checked(Path(checkpoint))
            (folder / f"{slot}.packed").write_bytes(packed.content)
            answer[slot] = {"file": f"{slot}.packed", "features": packed.features, "ratio": packed.ratio,
                            "trees": packed.trees}
        except PackingError as e:
            answer[slot] = {"error": str(e), "unpackable": True}
        except CompileError as e:
            answer[slot] = {"error": str(e)}
        except Exception as e:
            answer[slot] = {"error": f"{checkpoint}: {type(e).__name__}: {e}"}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
