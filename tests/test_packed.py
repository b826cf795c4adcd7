"""Packed trees give what Treelite's interpreter gives, for any model and row; damaged ones are refused."""
from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import treelite
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from treelite import model_builder as mb

from native.models import LIMITS, Models, ModelsError, packed_predict
from sidecar import compilers, engines, packing

ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-39, 3.4028234663852886e38, -3.4028234663852886e38]


def odd_rows(model: treelite.Model, n: int, seed: int) -> np.ndarray:
    """Rows on, beside and far from thresholds, a third of the values being odd ones."""
    rng = np.random.default_rng(seed)
    rows = compilers.check_rows(model, n)
    odd = rng.random(rows.shape)
    rows = np.where(odd < 0.3, rng.choice(np.asarray(ODD, np.float32), rows.shape), rows)
    rows[: n // 4] = rng.normal(size=(n // 4, rows.shape[1]))        # a quarter is plain
    return rows.astype(np.float32)


def size_of(model: treelite.Model) -> float:
    """What the sum's rounding errors are to be compared with: the largest leaves, added up."""
    out = 0.0
    for i in range(model.num_tree):
        tree = model.get_tree_accessor(i)
        values = [*tree.get_field("leaf_value"), *tree.get_field("leaf_vector")]
        out += float(np.max(np.abs(values)))
    header = model.get_header_accessor()
    if header.get_field("average_tree_output")[0]:
        out /= model.num_tree
    return out + abs(float(header.get_field("base_scores")[-1]))


def assert_agrees(model: treelite.Model, rows: np.ndarray) -> None:
    packed = packing.pack(model)
    want = compilers.reference(model, rows)
    scalar, wide = (packed_predict(packed.content, rows, wide) for wide in (False, True))
    np.testing.assert_allclose(scalar, want, rtol=1e-6, atol=1e-6 * size_of(model))
    assert np.array_equal(scalar, wide)


# ---------------------------------------------------------------- models as libraries train them

def data(seed: int, features: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, features)).astype(np.float32)
    rows[:, 0] = np.round(rows[:, 0])                                # a feature with few values
    return rows, (rows[:, 0] + rows[:, -1] + 0.3 * rng.normal(size=n) > 0).astype(int)


def train(kind: str, seed: int, features: int, trees: int, depth: int) -> treelite.Model:
    rows, labels = data(seed, features)
    own = {"n_estimators": trees, "random_state": seed}
    if kind == "isolation":
        return treelite.sklearn.import_model(IsolationForest(max_samples=64, **own).fit(rows))
    if kind == "forest":
        return treelite.sklearn.import_model(RandomForestClassifier(max_depth=depth, **own).fit(rows, labels))
    if kind == "forest regressor":
        return treelite.sklearn.import_model(RandomForestRegressor(max_depth=depth, **own).fit(rows, labels))
    if kind == "extra trees":
        return treelite.sklearn.import_model(ExtraTreesClassifier(max_depth=depth, **own).fit(rows, labels))
    if kind == "gradient boosting":
        return treelite.sklearn.import_model(GradientBoostingRegressor(max_depth=depth, **own).fit(rows, labels))
    rows[np.random.default_rng(seed).random(rows.shape) < 0.2] = np.nan
    if kind == "xgboost":
        return treelite.frontend.from_xgboost(xgboost.train(
            {"objective": "binary:logistic", "max_depth": depth, "verbosity": 0, "seed": seed, "nthread": 1},
            xgboost.DMatrix(rows, labels), trees))
    lightgbm = pytest.importorskip("lightgbm", reason="lightgbm is not installed")
    return treelite.frontend.from_lightgbm(lightgbm.train(
        {"objective": "binary", "num_leaves": 2**min(depth, 5), "verbosity": -1, "seed": seed, "num_threads": 1,
         "min_data_in_leaf": 3}, lightgbm.Dataset(rows, labels), trees))


KINDS = ["isolation", "forest", "forest regressor", "extra trees", "gradient boosting", "xgboost", "lightgbm"]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31 - 1), features=st.sampled_from([1, 2, 16, 17, 32, 33, 48, 64, 65, 127]),
       trees=st.integers(1, 40), depth=st.integers(1, 12))
@settings(max_examples=8, deadline=None)
def test_trained_models_agree_with_treelite_on_odd_rows(kind, seed, features, trees, depth):
    model = train(kind, seed, features, trees, depth)
    assert_agrees(model, odd_rows(model, 300, seed))


def test_many_trees_take_several_rounds_of_entries():
    rows, labels = data(1, 5)
    for trees in (255, 256, 257, 300):
        model = treelite.sklearn.import_model(
            RandomForestRegressor(n_estimators=trees, max_depth=3, random_state=0).fit(rows, labels))
        assert_agrees(model, odd_rows(model, 50, 1))


