"""Models of the data plane: trees (packed or compiled), the linear text model, how they are combined
and how raw outputs become scores from 0 to 1.

A *runtime folder* (made by sidecar/compilers.py) holds one flat file, `runtime.bin`, and the
shared libraries that it names, none where all trees are packed. `modelset_open` checks everything
it reads before it uses it and says what is wrong; a refused folder leaves nothing behind, so that
the caller can go on with the models it has. Nothing here needs Python, JSON or a compiler.

Packed trees (native/packed.pxd) are data in runtime.bin. Compiled trees are what TL2cgen generates:
`predict(entries, pred_margin, result)`, which *adds* into result and takes the integer -1 for a
missing value. Callers of tree_predict don't know which of the two they have.

runtime.bin, little-endian, in this order: RuntimeFile, the linear model's bytes, the packed trees,
then a SipHash of all that precedes (protects against damage, not against someone who may write the
folder: that is what the owner and mode checks are for).
"""
from libc.errno cimport errno
from libc.math cimport exp2f, logf
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memset, strerror, strlen
from posix.fcntl cimport O_RDONLY, open
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, mprotect, munmap
from posix.stat cimport S_ISDIR, S_ISREG, fstat, struct_stat
from posix.types cimport uid_t
from posix.unistd cimport close, geteuid, read

from native.base cimport siphash24
from native.packed cimport PackedModel, packed_open, packed_score
from native.text cimport TEXT_FEATURES, TEXT_SCHEMA, TextModel, text_model_from_bytes

cdef extern from "fcntl.h" nogil:
    int O_CLOEXEC
    int O_DIRECTORY

cdef extern from "dlfcn.h" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    int dlclose(void *handle)
    char *dlerror()
    int RTLD_NOW
    int RTLD_LOCAL


cdef enum:
    RUNTIME_VERSION = 2
    RUNTIME_BYTES_MAX = 64 << 20     # of runtime.bin
    LIBRARY_BYTES_MAX = 64 << 20     # of each library
    LIBRARY_NAME_MAX = 96
    KNOTS_MAX = 16
    TREE_FEATURES_MAX = 128
    TREES = 3
    SUBSETS = 4
    TEXT_ROW = TEXT_FEATURES         # what the text trees take; feature 0 is the linear score
    PATH_BYTES_MAX = 4096

cdef enum:
    TREE_XGBOOST = 0                 # text, raw margin (log odds)
    TREE_FOREST = 1                  # text, probability of an attack
    TREE_ISOLATION = 2               # behaviour, anomaly score 0..1

cdef enum:
    TREE_NONE = 0
    TREE_FLOAT32 = 1
    TREE_FLOAT64 = 2
    TREE_PACKED = 3

cdef enum:                           # which text models a score was made from (bits)
    SUBSET_LINEAR = 0
    SUBSET_XGBOOST = 1
    SUBSET_FOREST = 2
    SUBSET_ALL = 3


cdef union Entry32:
    int32_t missing                  # -1: no value (the bits of a float that is a NaN)
    float value

cdef union Entry64:
    int32_t missing                  # -1 in the low half: no double made from a float has it
    double value

cdef struct TreeScratch:             # one per worker thread; needs no initialisation
    Entry32 narrow[TREE_FEATURES_MAX]
    Entry64 wide[TREE_FEATURES_MAX]

ctypedef void (*predict32_t)(Entry32 *row, int pred_margin, float *result) noexcept nogil
ctypedef void (*predict64_t)(Entry64 *row, int pred_margin, double *result) noexcept nogil
ctypedef int32_t (*count_t)() noexcept nogil
ctypedef const char *(*type_name_t)() noexcept nogil

cdef struct TreeModel:
    void *library                    # dlopen handle, NULL where there is none
    void *predict                    # the library's, NULL where there is none
    uint32_t kind                    # TREE_NONE: there is no such model
    uint32_t features                # floats in a row
    float ratio                      # > 0: output is 2^(-margin / ratio) (Isolation Forest)
    PackedModel packed               # of TREE_PACKED; points into the set's memory

cdef struct Calibration:
    # raw output -> score, straight lines between the knots, flat beyond the ends
    uint32_t n                       # knots in use, 2..KNOTS_MAX; 0: none, the score is 0
    float x[KNOTS_MAX]               # strictly rising
    float y[KNOTS_MAX]               # not falling, within 0..1

