"""Python's hold on native/models.pxd: writing runtime.bin, opening runtime folders, scoring rows.

For training, tests and `outrider bundle`; a request never comes through here.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport geteuid

from native.base cimport siphash24
from native.models cimport (
    KNOTS_MAX, LIBRARY_NAME_MAX, RUNTIME_BYTES_MAX, RUNTIME_VERSION, TEXT_ROW,
    TREE_FEATURES_MAX, TREE_PACKED, Calibration, ModelSet, RuntimeFile, TreeModel, TreeScratch, calibrate,
    models_behaviour_score, models_text_raw, models_text_score, modelset_close, modelset_open,
    or_runtime_magic, tree_predict,
)
from native.packed cimport (
    PACKED_DEPTH_MAX, PACKED_FEATURES_MAX, PACKED_GROUPS_MAX, PACKED_LANES, PACKED_NODES_MAX, PackedModel,
    packed_open, packed_score,
)
from native.text cimport TEXT_FEATURES, TEXT_SCHEMA
from native.windows cimport BEHAVIOUR_SCHEMA

import numpy as np

TREE_SLOTS = ("xgboost", "forest", "isolation")
SUBSET_NAMES = ("linear", "linear+xgboost", "linear+forest", "all")
KINDS = {"float32": 1, "float64": 2, "packed": TREE_PACKED}
LIMITS = {"knots": KNOTS_MAX, "features": TREE_FEATURES_MAX, "library_name_bytes": LIBRARY_NAME_MAX - 1,
          "runtime_bytes": RUNTIME_BYTES_MAX, "packed_features": PACKED_FEATURES_MAX,
          "packed_trees": PACKED_GROUPS_MAX * PACKED_LANES, "packed_nodes": PACKED_NODES_MAX,
          "packed_depth": PACKED_DEPTH_MAX + 4}
TEXT_SCHEMA_NUMBER = TEXT_SCHEMA
BEHAVIOUR_SCHEMA_NUMBER = BEHAVIOUR_SCHEMA
TEXT_FEATURE_COUNT = TEXT_FEATURES
TEXT_ROW_COUNT = TEXT_ROW
VERSION = RUNTIME_VERSION


class ModelsError(Exception):
    """A runtime folder that was refused; the text says which file, what is wrong and what to do."""


def sip(data: bytes) -> int:
    """The checksum (SipHash-2-4, fixed key) that runtime.bin holds of a library's bytes."""
    return siphash24(data, len(data), 1, 2)


cdef int _knots(Calibration *out, object pairs) except -1:
    cdef uint32_t i = 0
    pairs = list(pairs)
    if len(pairs) == 1 or len(pairs) > KNOTS_MAX:
        raise ValueError(f"{len(pairs)} knots, allowed are 2 to {KNOTS_MAX} or none")
    for x, y in pairs:
        out.x[i] = x
        out.y[i] = y
        if i > 0 and not (out.x[i] > out.x[i - 1] and out.y[i] >= out.y[i - 1]):
            raise ValueError("knots must rise (in 32-bit floats): " + repr(pairs))
        i += 1
    out.n = i
    return 0


