"""Trees as data, walked without branches: the packed engine.

A model is one block of bytes (written by sidecar/packing.py), in this order:

    PackedFile                       64 bytes
    PackedGroup[groups]              the first four levels of 16 trees each, as complete trees
    PackedNode[nodes]                everything below

Feature values and thresholds are int32 *keys* that sort as their floats do, so that a split is one
integer comparison: right where key(x) > key. Each feature has two key slots, f and 128 + f, which
hold the same key but for a missing value: the lowest key in the first (goes left everywhere), the
highest in the second (goes right). A split names the slot of its default side, and NaN needs no test.

The four top levels give an entry among the tree's 16, which are nodes[16 * tree + 0 .. 15]. From
there on a node's link says where its left child is; the right one is the next. A leaf is its own
left child and compares with slot 127, which holds the lowest key: walking on stays there, so that
eight trees can take the same number of steps without asking who has arrived. A leaf's key field holds
its value, on the cache line that the walk has just read.

On x86-64 with AVX-512, the top levels of 16 trees are taken at once with the features in registers
(two or four) by permutation; nothing is gathered. Everywhere else they are walked as the rest is.

No allocation, no Python; packed_open checks all that scoring relies upon.
"""
from libc.stdint cimport INT32_MAX, INT32_MIN, int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

cdef enum:
    PACKED_VERSION = 1
    PACKED_FEATURES_MAX = 127        # slot 127 is the leaves'
    PACKED_GROUPS_MAX = 512          # of 16 trees
    PACKED_NODES_MAX = 1 << 22       # a link has 24 bits for a node
    PACKED_DEPTH_MAX = 120           # levels below the top four
    PACKED_LANES = 16                # trees in a group
    PACKED_CHUNK = 16                # groups whose entries are held at a time
    PACKED_RIGHT = 128               # added to a feature's slot: a missing value goes right
    PACKED_LEAF = 127                # the slot that never goes right
    PACKED_WIDE_FEATURES = 64        # what fits into registers

cdef struct PackedFile:
    char magic[8]
    uint32_t version
    uint32_t features
    uint32_t trees
    uint32_t groups
    uint32_t nodes
    uint32_t spare
    uint64_t bytes                   # of all, this header included
    double base                      # output = base + scale * (sum of the leaves)
    double scale
    uint64_t spare_end

cdef struct PackedGroup:             # row i holds node i + 1 of a complete tree, whose children are 2n and 2n + 1
    int32_t key[15][16]
    uint8_t slot[15][16]
    uint8_t depth[2]                 # steps below the entries: of the first eight trees, of the others
    uint8_t spare[78]

cdef union PackedWord:
    int32_t key                      # of a split
    float leaf

cdef struct PackedNode:
    PackedWord word
    uint32_t link                    # left child << 8 | slot

cdef struct PackedModel:             # points into the bytes it was opened on
    const PackedGroup *group
    const PackedNode *node
    uint32_t groups
    uint32_t features
    uint32_t eights                  # batches of eight trees; the last group may have one only
    uint32_t wide                    # 1: AVX-512 takes the top levels
    double base
    double scale

cdef union PackedFloat:
    float value
    int32_t bits