cdef struct Weights:
    # raw = linear * linear + xgboost * margin + forest * logit(probability) + bias
    float linear
    float xgboost
    float forest
    float bias

cdef struct TreeFile:
    uint32_t kind
    uint32_t features
    float ratio
    uint32_t spare
    uint64_t library_bytes
    uint64_t library_sip             # SipHash-2-4 of the library file, key (1, 2)
    char library[LIBRARY_NAME_MAX]   # file name in the runtime folder, NUL-terminated
    uint64_t packed_offset           # of TREE_PACKED: where its bytes are in this file
    uint64_t packed_bytes

cdef struct RuntimeFile:
    char magic[8]
    uint32_t version
    uint32_t header_bytes            # sizeof(RuntimeFile)
    uint64_t total_bytes             # of the file, checksum included
    uint64_t generation              # first 8 bytes of the bundle's SHA-256
    uint32_t text_schema
    uint32_t text_features
    uint32_t behaviour_schema
    uint32_t behaviour_features
    uint64_t linear_offset
    uint64_t linear_bytes
    TreeFile tree[TREES]
    Weights weights[SUBSETS]
    Calibration text[SUBSETS]
    Calibration behaviour

cdef struct ModelSet:
    uint64_t generation
    uint32_t behaviour_schema
    uint32_t behaviour_features      # floats per row of the Isolation Forest, 0 where there is none
    char *memory                     # runtime.bin, read-only
    uint64_t memory_bytes
    TextModel text                   # points into memory
    uint8_t has_text
    TreeModel xgboost
    TreeModel forest
    TreeModel isolation
    Weights weights[SUBSETS]
    Calibration text_scores[SUBSETS]
    Calibration behaviour_scores


cdef extern from *:
    """
    static const char or_runtime_magic[8] = {'O', 'R', 'M', 'O', 'D', 'E', 'L', 'S'};
    /* behind a function: Cython has no spelling for a NaN constant without <math.h> macros */
    static inline float or_nanf(void) { return __builtin_nanf(""); }
    """
    const char *or_runtime_magic
    float or_nanf() noexcept nogil


# ---------------------------------------------------------------- scoring

cdef inline float _tree_output(const TreeModel *m, float raw) noexcept nogil:
    """What a sum over the trees says: itself, or the anomaly score of an average path length."""
    if m.ratio > 0.0:
        return exp2f(-raw / m.ratio)
    return raw


cdef inline float _tree_run(const TreeModel *m, TreeScratch *s) noexcept nogil:
    """Call the library on the entries in the scratch memory."""
    cdef float narrow = 0.0
    cdef double wide = 0.0
    cdef float raw
    if m.kind == TREE_FLOAT32:
        (<predict32_t>m.predict)(s.narrow, 1, &narrow)
        raw = narrow
    else:
        (<predict64_t>m.predict)(s.wide, 1, &wide)
        raw = <float>wide
    return _tree_output(m, raw)


cdef inline void _tree_fill(const TreeModel *m, const float *row, uint32_t n, TreeScratch *s) noexcept nogil:
    """The n entries of a row, NaN becoming the missing value."""
    cdef uint32_t i
    cdef float x
    if m.kind == TREE_FLOAT32:
        for i in range(n):
            x = row[i]
            if x != x:
                s.narrow[i].missing = -1
            else:
                s.narrow[i].value = x
    else:
        for i in range(n):
            x = row[i]
            s.wide[i].value = x
            if x != x:
                s.wide[i].value = 0.0
                s.wide[i].missing = -1


cdef inline float tree_predict(const TreeModel *m, const float *row, TreeScratch *s) noexcept nogil:
    """Raw output for a row of m.features floats; NaN is a missing value, infinities are values.

    Returns NaN where there is no such model."""
    if m.kind == TREE_PACKED:
        return _tree_output(m, packed_score(&m.packed, row, row[0]))
    if m.kind == TREE_NONE:
        return or_nanf()
    _tree_fill(m, row, m.features, s)
    return _tree_run(m, s)


cdef inline float tree_predict_text(const TreeModel *m, float linear, const float *features,
                                    TreeScratch *s) noexcept nogil:
    """As tree_predict, for the text trees: TEXT_FEATURES features, the first being the linear score."""
    if m.kind == TREE_PACKED:
        return _tree_output(m, packed_score(&m.packed, features, linear))
    if m.kind == TREE_NONE:
        return or_nanf()
    _tree_fill(m, features, TEXT_FEATURES, s)
    if m.kind == TREE_FLOAT32 and linear == linear:
        s.narrow[0].value = linear
    elif m.kind == TREE_FLOAT64 and linear == linear:
        s.wide[0].value = linear
    return _tree_run(m, s)


