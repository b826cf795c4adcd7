"""Take a request apart into its values and score each: path, query, body by its type, headers."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from native.base cimport Header, Request, Slice, mix64, or_read64
from native.decode cimport base64_text
from native.leaves cimport (json_like, late, leaf, or_value_class, place_index, place_member, place_text, pool_room,
                            score_name, score_value, text_name_hash, walk_graphql, walk_json, walk_pairs, within)
from native.markup cimport find, parameter, same_nocase, walk_multipart, walk_xml, xml_name
from native.textdefs cimport *

cdef extern from *:
    """
    #ifndef OR_HEADER_TABLES
    #define OR_HEADER_TABLES
    #include <stdint.h>
    #include <string.h>
    enum { OR_H_FREE, OR_H_FIXED, OR_H_COOKIE, OR_H_REFERER, OR_H_AGENT };
    static const struct { const char *name; uint8_t n; uint8_t shape; } or_shapes[] = {
        {"host", 4, OR_H_FIXED}, {"te", 2, OR_H_FIXED}, {"dnt", 3, OR_H_FIXED}, {"date", 4, OR_H_FIXED},
        {"via", 3, OR_H_FIXED}, {"accept", 6, OR_H_FIXED}, {"origin", 6, OR_H_FIXED},
        {"pragma", 6, OR_H_FIXED}, {"expect", 6, OR_H_FIXED}, {"cookie", 6, OR_H_COOKIE},
        {"referer", 7, OR_H_REFERER}, {"trailer", 7, OR_H_FIXED}, {"upgrade", 7, OR_H_FIXED},
        {"if-range", 8, OR_H_FIXED}, {"if-match", 8, OR_H_FIXED}, {"priority", 8, OR_H_FIXED},
        {"sec-ch-ua", 9, OR_H_FIXED},
        {"connection", 10, OR_H_FIXED}, {"keep-alive", 10, OR_H_FIXED}, {"user-agent", 10, OR_H_AGENT},
        {"traceparent", 11, OR_H_FIXED}, {"content-type", 12, OR_H_FIXED}, {"x-request-id", 12, OR_H_FIXED},
        {"authorization", 13, OR_H_FIXED}, {"cache-control", 13, OR_H_FIXED},
        {"if-none-match", 13, OR_H_FIXED}, {"accept-charset", 14, OR_H_FIXED},
        {"sec-fetch-site", 14, OR_H_FIXED}, {"sec-fetch-mode", 14, OR_H_FIXED},
        {"sec-fetch-dest", 14, OR_H_FIXED}, {"sec-fetch-user", 14, OR_H_FIXED},
        {"content-length", 14, OR_H_FIXED},
        {"accept-encoding", 15, OR_H_FIXED}, {"accept-language", 15, OR_H_FIXED},
        {"content-encoding", 16, OR_H_FIXED},
        {"x-requested-with", 16, OR_H_FIXED}, {"sec-ch-ua-mobile", 16, OR_H_FIXED},
        {"x-forwarded-proto", 17, OR_H_FIXED}, {"transfer-encoding", 17, OR_H_FIXED},
        {"if-modified-since", 17, OR_H_FIXED}, {"sec-ch-ua-platform", 18, OR_H_FIXED},
        {"proxy-authorization", 19, OR_H_FIXED}, {"if-unmodified-since", 19, OR_H_FIXED},
        {"upgrade-insecure-requests", 25, OR_H_FIXED}};
    static const uint8_t or_address_byte[256] = {
        ['0' ... '9'] = 1, ['a' ... 'f'] = 1, ['A' ... 'F'] = 1, ['.'] = 1, [':'] = 1, [','] = 1, [' '] = 1, ['['] = 1,
        [']'] = 1};
    static inline int or_header_shape(const char *p, uint32_t n) {
        uint32_t i;
        for (i = 0; i < sizeof or_shapes / sizeof *or_shapes; i++)
            if (or_shapes[i].n == n && or_shapes[i].name[0] == p[0] && memcmp(or_shapes[i].name, p, n) == 0)
                return or_shapes[i].shape;
        return OR_H_FREE;
    }
    #endif
    """
    const uint8_t or_address_byte[256]
    int OR_H_FREE, OR_H_FIXED, OR_H_COOKIE, OR_H_REFERER, OR_H_AGENT
    int or_header_shape(const char *p, uint32_t n) noexcept nogil


# ---------------------------------------------------------------- path

cdef inline void walk_path(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """The whole path, then every segment with something odd in it."""
    cdef uint32_t i = 0, j, index = 0, k
    cdef bint odd
    s.place_n = 0
    place_text(s, <const uint8_t *>"path", 4)
    score_value(s, p, n, KIND_PATH, False)
    while i < n and not late(s):
        j = i
        odd = False
        while j < n and p[j] != c'/':
            if not or_value_class[p[j]] & 1:
                odd = True
            j += 1
        # a single segment is the path; it is read again only where it hides something in base64
        if (odd and j - i + 1 < n) or (j - i >= 12 and coded_text(s, p + i, j - i)):
            k = place_index(s, index)
            score_value(s, p + i, j - i, KIND_QUERY, False)
            s.place_n = k
        if j > i:
            index += 1
        i = j + 1


# ---------------------------------------------------------------- body

cdef inline bint contains_nocase(Slice t, const char *lit, uint32_t k) noexcept nogil:
    cdef uint32_t i = 0
    while i + k <= t.n:
        if same_nocase(<const uint8_t *>t.p + i, lit, k):
            return True
        i += 1
    return False


cdef inline bint pair_like(const uint8_t *p, uint32_t n) noexcept nogil:
    """name=value with a plain name: a form, whatever its type says."""
    cdef uint32_t i = 0
    while i < n and i < 64 and or_value_class[p[i]] & 1:
        i += 1
    return 0 < i < n and p[i] == c'='


cdef inline uint32_t wide_text(const uint8_t *p, uint32_t n, uint8_t *dst) noexcept nogil:
    """UTF-16 or UTF-32, told by its mark or by the NULs beside its first letters, as UTF-8 in dst (n + n/2
    bytes); 0 where it is neither. What ends in half a letter loses that half."""
    cdef uint32_t i, k = 0, step, low, c
    if n < 8:
        return 0
    if p[0] and not (p[1] or p[2] or p[3] or p[5]):
        step, low = 4, 0
    elif not (p[0] or p[1] or p[2]) and p[3]:
        step, low = 4, 3
    elif (p[0] == 0xff and p[1] == 0xfe and p[2] == 0 and p[3] == 0):
        step, low = 4, 0
    elif (p[0] == 0xff and p[1] == 0xfe) or (p[0] and not p[1] and p[2] and not p[3]):
        step, low = 2, 0
    elif (p[0] == 0xfe and p[1] == 0xff) or (not p[0] and p[1] and not p[2] and p[3]):
        step, low = 2, 1
    else:
        return 0
    i = 0
    while i + step <= n:
        if step == 2:
            c = p[i] | <uint32_t>p[i + 1] << 8 if low == 0 else <uint32_t>p[i] << 8 | p[i + 1]
        elif low == 0:
            c = p[i] | <uint32_t>p[i + 1] << 8 | <uint32_t>p[i + 2] << 16
        else:
            c = <uint32_t>p[i + 1] << 16 | <uint32_t>p[i + 2] << 8 | p[i + 3]
        i += step
        if c == 0xfeff:
            continue
        if c < 0x80:
            dst[k] = <uint8_t>c
            k += 1
        elif c < 0x800:
            dst[k] = <uint8_t>(0xc0 | c >> 6)
            dst[k + 1] = <uint8_t>(0x80 | (c & 63))
            k += 2
        else:
            # half a surrogate pair too, and what lies beyond 16 bits: letters that no payload is made of
            dst[k] = <uint8_t>(0xe0 | (c >> 12 & 15))
            dst[k + 1] = <uint8_t>(0x80 | (c >> 6 & 63))
            dst[k + 2] = <uint8_t>(0x80 | (c & 63))
            k += 3
    return k


cdef inline bint has_boundary(const uint8_t *p, uint32_t n, Slice mark) noexcept nogil:
    """Does the body have a part after this boundary, at the begin of a line?"""
    cdef uint32_t i = 0
    cdef const uint8_t *found
    if mark.n == 0:
        return False
    while i + mark.n + 2 <= n:
        if p[i] == c'-' and p[i + 1] == c'-' and memcmp(p + i + 2, mark.p, mark.n) == 0:
            return True
        found = <const uint8_t *>memchr(p + i, c'\n', n - i)
        if found == NULL:
            return False
        i = <uint32_t>(found - p) + 1
    return False


cdef inline void walk_body(TextScratch *s, const uint8_t *p, uint32_t n, Slice type) noexcept nogil:
    """Take a body apart by its content type, or by its look where that says nothing."""
    cdef uint32_t i = 0, k = 0
    cdef Slice mark
    cdef bint form
    if n > s.policy.body_bytes_max:
        n = s.policy.body_bytes_max
        s.cut = 1
    # what cannot even be gone through in the time left need not be begun: telling what the body is may take a pass
    k = within(s, n, 2, 1024)
    if k < n:
        s.part = 1
        n = k & ~<uint32_t>3                      # whole letters of UTF-16 and UTF-32, whole groups of base64
    s.place_n = 0
    if s.nest == 0 and n + n // 2 <= pool_room(s):
        k = wide_text(p, n, s.pool + s.pool_n)
        if k:
            s.nest += 1
            i = s.pool_n
            s.pool_n += k
            walk_body(s, s.pool + i, k, type)
            s.pool_n = i
            s.nest -= 1
            return
    if type.n > 19 and same_nocase(<const uint8_t *>type.p, "multipart/", 10):
        mark = parameter(<const uint8_t *>type.p, type.n, "boundary=", 9)
        # one that never occurs hides the parts from whoever believes it: then the body speaks for itself
        if has_boundary(p, n, mark) or not (n > 2 and p[0] == c'-' and p[1] == c'-'):
            place_text(s, <const uint8_t *>"form", 4)
            walk_multipart(s, p, n, mark)
            return
    while i < n and (or_value_class[p[i]] & 8 or p[i] == 0xef or p[i] == 0xbb or p[i] == 0xbf):
        i += 1
    p += i
    n -= i
    if n == 0:
        return
    form = contains_nocase(type, "x-www-form-urlencoded", 21)
    if n > 40 and p[0] == c'-' and p[1] == c'-' and find(p, n if n < 400 else 400, 0, "ontent-", 7) < 300:
        # multipart whose type got lost: the first line is the boundary
        mark.p = <const char *>p + 2
        mark.n = find(p, n, 2, "\n", 1) - 2
        if mark.n and mark.p[mark.n - 1] == c'\r':
            mark.n -= 1
        place_text(s, <const uint8_t *>"form", 4)
        walk_multipart(s, p, n, mark)
        return
    if p[0] == c'<' and not form and n > 3 and (xml_name(p[1]) or p[1] == c'?' or p[1] == c'!'):
        place_text(s, <const uint8_t *>"xml", 3)
        walk_xml(s, p, n)
        return
    if s.nest == 0 and 40 < n <= pool_room(s) and base64_text(p, n, s.pool + s.pool_n, &k):
        # the whole body in base64: what it holds is the body
        s.nest += 1
        i = s.pool_n
        s.pool_n += k
        type.n = 0
        walk_body(s, s.pool + i, k, type)
        s.pool_n = i
        s.nest -= 1
        return
    if json_like(p, n) or (contains_nocase(type, "json", 4)
                           and (p[0] == c'"' or p[0] == c'{' or p[0] == c'[')):
        place_text(s, <const uint8_t *>"json", 4)
        walk_json(s, p, n)
        return
    if contains_nocase(type, "graphql", 7):
        place_text(s, <const uint8_t *>"body", 4)
        walk_graphql(s, p, n)
        return
    if form or pair_like(p, n):
        place_text(s, <const uint8_t *>"form", 4)
        walk_pairs(s, p, n, KIND_FORM, True)
        return
    place_text(s, <const uint8_t *>"body", 4)
    score_value(s, p, n, KIND_BODY, False)


# ---------------------------------------------------------------- headers

cdef inline void walk_cookie(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Values of a Cookie header; plain identifiers are skipped (session ids)."""
    cdef uint32_t i = 0, j, e, k
    cdef const uint8_t *found
    s.place_n = 0
    place_text(s, <const uint8_t *>"cookie", 6)
    while i < n and not late(s):
        while i < n and (p[i] == c' ' or p[i] == c';'):
            i += 1
        found = <const uint8_t *>memchr(p + i, c';', n - i) if i < n else NULL
        j = <uint32_t>(found - p) if found != NULL else n
        if j > i:
            found = <const uint8_t *>memchr(p + i, c'=', j - i)
            if found == NULL:
                if not plain_word(s, p + i, j - i):
                    score_value(s, p + i, j - i, KIND_COOKIE, False)
            else:
                e = <uint32_t>(found - p)
                k = place_member(s, p + i, e - i)
                score_name(s, p + i, e - i, False)
                if not plain_word(s, p + e + 1, j - e - 1):
                    leaf(s, p + e + 1, j - e - 1, KIND_COOKIE, False)
                s.place_n = k
        i = j + 1