cdef extern from *:
    """
    static const char or_packed_magic[8] = {'O', 'R', 'P', 'A', 'C', 'K', 'E', 'D'};

    #if defined(__x86_64__) && defined(__GNUC__)
    #include <immintrin.h>
    #define OR_WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
    #define OR_WIDE_INLINE static inline __attribute__((always_inline)) OR_WIDE
    enum { OR_GROUP_BYTES = 1280, OR_GROUP_SLOTS = 960 };

    static inline int or_packed_wide_here(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }

    /* the keys of 16 features: for default left, and by *right for default right */
    OR_WIDE_INLINE __m512i or_wide_keys(__m512 x, __mmask16 *missing) {
        __m512i v = _mm512_castps_si512(_mm512_add_ps(x, _mm512_setzero_ps()));
        v = _mm512_xor_si512(v, _mm512_and_si512(_mm512_srai_epi32(v, 31), _mm512_set1_epi32(0x7fffffff)));
        *missing = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_mask_mov_epi32(v, *missing, _mm512_set1_epi32((int)0x80000000u));
    }

    /* the features' keys that 16 splits compare with; slots: one per lane */
    OR_WIDE_INLINE __m512i or_wide_look(__m128i slots, __m512i x0, __m512i x1, __m512i x2, __m512i x3,
                                        int many, int holes) {
        const __m512i f = _mm512_cvtepu8_epi32(slots);
        __m512i v = _mm512_permutex2var_epi32(x0, f, x1);
        if (many)
            v = _mm512_mask_mov_epi32(v, _mm512_test_epi32_mask(f, _mm512_set1_epi32(32)),
                                      _mm512_permutex2var_epi32(x2, f, x3));
        if (holes) {                 /* lowest - 1 = highest */
            const __mmask16 m = _mm512_mask_cmpeq_epi32_mask(_mm512_test_epi32_mask(f, _mm512_set1_epi32(128)), v,
                                                             _mm512_set1_epi32((int)0x80000000u));
            v = _mm512_mask_sub_epi32(v, m, v, _mm512_set1_epi32(1));
        }
        return v;
    }

    /* entries of 16 trees: the level's 1, 2, 4 or 8 rows are blended down to one by the way taken so far */
    OR_WIDE_INLINE __m512i or_wide_group(const char *group, __m512i x0, __m512i x1, __m512i x2, __m512i x3,
                                         int many, int holes) {
    #define K(n) _mm512_loadu_si512((const void *)(group + ((n) - 1) * 64))
    #define F(n) _mm_loadu_si128((const __m128i *)(const void *)(group + OR_GROUP_SLOTS + ((n) - 1) * 16))
    #define K2(m, n) _mm512_mask_blend_epi32(m, K(n), K((n) + 1))
    #define F2(m, n) _mm_mask_blend_epi8(m, F(n), F((n) + 1))
    #define K4(l, m, n) _mm512_mask_blend_epi32(l, K2(m, n), K2(m, (n) + 2))
    #define F4(l, m, n) _mm_mask_blend_epi8(l, F2(m, n), F2(m, (n) + 2))
        const __mmask16 a = _mm512_cmpgt_epi32_mask(or_wide_look(F(1), x0, x1, x2, x3, many, holes), K(1));
        const __mmask16 b = _mm512_cmpgt_epi32_mask(or_wide_look(F2(a, 2), x0, x1, x2, x3, many, holes), K2(a, 2));
        const __mmask16 c = _mm512_cmpgt_epi32_mask(or_wide_look(F4(a, b, 4), x0, x1, x2, x3, many, holes),
                                                    K4(a, b, 4));
        const __mmask16 d = _mm512_cmpgt_epi32_mask(
            or_wide_look(_mm_mask_blend_epi8(a, F4(b, c, 8), F4(b, c, 12)), x0, x1, x2, x3, many, holes),
            _mm512_mask_blend_epi32(a, K4(b, c, 8), K4(b, c, 12)));
        __m512i way = _mm512_maskz_set1_epi32(a, 8);
        way = _mm512_mask_add_epi32(way, b, way, _mm512_set1_epi32(4));
        way = _mm512_mask_add_epi32(way, c, way, _mm512_set1_epi32(2));
        return _mm512_mask_add_epi32(way, d, way, _mm512_set1_epi32(1));
    #undef K
    #undef F
    #undef K2
    #undef F2
    #undef K4
    #undef F4
    }

    OR_WIDE_INLINE void or_wide_groups(const char *group, uint32_t n, uint32_t entry, __m512i x0, __m512i x1,
                                       __m512i x2, __m512i x3, int many, int holes, uint32_t *entries) {
        const __m512i lane = _mm512_slli_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
        for (uint32_t g = 0; g < n; g++, group += OR_GROUP_BYTES, entry += 256) {
            const __m512i way = or_wide_group(group, x0, x1, x2, x3, many, holes);
            _mm512_storeu_si512((void *)(entries + 16 * g),
                                _mm512_add_epi32(way, _mm512_add_epi32(lane, _mm512_set1_epi32((int)entry))));
        }
    }

    /* Entries of n groups of 16 trees for a row of at most 64 features, whose keys are left in keys[0..63]
       and keys[128..191]. first: stands for row[0] unless it is NaN. */
    static OR_WIDE void or_packed_wide(const void *groups, uint32_t n, uint32_t entry, const float *row,
                                       uint32_t features, float first, int32_t *keys, uint32_t *entries) {
        const char *group = (const char *)groups;
        const uint64_t have = features >= 64 ? ~0ull : ((uint64_t)1 << features) - 1;
        const __m512i low = _mm512_set1_epi32((int)0x80000000u), high = _mm512_set1_epi32(0x7fffffff);
        __m512i x0, x1, x2 = low, x3 = low;
        __mmask16 m0, m1, m2 = 0, m3 = 0;
        __m512 head = _mm512_maskz_loadu_ps((__mmask16)have, row);
        head = _mm512_mask_mov_ps(head, first == first, _mm512_set1_ps(first));
        x0 = or_wide_keys(head, &m0);
        x1 = or_wide_keys(_mm512_maskz_loadu_ps((__mmask16)(have >> 16), row + 16), &m1);
        if (features > 32) {
            x2 = or_wide_keys(_mm512_maskz_loadu_ps((__mmask16)(have >> 32), row + 32), &m2);
            x3 = or_wide_keys(_mm512_maskz_loadu_ps((__mmask16)(have >> 48), row + 48), &m3);
            _mm512_storeu_si512((void *)(keys + 32), x2);
            _mm512_storeu_si512((void *)(keys + 48), x3);
            _mm512_storeu_si512((void *)(keys + 160), _mm512_mask_mov_epi32(x2, m2, high));
            _mm512_storeu_si512((void *)(keys + 176), _mm512_mask_mov_epi32(x3, m3, high));
        }
        _mm512_storeu_si512((void *)keys, x0);
        _mm512_storeu_si512((void *)(keys + 16), x1);
        _mm512_storeu_si512((void *)(keys + 128), _mm512_mask_mov_epi32(x0, m0, high));
        _mm512_storeu_si512((void *)(keys + 144), _mm512_mask_mov_epi32(x1, m1, high));
        if (m0 | m1 | m2 | m3)
            or_wide_groups(group, n, entry, x0, x1, x2, x3, 1, 1, entries);
        else if (features > 32)
            or_wide_groups(group, n, entry, x0, x1, x2, x3, 1, 0, entries);
        else
            or_wide_groups(group, n, entry, x0, x1, x2, x3, 0, 0, entries);
    }
    #else
    static inline int or_packed_wide_here(void) { return 0; }
    static inline void or_packed_wide(const void *groups, uint32_t n, uint32_t entry, const float *row,
                                      uint32_t features, float first, int32_t *keys, uint32_t *entries) {
        (void)groups; (void)n; (void)entry; (void)row; (void)features; (void)first; (void)keys; (void)entries;
    }
    #endif
    """
    const char *or_packed_magic
    int or_packed_wide_here() noexcept nogil
    void or_packed_wide(const void *groups, uint32_t n, uint32_t entry, const float *row, uint32_t features,
                        float first, int32_t *keys, uint32_t *entries) noexcept nogil