cdef inline float calibrate(const Calibration *c, float raw) noexcept nogil:
    """Score 0..1 of a raw output; 0 for NaN and where there is no calibration."""
    cdef uint32_t i
    cdef float part
    if c.n == 0 or raw != raw:
        return 0.0
    if raw <= c.x[0]:
        return c.y[0]
    for i in range(1, c.n):
        if raw < c.x[i]:
            part = (raw - c.x[i - 1]) / (c.x[i] - c.x[i - 1])
            return c.y[i - 1] + part * (c.y[i] - c.y[i - 1])
    return c.y[c.n - 1]


cdef inline float models_text_raw(const ModelSet *m, float linear, float xgboost, float forest,
                                  uint32_t *subset) noexcept nogil:
    """The combined raw output of those text models that ran (NaN: did not), and which they were."""
    cdef uint32_t which = SUBSET_LINEAR
    cdef float raw, p
    if xgboost == xgboost:
        which |= SUBSET_XGBOOST
    if forest == forest:
        which |= SUBSET_FOREST
    subset[0] = which
    raw = m.weights[which].bias + m.weights[which].linear * linear
    if which & SUBSET_XGBOOST:
        raw += m.weights[which].xgboost * xgboost
    if which & SUBSET_FOREST:
        # as log odds, within +-6.9: a forest's 0 and 1 are not certainties
        p = forest
        if p < 0.001:
            p = 0.001
        elif p > 0.999:
            p = 0.999
        raw += m.weights[which].forest * logf(p / (1.0 - p))
    return raw


cdef inline float models_text_score(const ModelSet *m, float linear, float xgboost,
                                    float forest) noexcept nogil:
    """Calibrated score 0..1 from the raw outputs; NaN where a tree model did not run.

    Each subset has its own calibration, so that a skipped stage doesn't shift the scores."""
    cdef uint32_t which
    cdef float raw = models_text_raw(m, linear, xgboost, forest, &which)
    return calibrate(&m.text_scores[which], raw)


cdef inline float models_behaviour_score(const ModelSet *m, float isolation) noexcept nogil:
    """Calibrated score 0..1 of the Isolation Forest's raw output; 0 for NaN."""
    return calibrate(&m.behaviour_scores, isolation)


# ---------------------------------------------------------------- loading

cdef inline void modelset_close(ModelSet *m) noexcept nogil:
    """Give back libraries and memory; m is empty afterwards. The caller has ensured that nobody scores
    with m any more."""
    if m.xgboost.library != NULL:
        dlclose(m.xgboost.library)
    if m.forest.library != NULL:
        dlclose(m.forest.library)
    if m.isolation.library != NULL:
        dlclose(m.isolation.library)
    if m.memory != NULL:
        munmap(m.memory, m.memory_bytes)
    memset(m, 0, sizeof(ModelSet))


