"""A decision in the words that proxies pass on: names, numbers as text, and which headers are ours."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from native.base cimport Slice, lower

cdef extern from *:
    """
    static inline const char *or_action_name(unsigned a) {
        static const char *const names[5] = {"allow", "tag", "throttle", "challenge", "block"};
        return a < 5 ? names[a] : "allow"; }
    static inline const char *or_details(unsigned a) {
        static const char *const names[5] = {"outrider_allow", "outrider_tag", "outrider_throttle",
                                             "outrider_challenge", "outrider_block"};
        return a < 5 ? names[a] : "outrider_block"; }
    """
    const char *or_action_name(unsigned action) noexcept nogil
    const char *or_details(unsigned action) noexcept nogil


cdef inline bint is_ours(Slice name) noexcept nogil:
    """x-outrider-*, in any case; '_' counts as '-', since CGI-like upstreams see no difference."""
    cdef const char *prefix = "x-outrider-"
    cdef uint32_t i
    cdef uint8_t c
    if name.n < 11:
        return False
    for i in range(11):
        c = lower(<uint8_t>name.p[i])
        if c == 95:
            c = 45
        if c != <uint8_t>prefix[i]:
            return False
    return True


cdef inline double bounded(double score) noexcept nogil:
    """0..1; a NaN is 0."""
    return (score if score < 1.0 else 1.0) if score > 0.0 else 0.0


cdef inline void hex64(uint64_t v, char *out) noexcept nogil:
    cdef const char *digits = "0123456789abcdef"
    cdef int i
    for i in range(16):
        out[i] = digits[(v >> (60 - 4 * i)) & 15]


cdef inline void score_text(double score, char *out) noexcept nogil:
    """0.0000 to 1.0000, six bytes."""
    cdef uint32_t parts = <uint32_t>(bounded(score) * 10000.0 + 0.5), i
    for i in range(4):
        out[5 - i] = <char>(48 + parts % 10)
        parts //= 10
    out[0] = <char>(48 + parts)
    out[1] = 46


cdef inline uint32_t number_text(uint32_t n, char *out) noexcept nogil:
    """Decimal digits into out[10]; how many."""
    cdef char text[10]
    cdef uint32_t k = 10, i
    while True:
        k -= 1
        text[k] = <char>(48 + n % 10)
        n //= 10
        if n == 0:
            break
    for i in range(10 - k):
        out[i] = text[k + i]
    return 10 - k


cdef inline bint printable(Slice s) noexcept nogil:
    cdef uint32_t i
    for i in range(s.n):
        if not 32 <= <uint8_t>s.p[i] < 127:
            return False
    return True


cdef inline uint32_t escape_place(const char *p, uint32_t n, char *out) noexcept nogil:
    """Printable ASCII stays, every other byte and the backslash become \\xNN; out holds 4 * n."""
    cdef const char *digits = "0123456789abcdef"
    cdef uint32_t i, k = 0
    cdef uint8_t c
    for i in range(n):
        c = <uint8_t>p[i]
        if 32 <= c < 127 and c != 92:
            out[k] = <char>c
            k += 1
        else:
            out[k] = 92
            out[k + 1] = 120
            out[k + 2] = digits[c >> 4]
            out[k + 3] = digits[c & 15]
            k += 4
    return k