def test_the_bytes_depend_on_the_model_alone():
    model = train("xgboost", 3, 10, 20, 6)
    assert packing.pack(model).content == packing.pack(model).content


# ---------------------------------------------------------------- models as nobody trains them

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
threshold = st.one_of(st.floats(allow_nan=False), finite, st.sampled_from([v for v in ODD if v == v]))
leaf = st.floats(-100, 100, width=32)
split = st.tuples(st.integers(0, 3), threshold, st.booleans(), st.sampled_from(["<", "<=", ">", ">=", "=="]))
tree = st.recursive(leaf, lambda below: st.tuples(split, below, below), max_leaves=40)


def build(trees: list, *, wide: bool = True, features: int = 4, average: bool = False,
          base: float = 0.0) -> treelite.Model:
    """A model of nested tuples ((feature, threshold, default left, operator), left, right) and leaves."""
    kind = "float64" if wide else "float32"
    builder = mb.ModelBuilder(
        threshold_type=kind, leaf_output_type=kind,
        metadata=mb.Metadata(num_feature=features, task_type="kRegressor", average_tree_output=average, num_target=1,
                             num_class=[1], leaf_vector_shape=(1, 1)),
        tree_annotation=mb.TreeAnnotation(num_tree=len(trees), target_id=[0] * len(trees), class_id=[0] * len(trees)),
        postprocessor=mb.PostProcessorFunc(name="identity"), base_scores=[base])
    for root in trees:
        builder.start_tree()
        waiting, made = [(0, root)], 1
        for key, node in waiting:
            builder.start_node(key)
            if isinstance(node, tuple):
                (feature, value, default, operator), left, right = node
                builder.numerical_test(feature, value, default_left=default, opname=operator, left_child_key=made,
                                       right_child_key=made + 1)
                waiting += [(made, left), (made + 1, right)]
                made += 2
            else:
                builder.leaf(node)
            builder.end_node()
        builder.end_tree()
    return builder.commit()


def thresholds_in(node: object) -> list[float]:
    return [node[0][1], *thresholds_in(node[1]), *thresholds_in(node[2])] if isinstance(node, tuple) else []


@given(trees=st.lists(tree, min_size=1, max_size=20), average=st.booleans(), base=leaf, draw=st.data())
@settings(max_examples=150, deadline=None)
def test_any_trees_agree_with_treelite(trees, average, base, draw):
    model = build(trees, average=average, base=base)
    # a float32 on each threshold, or the two between which it lies
    near = {np.float32(v) for node in trees for v in thresholds_in(node) if abs(v) < 3e38}
    near |= {np.nextafter(v, np.float32(s)) for v in list(near) for s in (-np.inf, np.inf)}
    value = st.one_of(st.sampled_from([*ODD, *map(float, near)]), finite)
    rows = np.asarray(draw.draw(st.lists(st.lists(value, min_size=4, max_size=4), min_size=1, max_size=8)), np.float32)
    assert_agrees(model, rows)


@pytest.mark.parametrize("operator", ["<", "<=", ">", ">=", "=="])
@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("value", [np.inf, -np.inf, 0.0, -0.0, 1e-45, 0.1, 1e-300, -1e-300, 1e300, -1e300,
                                   3.4028234663852886e38, 3.5e38])
def test_every_operator_and_side_at_every_odd_threshold(operator, default, value):
    model = build([((0, value, default, operator), -1.0, 1.0)], features=1)
    near = np.float32(min(max(value, -3.4e38), 3.4e38))
    rows = np.asarray([*ODD, near, np.nextafter(near, np.float32(9e9)), np.nextafter(near, np.float32(-9e9))],
                      np.float32)
    assert_agrees(model, rows[:, None])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_keys_sort_as_their_floats_do(values):
    x = np.asarray(values, np.float32)
    keys = packing.keys_of(x)
    assert ((x[:, None] < x[None, :]) == (keys[:, None] < keys[None, :])).all()


# ---------------------------------------------------------------- what can't be packed

def chain(depth: int) -> object:
    node: object = 1.0
    for i in range(depth):
        node = ((0, float(i), True, "<"), node, 0.0)
    return node


def test_the_deepest_tree_that_is_allowed_and_one_deeper():
    model = build([chain(packing.DEPTH_MAX)], features=1)
    assert_agrees(model, np.linspace(-5, 130, 60, dtype=np.float32)[:, None])
    with pytest.raises(packing.PackingError, match=f"deeper than {packing.DEPTH_MAX} levels"):
        packing.pack(build([chain(packing.DEPTH_MAX + 1)], features=1))


