"""Packed and compiled trees give what Treelite gives, on every odd row; scores are what the manifest says."""
from __future__ import annotations

import threading
from pathlib import Path

import model_factory as factory
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.models import Models, ModelsError, calibrated
from sidecar import bundle, compilers
from sidecar.train import calibrate, trees

pytestmark = pytest.mark.usefixtures("factory_schema")


@pytest.fixture(scope="module")
def trained():
    return factory.train()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["packed", "compiled"])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def runtime(trained, engine, cache, tmp_path_factory):
    made = factory.write(tmp_path_factory.mktemp("b") / "bundle", trained, engine=engine)
    return bundle.prepare_runtime(made, cache)


@pytest.fixture(scope="module")
def models(runtime):
    with Models(runtime) as opened:
        yield opened


def expected(trained: factory.Trained, slot: str, rows: np.ndarray) -> np.ndarray:
    model = getattr(trained, slot)
    raw = compilers.reference(model, rows)
    if slot == "isolation":
        return np.exp2(-raw / model.get_header_accessor().get_field("ratio_c")[0])
    return raw


@pytest.mark.parametrize("slot", bundle.TREES)
def test_trees_agree_with_treelite_on_far_corners(slot, trained, models):
    rows = compilers.check_rows(getattr(trained, slot), 4000)
    want = expected(trained, slot, rows)
    np.testing.assert_allclose(models.predict(slot, rows), want, rtol=2e-5, atol=2e-5)


ODD = st.one_of(st.floats(width=32, allow_nan=True, allow_infinity=True), st.sampled_from(
    [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, 3.4028234663852886e38]))


@pytest.mark.parametrize("slot", bundle.TREES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_trees_agree_with_treelite_on_any_row(slot, trained, models, data):
    model = getattr(trained, slot)
    thresholds = compilers.thresholds_of(model)
    row = [data.draw(st.one_of(ODD, st.sampled_from(thresholds[i])) if i in thresholds else ODD)
           for i in range(model.num_feature)]
    rows = np.asarray([row], np.float32)
    want = expected(trained, slot, rows)
    np.testing.assert_allclose(models.predict(slot, rows), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("slot", ["forest", "isolation"])
def test_narrowed_forests_take_the_branches_of_the_wide_ones(slot, trained):
    narrow, wide = getattr(trained, slot), getattr(trained, f"{slot}_wide")
    rows = compilers.check_rows(wide, 4000)        # float32 values on and beside float64 thresholds
    np.testing.assert_allclose(compilers.reference(narrow, rows), compilers.reference(wide, rows), rtol=1e-5)


def test_wide_trees_can_be_prepared_and_called_too(trained, engine, cache, tmp_path):
    wide = factory.Trained(trained.xgboost, trained.forest_wide, trained.isolation_wide, None, None)
    folder = bundle.prepare_runtime(factory.write(tmp_path / "wide", wide, engine=engine), cache)
    with Models(folder) as opened:
        for slot in ("forest", "isolation"):
            rows = compilers.check_rows(getattr(wide, slot), 1000)
            np.testing.assert_allclose(opened.predict(slot, rows), expected(wide, slot, rows), rtol=1e-5)


def test_a_row_does_not_change_the_next_one(trained, models):
    rows = compilers.check_rows(trained.xgboost, 64)
    together = models.predict("xgboost", rows)
    alone = np.concatenate([models.predict("xgboost", rows[i:i + 1]) for i in range(64)])
    assert np.array_equal(together, alone)


def test_rows_of_another_width_are_refused(models):
    with pytest.raises(ValueError, match="the model takes 12"):
        models.predict("isolation", np.zeros((2, 11), np.float32))
    with pytest.raises(ValueError, match="no tree model"):
        models.predict("oak", np.zeros((1, 1), np.float32))


# ---------------------------------------------------------------- scores

finite = st.floats(-50, 50, width=32)


@given(linear=finite, xgboost=st.one_of(st.just(float("nan")), finite),
       forest=st.one_of(st.just(float("nan")), st.floats(0, 1, width=32)))
def test_text_score_is_the_weighted_sum_through_the_calibration_of_what_ran(models, linear, xgboost, forest):
    ran_x, ran_f = xgboost == xgboost, forest == forest
    name = {(False, False): "linear", (True, False): "linear+xgboost", (False, True): "linear+forest",
            (True, True): "all"}[ran_x, ran_f]
    c = bundle.Combination(**factory.manifest()["combination"][name])
    raw = trees.combine(c, np.float64(linear), np.float64(xgboost if ran_x else 0),
                        np.float64(forest if ran_f else 0.5))
    assert models.text_raw(linear, xgboost, forest) == (pytest.approx(float(raw), rel=1e-4, abs=1e-4), name)
    want = calibrate.apply(factory.KNOTS, np.asarray([raw]))[0]
    assert models.text_score(linear, xgboost, forest) == pytest.approx(want, abs=1e-4)


def test_nothing_read_scores_nothing(models):
    assert models.text_score(float("nan")) == 0.0
    assert models.behaviour_score(float("nan")) == 0.0


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=16, unique=True).map(sorted),
       st.lists(st.floats(-2e6, 2e6, width=32), min_size=2, max_size=50))
