"""The text part's door: score every value of a request, describe the worst.

    text_score       what the pipeline calls
    text_model_from_bytes    a weights file ("linear.bin") in memory becomes a TextModel
    text_policy_default, text_name_hash    how a TextPolicy is filled

The way of a value: taken apart (values) -> decoded and folded (decode) -> windows hashed and
scored (ngram) -> the worst window described (lexical).
"""
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from native.base cimport EXCERPT_MAX, PLACE_MAX, Request
from native.lexical cimport lexical_features
from native.textdefs cimport *
from native.values cimport text_name_hash, walk_request

cdef extern from *:
    """
    #include <math.h>
    static inline float or_text_nan(void) { return NAN; }
    static const char or_linear_magic[8] = {'O', 'R', 'L', 'I', 'N', 'E', 'A', 'R'};
    """
    float or_text_nan() noexcept nogil
    const char or_linear_magic[8]

cdef enum:
    LINEAR_VERSION = 1


cdef inline void text_policy_default(TextPolicy *p) noexcept nogil:
    """What a service without settings gets: 64 KiB of body, 3 rounds, every header without a fixed shape."""
    cdef uint32_t i
    p.body_bytes_max = 65536
    p.decode_rounds = 3
    p.values_max = 256
    p.windows_max = 512
    p.n_headers = 0
    p.every_header = 1
    for i in range(TEXT_HEADERS_MAX):
        p.header_hash[i] = 0


cdef inline int text_model_from_bytes(const char *p, uint64_t n, TextModel *out) noexcept nogil:
    """Point out at the tables of a weights file, p[0..n), which must stay mapped. 0; -1 wrong size,
    -2 wrong magic, -3 unknown version, -4 weights for another feature schema, -5 scales that are no
    finite numbers.

    Layout, little endian: magic[8] "ORLINEAR", u32 version, u32 schema, f32 trigram scale, f32 token
    scale, f32 bias, u32 0, u64 content hash, 24 bytes 0, i8 trigram[65536], i8 token[16384].
    """
    cdef uint32_t version
    if n != LINEAR_FILE_BYTES:
        return -1
    if memcmp(p, or_linear_magic, 8) != 0:
        return -2
    memcpy(&version, p + 8, 4)
    if version != LINEAR_VERSION:
        return -3
    memcpy(&out.schema, p + 12, 4)
    if out.schema != TEXT_SCHEMA:
        return -4
    memcpy(&out.trigram_scale, p + 16, 4)
    memcpy(&out.token_scale, p + 20, 4)
    memcpy(&out.bias, p + 24, 4)
    if not (out.trigram_scale - out.trigram_scale == 0 and out.token_scale - out.token_scale == 0
            and out.bias - out.bias == 0):
        return -5
    memcpy(&out.id, p + 32, 8)
    out.trigram = <const int8_t *>(p + LINEAR_HEADER_BYTES)
    out.token = <const int8_t *>(p + LINEAR_HEADER_BYTES + TRIGRAMS)
    return 0


cdef inline void text_score(const Request *r, const TextModel *m, const TextPolicy *p, TextScratch *s,
                            TextResult *out, uint64_t deadline_ns) noexcept nogil:
    """Take the request apart, score its values, describe the worst window in out.

    deadline_ns: monotonic clock (or_now_ns) at which to stop with what is known (overrun = 1); 0: none.
    s belongs to the calling thread. out is written whole.
    """
    cdef uint32_t i
    cdef uint8_t c
    s.model = m
    s.policy = p
    s.deadline_ns = deadline_ns
    s.n_values = 0
    s.n_windows = 0
    s.clock = 2
    s.ticks = 16
    s.part = 0
    s.pool_n = 0
    s.cut = 0
    s.overrun = 0
    s.nest = 0
    s.has_password = 0
    s.login = 0
    s.place_n = 0
    s.worst.linear = -1e30
    s.worst.text_n = 0
    s.worst.place_n = 0
    if s.model_id != m.id:
        for i in range(MEMO_ENTRIES):
            s.memo[i].value_n = 0
        s.model_id = m.id
    walk_request(s, r)
    out.n_values = s.n_values
    out.n_windows = s.n_windows
    out.cut = s.cut
    out.overrun = s.overrun | s.part
    out.spare = 0
    out.login_key = s.login if s.has_password else 0
    out.place_n = 0
    out.excerpt_n = 0
    if s.worst.text_n == 0:
        out.linear = or_text_nan()
        out.threat = 0
        for i in range(TEXT_FEATURES):
            out.features[i] = or_text_nan()
        return
    out.linear = s.worst.linear
    lexical_features(&s.worst, out.features, &out.threat)
    out.place_n = s.worst.place_n
    memcpy(out.place, s.worst.place, s.worst.place_n)
    for i in range(s.worst.text_n):
        c = s.worst.text[i]
        if c == 2 or c == 3:
            continue                       # marks of the value's begin and end
        if out.excerpt_n < EXCERPT_MAX:
            out.excerpt[out.excerpt_n] = <char>c if c < 0x80 else c'?'
            out.excerpt_n += 1