def test_the_limits_of_both_sides_are_the_same():
    native = tuple(LIMITS[f"packed_{name}"] for name in ("features", "trees", "nodes", "depth"))
    assert native == (packing.FEATURES_MAX, packing.TREES_MAX, packing.NODES_MAX, packing.DEPTH_MAX)


def test_what_cannot_be_packed_is_refused_with_a_reason(monkeypatch):
    with pytest.raises(packing.PackingError, match="128 features"):
        packing.pack(build([1.0], features=128))
    with pytest.raises(packing.PackingError, match="not a finite number"):
        packing.pack(build([float("inf")]))
    with pytest.raises(packing.PackingError, match="not a number"):
        packing.pack(build([((0, float("nan"), True, "<"), 0.0, 1.0)]))
    rows, _ = data(0, 4)
    three = RandomForestClassifier(n_estimators=2, max_depth=2).fit(rows, np.arange(len(rows)) % 3)
    with pytest.raises(packing.PackingError, match="more than one number per row"):
        packing.pack(treelite.sklearn.import_model(three))
    monkeypatch.setattr(packing, "NODES_MAX", 300)
    with pytest.raises(packing.PackingError, match="more than 300 nodes"):
        packing.pack(train("forest", 0, 4, 4, 8))
    monkeypatch.setattr(packing, "TREES_MAX", 3)
    with pytest.raises(packing.PackingError, match="4 trees"):
        packing.pack(train("forest", 0, 4, 4, 2))


def test_a_categorical_split_is_refused():
    builder = mb.ModelBuilder(
        threshold_type="float32", leaf_output_type="float32",
        metadata=mb.Metadata(num_feature=1, task_type="kRegressor", average_tree_output=False, num_target=1,
                             num_class=[1], leaf_vector_shape=(1, 1)),
        tree_annotation=mb.TreeAnnotation(num_tree=1, target_id=[0], class_id=[0]),
        postprocessor=mb.PostProcessorFunc(name="identity"), base_scores=[0.0])
    builder.start_tree()
    builder.start_node(0)
    builder.categorical_test(0, default_left=True, category_list=[1, 3], category_list_right_child=False,
                             left_child_key=1, right_child_key=2)
    builder.end_node()
    for key in (1, 2):
        builder.start_node(key)
        builder.leaf(float(key))
        builder.end_node()
    builder.end_tree()
    with pytest.raises(packing.PackingError, match=r"categorical split.*encode categories as numbers"):
        packing.pack(builder.commit())


# ---------------------------------------------------------------- damaged bytes

@pytest.fixture(scope="module")
def block() -> bytes:
    return packing.pack(train("xgboost", 4, 5, 20, 9)).content


GROUPS_AT = packing.HEADER.size


@given(draw=st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_bytes_are_refused_or_still_trees(block, draw):
    """runtime.bin's checksum finds all of these; here is nothing but the checks of the structure."""
    content = bytearray(block)
    groups = struct.unpack_from("<I", block, 20)[0]
    nodes_at = GROUPS_AT + groups * packing.GROUP.itemsize
    start, stop = draw.draw(st.sampled_from([(0, GROUPS_AT), (GROUPS_AT, nodes_at), (nodes_at, len(content))]))
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(st.integers(start, stop - 1))] = draw.draw(st.integers(0, 255))
    rows = np.asarray(draw.draw(st.lists(st.lists(st.sampled_from(ODD), min_size=5, max_size=5), min_size=1,
                                         max_size=4)), np.float32)
    for wide in (False, True):
        try:
            got = packed_predict(bytes(content), rows, wide)
        except (ModelsError, ValueError):
            continue
        assert np.isfinite(got).all()


@given(n=st.integers(0, 10_000))
def test_a_block_of_another_length_is_refused(block, n):
    for content in (block[:n], block + bytes(n + 1)):
        if content != block:
            with pytest.raises(ModelsError, match="refused"):
                packed_predict(content, np.zeros((1, 5), np.float32))


def nodes_of(block: bytes) -> tuple[int, np.ndarray]:
    at = GROUPS_AT + struct.unpack_from("<I", block, 20)[0] * packing.GROUP.itemsize
    return at, np.frombuffer(block[at:], packing.NODE).copy()


@pytest.mark.parametrize(("damage", "says"), [
    ("circle", "leads astray"), ("beyond", "leads astray"), ("feature", "not there"), ("leaf elsewhere", "not one"),
    ("leaf NaN", "not one"), ("shallow", "deeper than it says")])
