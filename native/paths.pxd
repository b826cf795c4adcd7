"""The path as the service will understand it, for matching routes and telling paths apart.

Proxies differ in what they hand over: one has resolved dots and merged slashes, the other gives the target as the
client wrote it. A route that is matched on one spelling and served under another is a way past its rules, so every
host's path goes through here. The text side reads the path as sent: how it was spelt is evidence.
"""
from libc.stdint cimport uint8_t, uint32_t

from native.base cimport Slice

cdef extern from *:
    """
    #ifndef OR_PATH_TABLES
    #define OR_PATH_TABLES
    #include <stdint.h>
    /* value of a hexadecimal digit, else -1 */
    static inline int or_path_digit(uint8_t c) {
        return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1; }
    /* RFC 3986's unreserved characters, and the two that part segments: encoded or not, they mean the same */
    static inline int or_path_plain(uint8_t c) {
        return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '-' || c == '.' || c == '_'
               || c == '~' || c == '/' || c == 92; }
    #endif
    """
    int or_path_digit(uint8_t c) noexcept nogil
    bint or_path_plain(uint8_t c) noexcept nogil


cdef inline bint is_normal(Slice path) noexcept nogil:
    """Nothing to do for most: begins with a slash, no escapes, no backslash, no "//", no segment beginning with a
    dot, no fragment."""
    cdef uint32_t i
    cdef char c
    cdef char before = 0
    if path.n == 0 or path.p[0] != c'/':
        return False
    for i in range(path.n):
        c = path.p[i]
        if c == c'%' or c == c'\\' or c == c'#' or (before == c'/' and (c == c'/' or c == c'.')):
            return False
        before = c
    return True


cdef inline uint32_t end_segment(char *out, uint32_t start, uint32_t n, uint32_t segment_n) noexcept nogil:
    """Drop "." and what ".." takes back. out[start:n] is the segment, segment_n its length uncut; returns where
    writing goes on: behind a slash, or at n."""
    if segment_n == 1 and n - start == 1 and out[start] == c'.':
        return start
    if segment_n == 2 and n - start == 2 and out[start] == c'.' and out[start + 1] == c'.':
        n = start - 1 if start > 1 else 1
        while n > 1 and out[n - 1] != c'/':
            n -= 1
        return n
    return n


cdef inline Slice normal_path(Slice path, char *out, uint32_t room) noexcept nogil:
    """The path itself where it is normal, else its normal form in out (room >= 2 bytes; cut at that): scheme and
    authority of an absolute target dropped, unreserved characters and slashes unescaped once, backslashes as
    slashes, slashes merged, dots resolved (RFC 3986, 5.2.4 and 6.2.2)."""
    cdef uint32_t i = 0, n = 1, start = 1, segment_n = 0, width
    cdef int high, low
    cdef uint8_t c
    cdef Slice s
    if is_normal(path):
        return path
    out[0] = c'/'
    if path.n and path.p[0] != c'/' and path.p[0] != c'\\':
        while i + 2 < path.n and path.p[i] != c'/' and not (path.p[i] == c':' and path.p[i + 1] == c'/'
                                                            and path.p[i + 2] == c'/'):
            i += 1
        if i + 2 < path.n and path.p[i] == c':':
            i += 3
            while i < path.n and path.p[i] != c'/':
                i += 1
        else:
            i = 0
    while i < path.n and path.p[i] != c'#':       # many end a path there; a fragment is none of a target's
        c = <uint8_t>path.p[i]
        width = 1
        if c == c'%' and i + 2 < path.n:
            high = or_path_digit(<uint8_t>path.p[i + 1])
            low = or_path_digit(<uint8_t>path.p[i + 2])
            if high >= 0 and low >= 0 and or_path_plain(<uint8_t>(high << 4 | low)):
                c = <uint8_t>(high << 4 | low)
                width = 3
        i += width
        if c == c'/' or c == c'\\':
            n = end_segment(out, start, n, segment_n)
            if out[n - 1] != c'/' and n < room:
                out[n] = c'/'
                n += 1
            start = n
            segment_n = 0
            continue
        segment_n += 1
        if n < room:
            out[n] = <char>c
            n += 1
    n = end_segment(out, start, n, segment_n)
    s.p = out
    s.n = n
    return s