cdef inline char *_file_read(const char *folder, const char *name, uid_t owner, uint64_t bytes_max, uint64_t *n,
                             char *err, size_t err_n) noexcept nogil:
    """A whole file into memory of its own (a mapped file could shrink under us and kill the process).

    Only regular files of ours, root's or this owner's that nobody else may write. NULL and a text in err on failure;
    else the caller unmaps n[0] bytes."""
    cdef char path[PATH_BYTES_MAX]
    cdef struct_stat st
    cdef char *memory
    cdef uint64_t got = 0
    cdef ssize_t r
    cdef int fd
    if snprintf(path, PATH_BYTES_MAX, b"%s/%s", folder, name) >= PATH_BYTES_MAX:
        snprintf(err, err_n, b"%.200s...: the path is longer than 4095 bytes", folder)
        return NULL
    fd = open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        snprintf(err, err_n, b"%.700s: cannot open: %s", path, strerror(errno))
        return NULL
    if fstat(fd, &st) != 0 or not S_ISREG(st.st_mode):
        snprintf(err, err_n, b"%.700s: not a regular file", path)
        close(fd)
        return NULL
    if (st.st_uid != 0 and st.st_uid != geteuid() and st.st_uid != owner) or st.st_mode & 0o022:
        snprintf(err, err_n, b"%.700s: refused, someone else may write it (owner %u, mode %o); models are "
                 b"code: they must belong to this user or root and be writable by nobody else",
                 path, <unsigned int>st.st_uid, <unsigned int>(st.st_mode & 0o7777))
        close(fd)
        return NULL
    if st.st_size <= 0 or <uint64_t>st.st_size > bytes_max:
        snprintf(err, err_n, b"%.700s: %lld bytes, allowed are 1 to %llu", path, <long long>st.st_size,
                 <unsigned long long>bytes_max)
        close(fd)
        return NULL
    n[0] = <uint64_t>st.st_size
    memory = <char *>mmap(NULL, n[0], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>memory == MAP_FAILED:
        snprintf(err, err_n, b"%.700s: no memory for %llu bytes", path, <unsigned long long>n[0])
        close(fd)
        return NULL
    while got < n[0]:
        r = read(fd, memory + got, n[0] - got)
        if r <= 0:
            snprintf(err, err_n, b"%.700s: cut short while it was read, %llu of %llu bytes", path,
                     <unsigned long long>got, <unsigned long long>n[0])
            munmap(memory, n[0])
            close(fd)
            return NULL
        got += <uint64_t>r
    close(fd)
    return memory


cdef inline bint _calibration_good(const Calibration *c) noexcept nogil:
    cdef uint32_t i
    if c.n == 0:
        return True
    if c.n < 2 or c.n > KNOTS_MAX:
        return False
    for i in range(c.n):
        # written so that a NaN fails
        if not (-1e30 < c.x[i] < 1e30) or not (0.0 <= c.y[i] <= 1.0):
            return False
        if i > 0 and not (c.x[i] > c.x[i - 1] and c.y[i] >= c.y[i - 1]):
            return False
    return True


cdef inline bint _weights_good(const Weights *w) noexcept nogil:
    return (-1e6 < w.linear < 1e6 and -1e6 < w.xgboost < 1e6 and -1e6 < w.forest < 1e6
            and -1e6 < w.bias < 1e6)


cdef inline bint _name_good(const char *name) noexcept nogil:
    """A plain file name of at most LIBRARY_NAME_MAX - 1 bytes that cannot leave its folder."""
    cdef uint32_t i
    cdef char c
    if name[0] == 0 or name[0] == c'.':
        return False
    for i in range(<uint32_t>LIBRARY_NAME_MAX):
        c = name[i]
        if c == 0:
            return True
        if not (c'a' <= c <= c'z' or c'A' <= c <= c'Z' or c'0' <= c <= c'9'
                or c == c'.' or c == c'-' or c == c'_'):
            return False
    return False


cdef inline int _tree_packed(const char *folder, const char *memory, uint64_t n, const TreeFile *f,
                             TreeModel *out, char *err, size_t err_n) noexcept nogil:
    """Take packed trees from runtime.bin (n bytes); 0, or -1 and a text in err."""
    cdef const char *wrong
    if f.features == 0 or f.features > TREE_FEATURES_MAX or not (0.0 <= f.ratio < 1e6):
        snprintf(err, err_n, b"%.700s/runtime.bin: the entry of a tree model is not valid", folder)
        return -1
    if f.packed_offset < sizeof(RuntimeFile) or f.packed_offset % 64 != 0 or f.packed_offset > n - 8 \
            or f.packed_bytes > n - 8 - f.packed_offset:
        snprintf(err, err_n, b"%.700s/runtime.bin: packed trees lie outside the file", folder)
        return -1
    wrong = packed_open(memory + f.packed_offset, f.packed_bytes, &out.packed)
    if wrong != NULL:
        snprintf(err, err_n, b"%.700s/runtime.bin: packed trees are refused: %s; delete the folder and prepare "
                 b"the bundle again", folder, wrong)
        return -1
    if out.packed.features != f.features:
        snprintf(err, err_n, b"%.700s/runtime.bin: packed trees take %u features where %u are declared", folder,
                 <unsigned int>out.packed.features, <unsigned int>f.features)
        return -1
    out.kind = TREE_PACKED
    out.features = f.features
    out.ratio = f.ratio
    return 0


cdef inline int _tree_open(const char *folder, const char *memory, uint64_t bytes_n, const TreeFile *f,
                           TreeModel *out, char *err, size_t err_n) noexcept nogil:
    """Take one model from runtime.bin (bytes_n bytes), or open its library and ask it what it is; 0, or -1
    and a text in err."""
    cdef char path[PATH_BYTES_MAX]
    cdef uint64_t n = 0, sip
    cdef char *content
    cdef void *count
    cdef void *threshold
    cdef void *leaf
    cdef const char *want = b"float64"
    cdef const char *start = b"./"
    cdef const char *says
    if f.kind == TREE_NONE:
        return 0
    if f.kind == TREE_PACKED:
        return _tree_packed(folder, memory, bytes_n, f, out, err, err_n)
    if f.kind > TREE_FLOAT64 or f.features == 0 or f.features > TREE_FEATURES_MAX \
            or not (0.0 <= f.ratio < 1e6) or not _name_good(f.library):
        snprintf(err, err_n, b"%.700s/runtime.bin: the entry of a tree model is not valid", folder)
        return -1
    if f.kind == TREE_FLOAT32:
        want = b"float32"
    # code: whoever else owns the data of the folder may not have us run it
    content = _file_read(folder, f.library, geteuid(), LIBRARY_BYTES_MAX, &n, err, err_n)
    if content == NULL:
        return -1
    sip = siphash24(content, n, 1, 2)
    munmap(content, n)
    if n != f.library_bytes or sip != f.library_sip:
        snprintf(err, err_n, b"%.600s/%s: damaged: not the library that was compiled; delete the folder and "
                 b"compile the bundle again", folder, f.library)
        return -1
    # the name in the path holds the content's hash: the loader never mistakes a new library for an old one
    if folder[0] == c'/':
        start = b""
    if snprintf(path, PATH_BYTES_MAX, b"%s%s/%s", start, folder, f.library) >= PATH_BYTES_MAX:
        snprintf(err, err_n, b"%.200s...: the path is longer than 4095 bytes", folder)
        return -1
    out.library = dlopen(path, RTLD_NOW | RTLD_LOCAL)
    if out.library == NULL:
        says = dlerror()
        if says == NULL:
            says = b"no reason given"
        snprintf(err, err_n, b"%.700s: cannot load: %s", path, says)
        return -1
    out.predict = dlsym(out.library, b"predict")
    count = dlsym(out.library, b"get_num_feature")
    threshold = dlsym(out.library, b"get_threshold_type")
    leaf = dlsym(out.library, b"get_leaf_output_type")
    if out.predict == NULL or count == NULL or threshold == NULL or leaf == NULL:
        snprintf(err, err_n, b"%.700s: not a tree library: predict or its description is missing", path)
        return -1
    if memcmp((<type_name_t>threshold)(), want, 8) != 0 or memcmp((<type_name_t>leaf)(), want, 8) != 0:
        snprintf(err, err_n, b"%.700s: takes %.16s rows where %s is declared", path,
                 (<type_name_t>threshold)(), want)
        return -1
    if (<count_t>count)() != <int32_t>f.features:
        snprintf(err, err_n, b"%.700s: takes %d features where %u are declared", path,
                 <int>(<count_t>count)(), <unsigned int>f.features)
        return -1
    out.kind = f.kind
    out.features = f.features
    out.ratio = f.ratio
    return 0


cdef inline int _modelset_fill(const char *folder, uid_t owner, ModelSet *m, char *err, size_t err_n) noexcept nogil:
    cdef const RuntimeFile *h
    cdef uint64_t n = 0
    cdef uint64_t stored
    cdef uint32_t i
    cdef int rc
    m.memory = _file_read(folder, b"runtime.bin", owner, RUNTIME_BYTES_MAX, &n, err, err_n)
    if m.memory == NULL:
        return -1
    m.memory_bytes = n
    h = <const RuntimeFile *>m.memory
    if n < sizeof(RuntimeFile) + 8 or memcmp(h.magic, or_runtime_magic, 8) != 0:
        snprintf(err, err_n, b"%.700s/runtime.bin: not a file of compiled models", folder)
        return -1
    if h.version != RUNTIME_VERSION or h.header_bytes != sizeof(RuntimeFile):
        snprintf(err, err_n, b"%.700s/runtime.bin: version %u, this build reads version %u; compile the "
                 b"bundle again", folder, <unsigned int>h.version, <unsigned int>RUNTIME_VERSION)
        return -1
    # total_bytes is inside what the checksum covers, so a file cut or grown is found by either
    stored = (<const uint64_t *>(m.memory + n - 8))[0] if n % 8 == 0 else 0
    if h.total_bytes != n or n % 8 != 0 or siphash24(m.memory, n - 8, 1, 2) != stored:
        snprintf(err, err_n, b"%.700s/runtime.bin: damaged (%llu bytes); delete the folder and compile the "
                 b"bundle again", folder, <unsigned long long>n)
        return -1
    if h.text_schema != TEXT_SCHEMA or h.text_features != TEXT_FEATURES:
        snprintf(err, err_n, b"%.700s/runtime.bin: made for text features of schema %u (%u features), this "
                 b"build has schema %u (%u); train the bundle again", folder, <unsigned int>h.text_schema,
                 <unsigned int>h.text_features, <unsigned int>TEXT_SCHEMA, <unsigned int>TEXT_FEATURES)
        return -1
    for i in range(<uint32_t>SUBSETS):
        if not _weights_good(&h.weights[i]) or not _calibration_good(&h.text[i]):
            snprintf(err, err_n, b"%.700s/runtime.bin: weights or calibration of text subset %u are not "
                     b"valid", folder, <unsigned int>i)
            return -1
    if not _calibration_good(&h.behaviour):
        snprintf(err, err_n, b"%.700s/runtime.bin: the behaviour calibration is not valid", folder)
        return -1
    if h.linear_bytes != 0:
        if h.linear_offset < sizeof(RuntimeFile) or h.linear_offset % 64 != 0 or h.linear_offset > n - 8 \
                or h.linear_bytes > n - 8 - h.linear_offset:
            snprintf(err, err_n, b"%.700s/runtime.bin: the linear model lies outside the file", folder)
            return -1
        rc = text_model_from_bytes(m.memory + h.linear_offset, h.linear_bytes, &m.text)
        if rc != 0:
            snprintf(err, err_n, b"%.700s/runtime.bin: the linear text model is not valid (code %d)",
                     folder, rc)
            return -1
        m.has_text = 1
    if (h.tree[TREE_XGBOOST].kind != TREE_NONE and h.tree[TREE_XGBOOST].features != TEXT_ROW) \
            or (h.tree[TREE_FOREST].kind != TREE_NONE and h.tree[TREE_FOREST].features != TEXT_ROW):
        snprintf(err, err_n, b"%.700s/runtime.bin: a text tree model doesn't take %u features", folder,
                 <unsigned int>TEXT_FEATURES)
        return -1
    if h.tree[TREE_ISOLATION].kind != TREE_NONE \
            and h.tree[TREE_ISOLATION].features != h.behaviour_features:
        snprintf(err, err_n, b"%.700s/runtime.bin: the Isolation Forest takes %u features where %u are "
                 b"declared", folder, <unsigned int>h.tree[TREE_ISOLATION].features,
                 <unsigned int>h.behaviour_features)
        return -1
    if _tree_open(folder, m.memory, n, &h.tree[TREE_XGBOOST], &m.xgboost, err, err_n) != 0 \
            or _tree_open(folder, m.memory, n, &h.tree[TREE_FOREST], &m.forest, err, err_n) != 0 \
            or _tree_open(folder, m.memory, n, &h.tree[TREE_ISOLATION], &m.isolation, err, err_n) != 0:
        return -1
    m.generation = h.generation
    m.behaviour_schema = h.behaviour_schema
    m.behaviour_features = h.behaviour_features
    for i in range(<uint32_t>SUBSETS):
        m.weights[i] = h.weights[i]
        m.text_scores[i] = h.text[i]
    m.behaviour_scores = h.behaviour
    mprotect(m.memory, n, PROT_READ)
    return 0


cdef inline int modelset_open(const char *runtime_dir, uid_t owner, ModelSet *out, char *err,
                              size_t err_n) noexcept nogil:
    """Open a runtime folder: 0 and a filled out, or -1, an empty out and a text in err (err_n >= 1 bytes).

    owner: whose runtime.bin is taken besides ours and root's (geteuid(): nobody's). Libraries are code and must be
    ours or root's.

    Slow (reads, hashes, dlopen): never called between a request and its answer. Close with
    modelset_close. The behaviour schema is the caller's to compare: the window features are not
    known here."""
    memset(out, 0, sizeof(ModelSet))
    err[0] = 0
    if strlen(runtime_dir) == 0:
        snprintf(err, err_n, b"no runtime folder given")
        return -1
    if _modelset_fill(runtime_dir, owner, out, err, err_n) != 0:
        modelset_close(out)
        return -1
    return 0