cdef inline bint coded_text(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Text in base64; its padding may be percent-encoded."""
    cdef uint32_t k
    while n > 3 and p[n - 3] == c'%' and p[n - 2] == c'3' and (p[n - 1] | 32) == c'd':
        n -= 3
    return n <= CHUNK_BYTES and base64_text(p, n, s.buf_b, &k)


cdef inline bint plain_word(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Nothing but letters, digits and -_.~ without two dots in a row, and no text in base64."""
    cdef uint32_t i, k
    for i in range(n):
        if not or_value_class[p[i]] & 1 or (p[i] == c'.' and i and p[i - 1] == c'.'):
            return False
    return not (12 <= n <= CHUNK_BYTES and base64_text(p, n, s.buf_b, &k))


cdef inline bint is_addresses(const uint8_t *p, uint32_t n) noexcept nogil:
    """Only what lists of IP addresses are made of: hexadecimal digits and .:,[] with blanks. No payload fits in there,
    and proxies write them into every request."""
    cdef uint32_t i
    cdef uint8_t odd = 1
    for i in range(n):
        odd &= or_address_byte[p[i]]
    return odd != 0


cdef inline void walk_referer(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """A URL: its path and the pairs behind '?'; anything else is a value."""
    cdef uint32_t i = 0, q
    cdef const uint8_t *found
    if n > 7 and same_nocase(p, "http://", 7):
        i = 7
    elif n > 8 and same_nocase(p, "https://", 8):
        i = 8
    else:
        score_value(s, p, n, KIND_HEADER, False)
        return
    found = <const uint8_t *>memchr(p + i, c'?', n - i)
    q = <uint32_t>(found - p) if found != NULL else n
    found = <const uint8_t *>memchr(p + i, c'/', q - i)
    i = <uint32_t>(found - p) if found != NULL else q
    if q > i + 1:
        score_value(s, p + i, q - i, KIND_PATH, False)
    if q + 1 < n:
        walk_pairs(s, p + q + 1, n - q - 1, KIND_QUERY, False)


cdef inline void header_value(TextScratch *s, const uint8_t *p, uint32_t n, int shape) noexcept nogil:
    if shape == OR_H_REFERER:
        walk_referer(s, p, n)
    elif shape == OR_H_AGENT:
        score_value(s, p, n, KIND_AGENT, False)
    else:
        leaf(s, p, n, KIND_HEADER, False)


cdef inline void remembered(TextScratch *s, uint64_t name, const uint8_t *p, uint32_t n,
                            int shape) noexcept nogil:
    """As header_value, for a value that may be the same as one seen before: then its worst window
    is taken from memory. Exact, since name and value are compared in full."""
    cdef uint64_t h = name
    cdef uint32_t i = 0, values, windows
    cdef TextMemo *m
    cdef TextWorst kept
    if n > MEMO_BYTES or n < 8 or s.collect:
        header_value(s, p, n, shape)
        return
    while i + 8 <= n:
        h = (h ^ or_read64(p + i)) * <uint64_t>0x9E3779B97F4A7C15u
        h ^= h >> 32
        i += 8
    h = mix64(h ^ or_read64(p + n - 8) ^ n)
    m = &s.memo[h & (MEMO_ENTRIES - 1)]
    if m.value_n == n and m.key == h and memcmp(m.value, p, n) == 0:
        s.n_values += m.n_values
        s.n_windows += m.n_windows
        if m.worst.linear > s.worst.linear:
            s.worst = m.worst
            s.worst.raw = p + m.raw_at
        return
    values = s.n_values
    windows = s.n_windows
    kept = s.worst
    s.worst.linear = -1e30
    s.worst.text_n = 0
    s.worst.place_n = 0
    s.in_header = 1
    header_value(s, p, n, shape)
    s.in_header = 0
    if not p <= s.worst.raw < p + n:
        # out of a document in the header: then the header as a whole
        s.worst.raw = p
        s.worst.raw_bytes = n
    if not s.cut and not s.overrun:
        m.raw_at = <uint32_t>(s.worst.raw - p)
        m.key = h
        m.value_n = n
        m.n_values = s.n_values - values
        m.n_windows = s.n_windows - windows
        m.worst = s.worst
        memcpy(m.value, p, n)
    if not s.worst.linear > kept.linear:
        s.worst = kept


cdef inline bint chosen(const TextPolicy *p, uint64_t h) noexcept nogil:
    cdef uint32_t i
    if p.every_header:
        return True
    for i in range(p.n_headers):
        if p.header_hash[i] == h:
            return True
    return False


cdef inline bint fixed_shape(const uint8_t *p, uint32_t n) noexcept nogil:
    """Only what dates, media types, languages, tokens and hosts are made of; no '..'."""
    cdef uint32_t i
    cdef uint8_t odd = 2
    for i in range(n):
        odd &= or_value_class[p[i]]
    if not odd:
        return False
    for i in range(1, n):
        if p[i] == c'.' and p[i - 1] == c'.':
            return False
    return True


cdef inline void walk_header(TextScratch *s, const Header *h) noexcept nogil:
    cdef int shape
    cdef uint64_t name
    cdef const uint8_t *p = <const uint8_t *>h.value.p
    if h.value.n == 0 or h.name.n == 0:
        return
    shape = or_header_shape(h.name.p, h.name.n)
    if shape == OR_H_FIXED and fixed_shape(p, h.value.n):
        return
    name = text_name_hash(h.name.p, h.name.n)
    if shape != OR_H_FIXED and not chosen(s.policy, name):
        return
    if shape == OR_H_COOKIE:
        walk_cookie(s, p, h.value.n)
        return
    if shape == OR_H_FREE and (plain_word(s, p, h.value.n) or is_addresses(p, h.value.n)):
        return
    s.place_n = 0
    place_text(s, <const uint8_t *>"header", 6)
    place_member(s, <const uint8_t *>h.name.p, h.name.n)
    remembered(s, name, p, h.value.n, shape)


# ---------------------------------------------------------------- the request

cdef inline void walk_request(TextScratch *s, const Request *r) noexcept nogil:
    """Path, query, body, headers, in this order: what matters most comes before a deadline."""
    cdef uint32_t i
    cdef Slice type
    type.p = NULL
    type.n = 0
    if r.path.n:
        walk_path(s, <const uint8_t *>r.path.p, r.path.n)
    if r.query.n:
        s.place_n = 0
        place_text(s, <const uint8_t *>"query", 5)
        walk_pairs(s, <const uint8_t *>r.query.p, r.query.n, KIND_QUERY, False)
    if r.body.n:
        for i in range(r.n_headers):
            if r.headers[i].name.n == 12 and memcmp(r.headers[i].name.p, "content-type", 12) == 0:
                type = r.headers[i].value
                break
        walk_body(s, <const uint8_t *>r.body.p, r.body.n, type)
    for i in range(r.n_headers):
        if late(s):
            return
        walk_header(s, &r.headers[i])