# ---------------------------------------------------------------- scoring

cdef inline void packed_keys(const float *row, uint32_t n, float first, int32_t *keys) noexcept nogil:
    """keys[0..n) and keys[128..128 + n) of a row; first stands for row[0] unless it is NaN."""
    cdef PackedFloat u
    cdef uint32_t i
    cdef int32_t key
    for i in range(n):
        # -0.0 becomes 0.0; a negative float's magnitude bits are turned round
        u.value = row[i] + <float>0.0
        key = u.bits ^ ((u.bits >> 31) & 0x7fffffff)
        keys[i] = key if u.value == u.value else INT32_MIN
        keys[PACKED_RIGHT + i] = key if u.value == u.value else INT32_MAX
    if first == first:
        u.value = first + <float>0.0
        key = u.bits ^ ((u.bits >> 31) & 0x7fffffff)
        keys[0] = key
        keys[PACKED_RIGHT] = key


cdef inline uint32_t _packed_top(const PackedGroup *g, const int32_t *keys, uint32_t lane, uint32_t i) noexcept nogil:
    """One level down in the complete tree of a lane; nodes count from 1."""
    return 2 * i + <uint32_t>(keys[g.slot[i - 1][lane]] > g.key[i - 1][lane])


cdef inline void _packed_tops(const PackedGroup *g, const int32_t *keys, uint32_t lane, uint32_t entry,
                              uint32_t *entries) noexcept nogil:
    """Entries of the eight trees from `lane` on; entry: the first of the group's."""
    cdef uint32_t a = 1, b = 1, c = 1, d = 1, e = 1, f = 1, h = 1, i = 1
    cdef uint32_t _level
    for _level in range(4):
        a = _packed_top(g, keys, lane, a)
        b = _packed_top(g, keys, lane + 1, b)
        c = _packed_top(g, keys, lane + 2, c)
        d = _packed_top(g, keys, lane + 3, d)
        e = _packed_top(g, keys, lane + 4, e)
        f = _packed_top(g, keys, lane + 5, f)
        h = _packed_top(g, keys, lane + 6, h)
        i = _packed_top(g, keys, lane + 7, i)
    entry += 16 * lane - 16          # nodes of the fifth level count from 16
    entries[0] = entry + a
    entries[1] = entry + 16 + b
    entries[2] = entry + 32 + c
    entries[3] = entry + 48 + d
    entries[4] = entry + 64 + e
    entries[5] = entry + 80 + f
    entries[6] = entry + 96 + h
    entries[7] = entry + 112 + i