def runtime_bytes(*, generation, behaviour_schema=0, behaviour_features=0, linear=b"", trees=None,
                  weights=None, text=None, behaviour=(), text_schema=TEXT_SCHEMA,
                  text_features=TEXT_FEATURES):
    """The content of a runtime.bin.

    trees: slot name -> dict(kind "float32"|"float64", features, ratio, library, library_bytes, library_sip)
    or dict(kind "packed", features, ratio, packed: bytes);
    weights: subset name -> (linear, xgboost, forest, bias); text: subset name -> [(raw, score), ...];
    behaviour: [(raw, score), ...]. Raises ValueError for what would not fit."""
    cdef RuntimeFile h
    cdef uint64_t checksum, offset, total
    cdef uint32_t i
    cdef bytes name, block
    memset(&h, 0, sizeof(RuntimeFile))
    memcpy(h.magic, or_runtime_magic, 8)
    offset = (sizeof(RuntimeFile) + 63) // 64 * 64
    after = bytearray(linear)
    packed_at = {}
    for slot, tree in (trees or {}).items():
        if tree["kind"] == "packed":
            after += bytes((64 - len(after) % 64) % 64)
            packed_at[slot] = offset + len(after)
            after += tree["packed"]
    total = (offset + len(after) + 7) // 8 * 8 + 8
    if total > RUNTIME_BYTES_MAX:
        raise ValueError(f"linear model and packed trees have {len(after)} bytes, at most {RUNTIME_BYTES_MAX} fit")
    h.version = RUNTIME_VERSION
    h.header_bytes = sizeof(RuntimeFile)
    h.total_bytes = total
    h.generation = generation
    h.text_schema = text_schema
    h.text_features = text_features
    h.behaviour_schema = behaviour_schema
    h.behaviour_features = behaviour_features
    h.linear_offset = offset if linear else 0
    h.linear_bytes = len(linear)
    for slot, tree in (trees or {}).items():
        i = TREE_SLOTS.index(slot)
        if tree["kind"] == "packed":
            h.tree[i].kind = TREE_PACKED
            h.tree[i].features = tree["features"]
            h.tree[i].ratio = tree["ratio"]
            h.tree[i].packed_offset = packed_at[slot]
            h.tree[i].packed_bytes = len(tree["packed"])
            continue
        name = tree["library"].encode()
        if len(name) >= LIBRARY_NAME_MAX:
            raise ValueError(f"library name of {len(name)} bytes, at most {LIBRARY_NAME_MAX - 1}")
        h.tree[i].kind = KINDS[tree["kind"]]
        h.tree[i].features = tree["features"]
        h.tree[i].ratio = tree["ratio"]
        h.tree[i].library_bytes = tree["library_bytes"]
        h.tree[i].library_sip = tree["library_sip"]
        memcpy(h.tree[i].library, <const char *>name, len(name))
    for subset, (a, b, c, d) in (weights or {}).items():
        i = SUBSET_NAMES.index(subset)
        h.weights[i].linear, h.weights[i].xgboost = a, b
        h.weights[i].forest, h.weights[i].bias = c, d
    for subset, pairs in (text or {}).items():
        _knots(&h.text[SUBSET_NAMES.index(subset)], pairs)
    _knots(&h.behaviour, behaviour)
    block = (<char *>&h)[:sizeof(RuntimeFile)]
    block = block.ljust(offset, b"\0") + bytes(after)
    block = block.ljust(total - 8, b"\0")
    checksum = siphash24(block, len(block), 1, 2)
    return block + (<char *>&checksum)[:8]


def calibrated(pairs, raw):
    """`calibrate` for an array: knots [(raw, score), ...], raw outputs (n,) -> scores (n,) float32."""
    cdef Calibration c
    cdef const float[::1] values = np.ascontiguousarray(raw, dtype=np.float32)
    cdef float[::1] out = np.zeros(values.shape[0], dtype=np.float32)
    cdef Py_ssize_t i
    memset(&c, 0, sizeof(Calibration))
    _knots(&c, pairs)
    for i in range(values.shape[0]):
        out[i] = calibrate(&c, values[i])
    return np.asarray(out)


def packed_predict(bytes block, rows, wide=None):
    """Outputs (n,) float32 of packed trees for rows (n, features) float32, NaN being a missing value.

    wide: whether AVX-512 takes the top levels, None for what the processor has. Raises ModelsError for a block
    that is refused."""
    cdef PackedModel m
    cdef const char *wrong
    cdef const float[:, ::1] x = np.ascontiguousarray(rows, dtype=np.float32)
    cdef float[::1] out = np.empty(x.shape[0], dtype=np.float32)
    cdef Py_ssize_t i, n = len(block)
    cdef const char *source = block
    cdef void *memory = NULL
    if posix_memalign(&memory, 64, n + 64) != 0:
        raise MemoryError
    try:
        memcpy(memory, source, n)
        wrong = packed_open(<const char *>memory, n, &m)
        if wrong != NULL:
            raise ModelsError("packed trees are refused: " + wrong.decode())
        if x.shape[1] != m.features:
            raise ValueError(f"rows of {x.shape[1]} floats, the model takes {m.features}")
        if wide is not None:
            m.wide = m.wide if wide else 0
        with nogil:
            for i in range(x.shape[0]):
                out[i] = packed_score(&m, &x[i, 0], x[i, 0])
    finally:
        free(memory)
    return np.asarray(out)


