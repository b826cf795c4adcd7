"""What every step of the data plane stands on: slices, the request, the decision,
atomics, clocks and hashing.

Everything here is `cdef inline ... noexcept nogil` or a plain struct, so that the same
code can be linked into hosts that carry no Python interpreter.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from *:
    """
    #include <time.h>
    #include <stdint.h>
    #include <string.h>
    static inline uint64_t or_now_ns(void) {
        struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
    }
    static inline int64_t or_unix_us(void) {
        struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
        return (int64_t)t.tv_sec * 1000000ll + t.tv_nsec / 1000;
    }
    static inline uint64_t or_add64(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
    static inline uint64_t or_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void or_store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline uint32_t or_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void or_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int or_cas32(uint32_t *p, uint32_t a, uint32_t b) {
        return __atomic_compare_exchange_n(p, &a, b, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); }
    static inline int or_cas64(uint64_t *p, uint64_t a, uint64_t b) {
        return __atomic_compare_exchange_n(p, &a, b, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); }
    static inline void or_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    static inline void or_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    static inline uint64_t or_read64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
    static inline uint32_t or_read32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
    static inline int or_popcount64(uint64_t v) { return __builtin_popcountll(v); }
    """
    uint64_t or_now_ns() noexcept nogil            # monotonic clock, ns
    int64_t or_unix_us() noexcept nogil            # wall clock, us since 1970
    uint64_t or_add64(uint64_t *p, uint64_t v) noexcept nogil   # relaxed fetch-and-add
    uint64_t or_load64(const uint64_t *p) noexcept nogil        # acquire
    void or_store64(uint64_t *p, uint64_t v) noexcept nogil     # release
    uint32_t or_load32(const uint32_t *p) noexcept nogil
    void or_store32(uint32_t *p, uint32_t v) noexcept nogil
    bint or_cas32(uint32_t *p, uint32_t a, uint32_t b) noexcept nogil
    bint or_cas64(uint64_t *p, uint64_t a, uint64_t b) noexcept nogil
    void or_fence_acquire() noexcept nogil
    void or_fence_release() noexcept nogil
    uint64_t or_read64(const void *p) noexcept nogil            # unaligned
    uint32_t or_read32(const void *p) noexcept nogil
    int or_popcount64(uint64_t v) noexcept nogil


cdef enum:
    HEADERS_MAX = 128            # further headers are dropped and counted in Request.headers_dropped
    REASONS_MAX = 4
    PLACE_MAX = 96               # bytes of a value's place ("json.user.name"), cut at that
    EXCERPT_MAX = 160            # bytes of the worst window's decoded text kept with a decision


cdef struct Slice:
    const char *p                # may be NULL when n == 0; never NUL-terminated
    uint32_t n


cdef struct Header:
    Slice name                   # lower case, as HTTP/2 carries it
    Slice value


cdef enum:                       # BodyState
    BODY_NONE = 0                # there is none, or the host was told not to send it
    BODY_WHOLE = 1
    BODY_PART = 2                # the first part: over the limit, or cut short by the peer


cdef struct Request:
    Slice method
    Slice path                   # as sent, without '?' and what follows
    Slice query                  # what follows the first '?'
    Slice authority
    Slice scheme
    Header *headers              # pseudo headers (":path") are not in here
    uint32_t n_headers
    uint32_t headers_dropped
    Slice body
    uint64_t body_bytes          # bytes seen, also those beyond the limit
    uint8_t body_state
    uint8_t has_address
    uint8_t address[16]          # IPv6, or IPv4 mapped into ::ffff:0:0/96
    uint64_t client_key          # 0: made from the address; replay sets the hash of a pseudonym
    uint64_t principal_key       # 0: none; a keyed hash, never the secret itself
    int64_t time_us              # us since 1970


cdef enum:                       # Action
    ACTION_ALLOW = 0
    ACTION_TAG = 1
    ACTION_THROTTLE = 2
    ACTION_CHALLENGE = 3
    ACTION_BLOCK = 4


cdef enum:                       # Mode
    MODE_OBSERVE = 0
    MODE_ENFORCE = 1


cdef enum:                       # Stage
    # in the order in which they run; the names are in native.names
    STAGE_BLOCKLIST = 0
    STAGE_CLIENT = 1             # find or claim the entries, update their windows
    STAGE_BEHAVIOUR = 2          # window features, detectors, Isolation Forest
    STAGE_TEXT = 3               # values taken apart, decoded, linear kernel on each
    STAGE_XGBOOST = 4            # on the worst value
    STAGE_FOREST = 5             # random forest on the worst value
    STAGES = 6


cdef enum:                       # Escalated: why the judge is asked
    ESCALATED_NOT = 0
    ESCALATED_UNCERTAIN = 1      # the score lies between harmless and refused
    ESCALATED_NOVEL = 2          # a behaviour unlike all others
    ESCALATED_SAMPLED = 3


cdef struct Decision:
    uint64_t id                  # unique in the arena's life
    uint8_t action               # what the scores and the policy say
    uint8_t enforced             # what is carried out (ACTION_ALLOW or ACTION_TAG in observe mode)
    uint8_t mode
    uint8_t escalate             # Escalated
    uint8_t threat               # Threat of the worst value (native/text.pxd), 0 where none
    uint8_t n_reasons
    uint8_t body_state
    uint8_t spare
    uint16_t route               # index into the policy's routes; 0 is the service's default
    uint16_t retry_after_s
    uint32_t skipped             # bit per Stage skipped for lack of budget; the text's also where it was read in part
    uint32_t shed                # those of them that the route has shed
    uint32_t budget_us           # 0: none
    uint32_t spent_ns
    uint32_t stage_ns[6]
    float score                  # 0..1, max of the two below
    float score_text
    float score_behaviour
    float raw_linear             # raw model outputs, NaN where not run
    float raw_xgboost
    float raw_forest
    float raw_isolation
    uint16_t reason[4]           # Reason codes; names and sentences in sidecar/reasons.py
    float reason_value[4]
    uint16_t place_n
    uint16_t excerpt_n
    char place[96]
    char excerpt[160]            # decoded text of the worst window; hostile bytes
    uint64_t client_key
    uint64_t principal_key
    int64_t time_us
    uint32_t client_slot         # ticket for the response half: entry index + 1, 0 where none
    uint32_t principal_slot
    uint32_t path_hash           # ticket: hash of the path, for the response half


cdef inline bint slice_is(Slice s, const char *lit, uint32_t n) noexcept nogil:
    """Exactly these n bytes."""
    return s.n == n and memcmp(s.p, lit, n) == 0


cdef inline uint8_t lower(uint8_t c) noexcept nogil:
    return c + 32 if 65 <= c <= 90 else c


cdef inline bint slice_is_nocase(Slice s, const char *lit, uint32_t n) noexcept nogil:
    """These n bytes, ASCII letters in any case; lit is lower case."""
    cdef uint32_t i
    if s.n != n:
        return False
    for i in range(n):
        if lower(<uint8_t>s.p[i]) != <uint8_t>lit[i]:
            return False
    return True


cdef inline uint64_t rotl64(uint64_t x, int b) noexcept nogil:
    return (x << b) | (x >> (64 - b))


cdef inline uint64_t mix64(uint64_t h) noexcept nogil:
    """Finaliser of MurmurHash3 (public domain, Appleby): every bit depends on every bit."""
    h ^= h >> 33
    h *= <uint64_t>0xff51afd7ed558ccdu
    h ^= h >> 33
    h *= <uint64_t>0xc4ceb9fe1a85ec53u
    return h ^ (h >> 33)


cdef inline void sip_rounds(uint64_t *v, int n) noexcept nogil:
    cdef int _i
    for _i in range(n):
        v[0] += v[1]
        v[2] += v[3]
        v[1] = rotl64(v[1], 13) ^ v[0]
        v[3] = rotl64(v[3], 16) ^ v[2]
        v[0] = rotl64(v[0], 32)
        v[2] += v[1]
        v[0] += v[3]
        v[1] = rotl64(v[1], 17) ^ v[2]
        v[3] = rotl64(v[3], 21) ^ v[0]
        v[2] = rotl64(v[2], 32)


cdef inline uint64_t siphash24(const char *p, uint64_t n, uint64_t k0, uint64_t k1) noexcept nogil:
    """SipHash-2-4 (Aumasson, Bernstein 2012): keyed, so that a client cannot choose its bucket."""
    cdef uint64_t v[4]
    cdef uint64_t m, i = 0, tail = n & 7, whole = n - tail
    cdef int r
    v[0] = k0 ^ <uint64_t>0x736f6d6570736575u
    v[1] = k1 ^ <uint64_t>0x646f72616e646f6du
    v[2] = k0 ^ <uint64_t>0x6c7967656e657261u
    v[3] = k1 ^ <uint64_t>0x7465646279746573u
    while i <= whole:
        if i < whole:
            m = or_read64(p + i)
        else:
            m = n << 56
            for r in range(<int>tail):
                m |= <uint64_t><uint8_t>p[whole + r] << (8 * r)
        v[3] ^= m
        sip_rounds(v, 2)
        v[0] ^= m
        i += 8
    v[2] ^= 0xff
    sip_rounds(v, 4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