cdef inline uint32_t _packed_step(const PackedNode *node, const int32_t *keys, uint32_t i) noexcept nogil:
    return (node[i].link >> 8) + <uint32_t>(keys[node[i].link & 255] > node[i].word.key)


cdef inline double _packed_eight(const PackedNode *node, const int32_t *keys, const uint32_t *entries,
                                 uint32_t depth) noexcept nogil:
    """Sum of the leaves that eight trees lead to, `depth` steps below their entries."""
    cdef uint32_t a = entries[0], b = entries[1], c = entries[2], d = entries[3]
    cdef uint32_t e = entries[4], f = entries[5], g = entries[6], h = entries[7]
    cdef uint32_t _step
    for _step in range(depth):
        a = _packed_step(node, keys, a)
        b = _packed_step(node, keys, b)
        c = _packed_step(node, keys, c)
        d = _packed_step(node, keys, d)
        e = _packed_step(node, keys, e)
        f = _packed_step(node, keys, f)
        g = _packed_step(node, keys, g)
        h = _packed_step(node, keys, h)
    return (((<double>node[a].word.leaf + <double>node[b].word.leaf)
             + (<double>node[c].word.leaf + <double>node[d].word.leaf))
            + ((<double>node[e].word.leaf + <double>node[f].word.leaf)
               + (<double>node[g].word.leaf + <double>node[h].word.leaf)))


cdef inline float packed_score(const PackedModel *m, const float *row, float first) noexcept nogil:
    """base + scale * (sum of the trees' leaves) for a row of m.features floats, NaN being a missing value.

    first stands for row[0] unless it is NaN. The caller has ensured that packed_open filled m."""
    cdef int32_t keys[256]
    cdef uint32_t entries[PACKED_CHUNK * PACKED_LANES]
    cdef uint32_t at = 0, n, i, stop
    cdef double total = 0.0
    keys[PACKED_LEAF] = INT32_MIN
    if not m.wide:
        packed_keys(row, m.features, first, keys)
    while at < m.groups:
        n = m.groups - at
        if n > PACKED_CHUNK:
            n = PACKED_CHUNK
        stop = m.eights - 2 * at
        if stop > 2 * n:
            stop = 2 * n
        if m.wide:
            or_packed_wide(&m.group[at], n, 256 * at, row, m.features, first, keys, entries)
        else:
            for i in range(stop):
                _packed_tops(&m.group[at + (i >> 1)], keys, 8 * (i & 1), 256 * (at + (i >> 1)), &entries[8 * i])
        for i in range(stop):
            total += _packed_eight(m.node, keys, &entries[8 * i], m.group[at + (i >> 1)].depth[i & 1])
        at += n
    return <float>(m.base + m.scale * total)