def test_calibration_agrees_with_numpy_and_never_falls(x, raw):
    pairs = list(zip(x, np.linspace(0, 1, len(x)).tolist(), strict=True))
    got = calibrated(pairs, sorted(raw))
    np.testing.assert_allclose(got, calibrate.apply(pairs, np.sort(np.asarray(raw, np.float32))), atol=1e-5)
    assert (np.diff(got) >= -1e-6).all()
    assert calibrated(pairs, [np.inf, -np.inf, np.nan]).tolist() == [1.0, 0.0, 0.0]


def test_knots_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        calibrated([(0.0, 0.1), (0.0, 0.2)], [0.0])
    with pytest.raises(ValueError, match="must rise"):
        calibrated([(0.0, 0.3), (1.0, 0.2)], [0.0])


# ---------------------------------------------------------------- swapping

def test_models_can_be_swapped_while_another_thread_scores(trained, runtime, engine, cache, tmp_path):
    """Each answer belongs wholly to the old or to the new model, and both are seen."""
    other = factory.train(seed=9)
    fresh = bundle.prepare_runtime(factory.write(tmp_path / "next", other, engine=engine), cache)
    rows = compilers.check_rows(trained.xgboost, 64)
    allowed = [expected(t, "xgboost", rows) for t in (trained, other)]
    holder, stop, seen, wrong = [Models(runtime)], threading.Event(), set(), []

    def score() -> None:
        while not stop.is_set():
            got = holder[0].predict("xgboost", rows)
            which = [i for i, want in enumerate(allowed) if np.allclose(got, want, rtol=2e-5, atol=2e-5)]
            seen.update(which) if which else wrong.append(got)

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        holder[0] = Models((fresh, runtime)[turn % 2])     # the old one closes when its last user is done
        with pytest.raises(ModelsError):
            Models(tmp_path / "nothing")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen == {0, 1}


# ---------------------------------------------------------------- runtime folders that are refused

def copy(runtime: Path, to: Path) -> Path:
    to.mkdir(mode=0o700)
    for source in runtime.iterdir():
        (to / source.name).write_bytes(source.read_bytes())
        (to / source.name).chmod(0o600)
    return to


@pytest.mark.parametrize(("damage", "says"), [
    (lambda b: b[:-9], "damaged"),
    (lambda b: b + bytes(8), "damaged"),
    (lambda b: bytes(8) + b[8:], "not a file of compiled models"),
    (lambda b: b[:8] + b"\xff\0\0\0" + b[12:], "version 255"),
    (lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], "damaged"),
    (lambda b: b[:5000] + bytes([b[5000] ^ 255]) + b[5001:], "damaged"),
    (lambda b: b"", "0 bytes"),
    (lambda b: b"ORMODELS", "not a file of compiled models"),
])
def test_a_damaged_runtime_file_is_refused(runtime, tmp_path, damage, says):
    folder = copy(runtime, tmp_path / "r")
    (folder / "runtime.bin").write_bytes(damage((folder / "runtime.bin").read_bytes()))
    with pytest.raises(ModelsError, match=says):
        Models(folder)


@given(at=st.integers(0, 84000), to=st.integers(0, 255))
@settings(max_examples=80, deadline=None)
def test_no_single_byte_of_the_runtime_file_can_change_unseen(runtime, tmp_path_factory, at, to):
    folder = copy(runtime, tmp_path_factory.mktemp("flip") / "r")
    content = bytearray((folder / "runtime.bin").read_bytes())
    at %= len(content)
    if content[at] == to:
        to ^= 1
    content[at] = to
    (folder / "runtime.bin").write_bytes(content)
    with pytest.raises(ModelsError):
        Models(folder)


def test_a_changed_library_is_refused_before_it_is_loaded(trained, cache, tmp_path):
    runtime = bundle.prepare_runtime(factory.write(tmp_path / "b", trained, engine="compiled"), cache)
    folder = copy(runtime, tmp_path / "r")
    library = next(folder.glob("forest-*.so"))
    library.write_bytes(library.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ModelsError, match=r"forest-.*damaged"):
        Models(folder)
    library.unlink()
    with pytest.raises(ModelsError, match=r"forest-.*cannot open"):
        Models(folder)


def test_what_others_may_write_is_refused(runtime, tmp_path):
    folder = copy(runtime, tmp_path / "r")
    (folder / "runtime.bin").chmod(0o666)
    with pytest.raises(ModelsError, match="someone else may write"):
        Models(folder)


@pytest.mark.parametrize("name", ["", "/nonexistent/folder", "a" * 5000, "x\0y"])
def test_a_folder_that_is_not_there_is_refused(name):
    with pytest.raises(ModelsError):
        Models(name)


def test_a_closed_set_says_so(runtime):
    models = Models(runtime)
    models.close()
    models.close()
    with pytest.raises(ModelsError, match="closed"):
        models.predict("xgboost", np.zeros((1, 48), np.float32))