cdef class Models:
    """The models of one runtime folder, open until close() or the object's end.

    Raises ModelsError when the folder is refused. Scoring runs without the GIL and may go on in
    several threads at once; close() only when no other thread scores."""
    cdef ModelSet set
    cdef bint opened
    cdef readonly str folder

    def __cinit__(self, folder):
        cdef char err[1024]
        cdef bytes path = str(folder).encode()
        cdef const char *p = path
        cdef int rc
        self.folder = str(folder)
        if b"\0" in path:
            raise ModelsError(f"{self.folder!r}: a path has no NUL bytes")
        with nogil:
            rc = modelset_open(p, geteuid(), &self.set, err, sizeof(err))
        if rc != 0:
            raise ModelsError(err.decode("utf-8", "replace"))
        self.opened = True

    def close(self):
        if self.opened:
            self.opened = False
            modelset_close(&self.set)

    def __dealloc__(self):
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    cdef TreeModel *_tree(self, str slot) except NULL:
        if not self.opened:
            raise ModelsError(f"{self.folder}: closed")
        if slot == "xgboost":
            return &self.set.xgboost
        if slot == "forest":
            return &self.set.forest
        if slot == "isolation":
            return &self.set.isolation
        raise ValueError(f"no tree model {slot!r}; there are {', '.join(TREE_SLOTS)}")

    @property
    def generation(self) -> int:
        return self.set.generation

    @property
    def behaviour_schema(self) -> int:
        return self.set.behaviour_schema

    @property
    def has_text(self) -> bool:
        return bool(self.set.has_text)

    def engine(self, slot) -> str:
        """"packed" or "compiled"; "none" where the bundle has no such model."""
        cdef TreeModel *m = self._tree(slot)
        if m.kind == TREE_PACKED:
            return "packed"
        return "compiled" if m.kind else "none"

    def features(self, slot) -> int:
        """Floats in a row of this model; 0 where the bundle has no such model."""
        return self._tree(slot).features

    def predict(self, slot, rows):
        """Raw outputs (n,) float32 for rows (n, features) float32; NaN is missing."""
        cdef TreeModel *m = self._tree(slot)
        cdef const float[:, ::1] x = np.ascontiguousarray(rows, dtype=np.float32)
        cdef float[::1] out = np.empty(x.shape[0], dtype=np.float32)
        cdef TreeScratch scratch
        cdef Py_ssize_t i
        if m.kind and x.shape[1] != m.features:
            raise ValueError(f"rows of {x.shape[1]} floats, the model takes {m.features}")
        if x.shape[1] == 0:
            raise ValueError("rows without features")
        with nogil:
            for i in range(x.shape[0]):
                out[i] = tree_predict(m, &x[i, 0], &scratch)
        return np.asarray(out)

    def time_rows(self, slot, rows, bint portable=False):
        """Score rows (n, features) one after the other; (mean us by the clock around all of them, us of each
        (n,) float32). The latter hold a reading of the clock, some 0.02 us.

        portable: packed trees as on a processor without AVX-512."""
        cdef TreeModel own = self._tree(slot)[0]
        cdef TreeModel *m = &own
        cdef const float[:, ::1] x = np.ascontiguousarray(rows, dtype=np.float32)
        cdef float[::1] out = np.empty(x.shape[0], dtype=np.float32)
        cdef TreeScratch scratch
        cdef timespec start, before, now
        cdef Py_ssize_t i
        cdef float sink = 0.0
        cdef double whole
        if not m.kind or x.shape[0] == 0 or x.shape[1] != m.features:
            raise ValueError(f"no rows of the model's {m.features} floats")
        if portable:
            own.packed.wide = 0
        with nogil:
            clock_gettime(CLOCK_MONOTONIC, &start)
            for i in range(x.shape[0]):
                sink += tree_predict(m, &x[i, 0], &scratch)
            clock_gettime(CLOCK_MONOTONIC, &now)
            whole = (now.tv_sec - start.tv_sec) * 1e6 + (now.tv_nsec - start.tv_nsec) * 1e-3
            before = now
            for i in range(x.shape[0]):
                sink += tree_predict(m, &x[i, 0], &scratch)
                clock_gettime(CLOCK_MONOTONIC, &now)
                out[i] = <float>((now.tv_sec - before.tv_sec) * 1e6 + (now.tv_nsec - before.tv_nsec) * 1e-3)
                before = now
        if sink == 0.123456789:      # the sum is read, so that the compiler has to make it
            out[0] += 1e-9
        return whole / x.shape[0], np.asarray(out)

    def text_raw(self, float linear, float xgboost=float("nan"), float forest=float("nan")):
        """(combined raw output, name of the subset of models that it is made of)."""
        cdef uint32_t which
        cdef float raw
        self._tree("forest")
        raw = models_text_raw(&self.set, linear, xgboost, forest, &which)
        return raw, SUBSET_NAMES[which]

    def text_score(self, float linear, float xgboost=float("nan"), float forest=float("nan")):
        """Calibrated score 0..1; NaN where a model did not run."""
        self._tree("forest")
        return models_text_score(&self.set, linear, xgboost, forest)

    def behaviour_score(self, float isolation):
        """Calibrated score 0..1 of the Isolation Forest's raw output."""
        self._tree("isolation")
        return models_behaviour_score(&self.set, isolation)