# ---------------------------------------------------------------- loading

cdef inline const char *_packed_check(const PackedFile *h, const PackedGroup *group, const PackedNode *node,
                                      uint8_t *height) noexcept nogil:
    """What is wrong with the groups and nodes of a block, NULL where nothing is. height: h.nodes bytes."""
    cdef uint32_t i, j, lane, left, slot, deep
    for i in range(h.groups):
        for j in range(15):
            for lane in range(<uint32_t>PACKED_LANES):
                if (group[i].slot[j][lane] & 127) >= h.features:
                    return b"a split on a feature that is not there"
        if group[i].depth[0] > PACKED_DEPTH_MAX or group[i].depth[1] > PACKED_DEPTH_MAX:
            return b"deeper than allowed"
    # children stand behind their parent: no walk can go round in circles, and heights are known from the end on
    i = h.nodes
    while i > 0:
        i -= 1
        left = node[i].link >> 8
        slot = node[i].link & 255
        if slot == PACKED_LEAF:
            # written so that a NaN fails
            if left != i or not (-1e30 < node[i].word.leaf < 1e30):
                return b"a leaf that is not one"
            height[i] = 0
            continue
        if (slot & 127) >= h.features:
            return b"a split on a feature that is not there"
        if left <= i or left >= h.nodes - 1:
            return b"a link that leads astray"
        deep = height[left] if height[left] > height[left + 1] else height[left + 1]
        if deep >= PACKED_DEPTH_MAX:
            return b"deeper than allowed"
        height[i] = <uint8_t>(deep + 1)
    for i in range(256 * h.groups):
        if height[i] > group[i >> 8].depth[(i >> 7) & 1]:
            return b"deeper than it says"
    return NULL


cdef inline const char *packed_open(const char *block, uint64_t n, PackedModel *out) noexcept nogil:
    """Check a block of n bytes (aligned to 8, unchanged as long as out is used) and make it ready for scoring.

    NULL and a filled out, or what is wrong with it; slow, and takes memory for the time of the call."""
    cdef const PackedFile *h = <const PackedFile *>block
    cdef const PackedGroup *group
    cdef const PackedNode *node
    cdef const char *wrong
    cdef uint8_t *height
    if sizeof(PackedFile) != 64 or sizeof(PackedGroup) != 1280 or sizeof(PackedNode) != 8:
        return b"this build lays packed trees out in another way"
    if n < sizeof(PackedFile) or memcmp(h.magic, or_packed_magic, 8) != 0:
        return b"not packed trees"
    if h.version != PACKED_VERSION:
        return b"another version of packed trees"
    if h.features == 0 or h.features > PACKED_FEATURES_MAX:
        return b"too many features or none"
    if h.groups == 0 or h.groups > PACKED_GROUPS_MAX or h.nodes > PACKED_NODES_MAX or h.nodes < 256 * h.groups:
        return b"too many trees or nodes, or none"
    if h.trees > 16 * h.groups or h.trees <= 16 * (h.groups - 1):
        return b"another number of trees than there are groups for"
    if h.bytes != n or n != sizeof(PackedFile) + h.groups * sizeof(PackedGroup) + h.nodes * sizeof(PackedNode):
        return b"longer or shorter than it says"
    if not (-1e30 < h.base < 1e30) or not (0.0 < h.scale <= 1.0):
        return b"its base or scale is no usable number"
    group = <const PackedGroup *>(block + sizeof(PackedFile))
    node = <const PackedNode *>(block + sizeof(PackedFile) + h.groups * sizeof(PackedGroup))
    height = <uint8_t *>calloc(h.nodes, 1)
    if height == NULL:
        return b"no memory to check it"
    wrong = _packed_check(h, group, node, height)
    free(height)
    if wrong != NULL:
        return wrong
    out.group = group
    out.node = node
    out.groups = h.groups
    out.features = h.features
    out.eights = (h.trees + 7) // 8
    out.wide = 1 if h.features <= PACKED_WIDE_FEATURES and or_packed_wide_here() else 0
    out.base = h.base
    out.scale = h.scale
    return NULL