def test_each_kind_of_damage_to_the_nodes_has_its_name(block, damage, says):
    at, nodes = nodes_of(block)
    slot = nodes["link"] & 255
    inner, leaves = np.flatnonzero(slot != packing.LEAF_SLOT), np.flatnonzero(slot == packing.LEAF_SLOT)
    content = bytearray(block)
    if damage == "circle":
        nodes["link"][inner[-1]] = (0 << 8) | slot[inner[-1]]
    elif damage == "beyond":
        nodes["link"][inner[0]] = ((len(nodes) - 1) << 8) | slot[inner[0]]
    elif damage == "feature":
        nodes["link"][inner[0]] = (nodes["link"][inner[0]] & ~np.uint32(255)) | 5
    elif damage == "leaf elsewhere":
        nodes["link"][leaves[0]] += 256
    elif damage == "leaf NaN":
        nodes["word"][leaves[0]] = 0x7FC00000
    else:
        content[GROUPS_AT + 1200] = 0
    content[at:] = nodes.tobytes()
    with pytest.raises(ModelsError, match=says):
        packed_predict(bytes(content), np.zeros((1, 5), np.float32))


@pytest.mark.parametrize(("offset", "value", "says"), [
    (0, b"X", "not packed trees"), (8, b"\x09", "another version"), (12, b"\0", "features"), (12, b"\x80", "features"),
    (16, b"\xff", "another number of trees"), (20, b"\0", "too many trees"), (47, b"\x7f", "base or scale"),
    (48, struct.pack("<d", 2.0), "base or scale"), (48, struct.pack("<d", float("nan")), "base or scale")])
def test_each_kind_of_damage_to_the_header_has_its_name(block, offset, value, says):
    content = bytearray(block)
    content[offset:offset + len(value)] = value
    with pytest.raises(ModelsError, match=says):
        packed_predict(bytes(content), np.zeros((1, 5), np.float32))


def test_the_child_says_why_for_each_model(tmp_path: Path, capsys):
    (tmp_path / "bad").write_bytes(b"nothing like a forest" * 100)
    (tmp_path / "many").write_bytes(build([1.0], features=128).serialize_bytes())
    (tmp_path / "good").write_bytes(train("forest", 0, 4, 4, 3).serialize_bytes())
    packing.main([str(tmp_path), *(f"{name}={tmp_path / name}" for name in ("bad", "many", "good", "none"))])
    answer = json.loads(capsys.readouterr().out)
    assert "not a Treelite checkpoint" in answer["bad"]["error"]
    assert answer["many"]["unpackable"]
    assert answer["good"]["trees"] == 4
    assert "none" in answer["none"]["error"]
    assert {p.name for p in tmp_path.glob("*.packed")} == {"good.packed"}


# ---------------------------------------------------------------- both engines on the same trees

def random_tree(rng: np.random.Generator, depth: int, infinite: bool) -> object:
    if depth == 0 or rng.random() < 0.1:
        return float(np.float32(rng.normal()))
    value = float(rng.choice([np.inf, -np.inf])) if infinite and rng.random() < 0.2 else float(np.float32(rng.normal()))
    operator = str(rng.choice(["<", "<=", ">", ">=", "=="]))
    return ((int(rng.integers(4)), value, bool(rng.integers(2)), operator), random_tree(rng, depth - 1, infinite),
            random_tree(rng, depth - 1, infinite))


def made_by(engine: engines.Engine, model: treelite.Model, folder: Path) -> Models:
    folder.mkdir(mode=0o700)
    (folder / "model").write_bytes(model.serialize_bytes())
    built = engines.build({"model": folder / "model"}, {"model": engines.Choice(engine)}, folder)["model"]
    engines.single_runtime(folder, built)
    return Models(folder)


@pytest.mark.parametrize("seed", range(3))
def test_both_engines_agree_on_trees_with_every_operator(seed, tmp_path):
    rng = np.random.default_rng(seed)
    model = build([random_tree(rng, 7, False) for _ in range(24)], wide=bool(seed % 2))
    rows = odd_rows(model, 3000, seed)
    want = compilers.reference(model, rows)
    for engine in engines.ENGINES:
        with made_by(engine, model, tmp_path / engine) as models:
            np.testing.assert_allclose(models.predict("isolation", rows), want, rtol=1e-6, atol=1e-6 * size_of(model))


def test_infinite_thresholds_are_packed_rightly_and_never_compiled_wrongly(tmp_path):
    """TL2cgen's C gets them wrong; the comparison with GTIL has to find it."""
    rng = np.random.default_rng(1)
    model = build([random_tree(rng, 5, True) for _ in range(20)], wide=False)
    assert_agrees(model, odd_rows(model, 1000, 1))
    with made_by("packed", model, tmp_path / "packed") as models:
        assert models.engine("isolation") == "packed"
    with pytest.raises(compilers.CompileError, match="differs from Treelite's own result"):
        made_by("compiled", model, tmp_path / "compiled")
