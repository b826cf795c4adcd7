"""Take a request apart into its values and score each.

Walkers are tolerant: whatever the input, they read only inside their slice, keep to the limits of
the policy, and hand on what they cannot make sense of as plain text. A value's place is built in
s.place while walking and kept only when the value becomes the worst.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from native.base cimport Header, Request, Slice, mix64, or_now_ns, or_read64
from native.decode cimport (base64_text, decode_round, fold_text, hex4, needs_strip, or_b64,
                            put_codepoint, strip_text)
from native.ngram cimport window_hash, window_score
from native.textdefs cimport *

cdef extern from *:
    """
    #ifndef OR_VALUES_TABLES
    #define OR_VALUES_TABLES
    #include <stdint.h>
    #include <string.h>
    /* bit 1: letter, digit or one of -_.~  2: may stand in a header of fixed shape
       4: digit  8: JSON blank */
    static const uint8_t or_value_class[256] = {
        ['0' ... '9'] = 1 | 2 | 4, ['A' ... 'Z'] = 1 | 2, ['a' ... 'z'] = 1 | 2, ['-'] = 1 | 2, ['_'] = 1 | 2,
        ['.'] = 1 | 2, ['~'] = 1, [' '] = 2 | 8, [','] = 2, [';'] = 2, ['='] = 2, ['/'] = 2, ['*'] = 2,
        ['+'] = 2, ['"'] = 2, ['?'] = 2, [':'] = 2, ['@'] = 2, ['\\t'] = 8, ['\\n'] = 8, ['\\r'] = 8};
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
        {"authorization", 13, OR_H_FIXED}, {"cache-control", 13, OR_H_FIXED}, {"if-none-match", 13, OR_H_FIXED},
        {"accept-charset", 14, OR_H_FIXED}, {"sec-fetch-site", 14, OR_H_FIXED}, {"sec-fetch-mode", 14, OR_H_FIXED},
        {"sec-fetch-dest", 14, OR_H_FIXED}, {"sec-fetch-user", 14, OR_H_FIXED}, {"content-length", 14, OR_H_FIXED},
        {"accept-encoding", 15, OR_H_FIXED}, {"accept-language", 15, OR_H_FIXED},
        {"content-encoding", 16, OR_H_FIXED}, {"x-requested-with", 16, OR_H_FIXED}, {"sec-ch-ua-mobile", 16, OR_H_FIXED},
        {"x-forwarded-proto", 17, OR_H_FIXED}, {"transfer-encoding", 17, OR_H_FIXED},
        {"if-modified-since", 17, OR_H_FIXED}, {"sec-ch-ua-platform", 18, OR_H_FIXED},
        {"proxy-authorization", 19, OR_H_FIXED}, {"if-unmodified-since", 19, OR_H_FIXED},
        {"upgrade-insecure-requests", 25, OR_H_FIXED}};
    static inline int or_header_shape(const char *p, uint32_t n) {
        uint32_t i;
        for (i = 0; i < sizeof or_shapes / sizeof *or_shapes; i++)
            if (or_shapes[i].n == n && or_shapes[i].name[0] == p[0] && memcmp(or_shapes[i].name, p, n) == 0)
                return or_shapes[i].shape;
        return OR_H_FREE;
    }
    /* 1 the name of a user-name field of a login form, 2 of a password field, 0 neither */
    static inline int or_login_field(const uint8_t *p, uint32_t n) {
        static const struct { const char *s; uint8_t n; uint8_t k; } w[] = {
            {"user", 4, 1}, {"mail", 4, 1}, {"pass", 4, 2}, {"pwd", 3, 2}, {"email", 5, 1}, {"login", 5, 1},
            {"passwd", 6, 2}, {"userid", 6, 1}, {"account", 7, 1}, {"user_id", 7, 1}, {"username", 8, 1},
            {"password", 8, 2}, {"loginname", 9, 1}, {"user_name", 9, 1}, {"passphrase", 10, 2},
            {"identifier", 10, 1}};
        uint32_t i, j;
        if (n < 3 || n > 10) return 0;
        for (i = 0; i < sizeof w / sizeof *w; i++) {
            if (w[i].n != n) continue;
            for (j = 0; j < n && (p[j] | 32) == (uint8_t)(w[i].s[j] | 32); j++) {}
            if (j == n) return w[i].k;
        }
        return 0;
    }
    #endif
    """
    const uint8_t or_value_class[256]
    int OR_H_FREE, OR_H_FIXED, OR_H_COOKIE, OR_H_REFERER, OR_H_AGENT
    int or_header_shape(const char *p, uint32_t n) noexcept nogil
    int or_login_field(const uint8_t *p, uint32_t n) noexcept nogil

# native/text.pyx collects windows for training through this; never called in service
ctypedef void (*WindowSink)(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil


cdef inline uint64_t text_name_hash(const char *p, uint32_t n) noexcept nogil:
    """Hash of a header's name for TextPolicy.header_hash (FNV-1a, 64 bits, lower case)."""
    cdef uint64_t h = <uint64_t>14695981039346656037u
    cdef uint32_t i
    cdef uint8_t c
    for i in range(n):
        c = <uint8_t>p[i]
        if 65 <= c <= 90:
            c += 32
        h = (h ^ c) * <uint64_t>1099511628211u
    return h


# ---------------------------------------------------------------- places

cdef inline uint32_t place_text(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Append a name; returns the length before, for place_back. Bytes that are not printable
    ASCII become '?'."""
    cdef uint32_t before = s.place_n, i, k = s.place_n
    for i in range(n):
        if k >= 96:
            break
        s.place[k] = p[i] if 32 < p[i] < 127 else c'?'
        k += 1
    s.place_n = k
    return before


cdef inline uint32_t place_member(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Append '.' and a name."""
    cdef uint32_t before = s.place_n
    place_text(s, <const uint8_t *>".", 1)
    place_text(s, p, n if n < 48 else 48)
    return before


cdef inline uint32_t place_index(TextScratch *s, uint32_t index) noexcept nogil:
    """Append '[index]'."""
    cdef uint32_t before = s.place_n, k = 12, v = index
    cdef uint8_t t[12]
    k -= 1
    t[k] = c']'
    while True:
        k -= 1
        t[k] = <uint8_t>(c'0' + v % 10)
        v = v // 10
        if v == 0:
            break
    place_text(s, <const uint8_t *>"[", 1)
    place_text(s, t + k, 12 - k)
    return before


# ---------------------------------------------------------------- one value

cdef inline bint spent(TextScratch *s) noexcept nogil:
    """A limit or the deadline was hit: no more windows."""
    if s.n_windows >= s.policy.windows_max or s.n_values >= s.policy.values_max:
        s.cut = 1
        return True
    if s.overrun:
        return True
    s.clock -= 1
    if s.clock == 0:
        s.clock = 4
        if s.deadline_ns and or_now_ns() > s.deadline_ns:
            s.overrun = 1
            return True
    return False


cdef inline void score_windows(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind, uint8_t variant,
                               uint8_t rounds, uint32_t raw_n) noexcept nogil:
    """Score the windows of folded text, p[0..n), and keep the worst."""
    cdef uint32_t start = 0, k
    cdef float v
    while True:
        if spent(s):
            return
        k = n - start if n - start < WINDOW_BYTES else <uint32_t>WINDOW_BYTES
        window_hash(s, p + start, k)
        s.n_windows += 1
        v = window_score(s)
        if s.collect:
            (<WindowSink>s.sink_call)(s, p + start, k)
        if v > s.worst.linear:
            s.worst.linear = v
            s.worst.kind = kind
            s.worst.variant = variant
            s.worst.rounds = rounds
            s.worst.value_bytes = n
            s.worst.raw_bytes = raw_n
            s.worst.text_n = <uint16_t>k
            memcpy(s.worst.text, p + start, k)
            s.worst.place_n = <uint16_t>s.place_n
            memcpy(s.worst.place, s.place, s.place_n)
        if start + k >= n:
            return
        start += WINDOW_STRIDE
        # filler that repeats itself every WINDOW_STRIDE bytes gives the same window again and again
        while start + WINDOW_BYTES < n and memcmp(p + start, p + start - WINDOW_STRIDE, WINDOW_BYTES) == 0:
            start += WINDOW_STRIDE


cdef inline uint32_t decode_all(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t *dst, bint plus,
                                uint8_t *rounds) noexcept nogil:
    """Copy p to dst, decoded as often as the policy allows; returns its length."""
    cdef bint changed = False, again = False
    cdef uint32_t k
    k = decode_round(p, n, dst, plus, &changed, &again)
    rounds[0] = 1 if changed else 0
    while again and rounds[0] < s.policy.decode_rounds:
        k = decode_round(dst, k, dst, False, &changed, &again)
        if changed:
            rounds[0] += 1
    return k


cdef inline void score_piece(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind,
                             bint plus) noexcept nogil:
    """Decode, fold and score at most CHUNK_BYTES, and the variants they call for."""
    cdef uint8_t rounds = 0, more = 0
    cdef uint32_t k, m = 0
    cdef bint coded
    k = decode_all(s, p, n, s.buf_a + 1, plus, &rounds)
    coded = base64_text(s.buf_a + 1, k, s.buf_b + 1, &m)
    k = fold_text(s.buf_a + 1, k, s.buf_a + 1)
    s.buf_a[0] = 2
    s.buf_a[k + 1] = 3
    score_windows(s, s.buf_a, k + 2, kind, VARIANT_PLAIN, rounds, n)
    if coded:
        m = decode_all(s, s.buf_b + 1, m, s.buf_b + 1, False, &more)
        m = fold_text(s.buf_b + 1, m, s.buf_b + 1)
        s.buf_b[0] = 2
        s.buf_b[m + 1] = 3
        score_windows(s, s.buf_b, m + 2, kind, VARIANT_BASE64, rounds + more + 1, n)
    elif needs_strip(s.buf_a + 1, k):
        m = strip_text(s.buf_a + 1, k, s.buf_b + 1)
        if m != k:
            s.buf_b[0] = 2
            s.buf_b[m + 1] = 3
            score_windows(s, s.buf_b, m + 2, kind, VARIANT_STRIPPED, rounds, n)


cdef inline bint is_number(const uint8_t *p, uint32_t n) noexcept nogil:
    """Digits, with at most a sign in front and one point: no payload fits in there."""
    cdef uint32_t i, points = 0
    if n > 24:
        return False
    for i in range(n):
        if not or_value_class[p[i]] & 4:
            if p[i] == c'.':
                points += 1
                if points > 1:
                    return False
            elif not (p[i] == c'-' and i == 0):
                return False
    return True


cdef inline void score_value(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind,
                             bint plus) noexcept nogil:
    """Score one value, piece by piece where it is long."""
    cdef uint32_t k
    if n == 0 or is_number(p, n) or spent(s):
        return
    s.n_values += 1
    while True:
        k = n if n < CHUNK_BYTES else <uint32_t>CHUNK_BYTES
        score_piece(s, p, k, kind, plus)
        if k == n or s.overrun or s.n_windows >= s.policy.windows_max:
            if k != n:
                s.cut = 1
            return
        p += k - CHUNK_OVERLAP
        n -= k - CHUNK_OVERLAP


cdef inline bint odd_name(const uint8_t *p, uint32_t n) noexcept nogil:
    """A parameter's name with something in it that names don't carry."""
    cdef uint32_t i
    if n > 64:
        return True
    for i in range(n):
        if not or_value_class[p[i]] & 1:
            return True
    return n > 4 and p[0] == c'_' and p[1] == c'_'


cdef inline void score_name(TextScratch *s, const uint8_t *p, uint32_t n, bint plus) noexcept nogil:
    """Score a parameter's name where it is odd; the place is the name itself."""
    if n and odd_name(p, n):
        score_value(s, p, n, KIND_KEY, plus)


cdef inline void note_login(TextScratch *s, const uint8_t *k, uint32_t kn, const uint8_t *p,
                            uint32_t n) noexcept nogil:
    """Remember the user name of a login form: a member named like one, beside a password."""
    cdef int f = or_login_field(k, kn)
    if f == 2:
        s.has_password = 1
    elif f == 1 and n and s.login == 0:
        s.login = mix64(text_name_hash(<const char *>p, n if n < 256 else 256)) | 1


cdef inline uint32_t pool_room(const TextScratch *s) noexcept nogil:
    return <uint32_t>POOL_BYTES - s.pool_n


cdef inline bint json_like(const uint8_t *p, uint32_t n) noexcept nogil:
    """Begins as a JSON object or array does."""
    cdef uint32_t i = 1
    if n < 2 or (p[0] != c'{' and p[0] != c'['):
        return False
    while i < n and or_value_class[p[i]] & 8:
        i += 1
    if i >= n:
        return False
    if p[0] == c'{':
        return p[i] == c'"' or p[i] == c'}'
    return p[i] == c'"' or p[i] == c'{' or p[i] == c'[' or p[i] == c']' or p[i] == c'-' \
        or (or_value_class[p[i]] & 4) != 0


cdef inline void leaf(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind, bint plus) noexcept nogil:
    """A value that may itself be a document: JSON in a string, percent-encoded or not."""
    cdef uint32_t k, mark
    cdef bint changed, again
    if n > 2 and s.nest < NEST_MAX:
        if json_like(p, n):
            s.nest += 1
            k = <uint32_t>walk_json(s, p, n)
            s.nest -= 1
            if k:
                return
        elif p[0] == c'%' and (p[1] == c'7' or p[1] == c'5') and ((p[2] | 32) == c'b'):
            if n > pool_room(s):
                s.cut = 1
            else:
                mark = s.pool_n
                k = decode_round(p, n, s.pool + mark, plus, &changed, &again)
                s.pool_n += k
                if json_like(s.pool + mark, k):
                    s.nest += 1
                    k = <uint32_t>walk_json(s, s.pool + mark, k)
                    s.nest -= 1
                    s.pool_n = mark
                    if k:
                        return
                s.pool_n = mark
    score_value(s, p, n, kind, plus)


# ---------------------------------------------------------------- path and pairs

cdef inline void walk_path(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """The whole path, then every segment with something odd in it."""
    cdef uint32_t i = 0, j, index = 0, k
    cdef bint odd
    s.place_n = 0
    place_text(s, <const uint8_t *>"path", 4)
    score_value(s, p, n, KIND_PATH, False)
    while i < n:
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


cdef inline void walk_pairs(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind,
                            bint login) noexcept nogil:
    """name=value&name=value of a query or form; s.place holds the prefix."""
    cdef uint32_t i = 0, j, e, k
    cdef const uint8_t *found
    while i < n and not s.overrun:
        found = <const uint8_t *>memchr(p + i, c'&', n - i)
        j = <uint32_t>(found - p) if found != NULL else n
        if j > i:
            found = <const uint8_t *>memchr(p + i, c'=', j - i)
            e = <uint32_t>(found - p) if found != NULL else j
            if e == j:
                score_value(s, p + i, j - i, kind, True)
            else:
                k = place_member(s, p + i, e - i)
                score_name(s, p + i, e - i, True)
                if login:
                    note_login(s, p + i, e - i, p + e + 1, j - e - 1)
                leaf(s, p + e + 1, j - e - 1, kind, True)
                s.place_n = k
        i = j + 1


# ---------------------------------------------------------------- JSON

cdef inline uint32_t unescape_json(const uint8_t *p, uint32_t n, uint8_t *dst) noexcept nogil:
    """The text of a JSON string's inside; bad escapes are kept as they are."""
    cdef uint32_t i = 0, k = 0, v, w
    cdef uint8_t c
    while i < n:
        c = p[i]
        if c != c'\\' or i + 1 >= n:
            dst[k] = c
            k += 1
            i += 1
            continue
        c = p[i + 1]
        i += 2
        if c == c'n':
            c = c'\n'
        elif c == c't':
            c = c'\t'
        elif c == c'r':
            c = c'\r'
        elif c == c'b':
            c = 8
        elif c == c'f':
            c = 12
        elif c == c'u' and i + 4 <= n:
            v = hex4(p + i)
            if v != <uint32_t>0xffffffff:
                i += 4
                if 0xd800 <= v < 0xdc00 and i + 6 <= n and p[i] == c'\\' and p[i + 1] == c'u':
                    w = hex4(p + i + 2)
                    if 0xdc00 <= w < 0xe000:
                        v = 0x10000 + ((v - 0xd800) << 10) + (w - 0xdc00)
                        i += 6
                k += put_codepoint(dst + k, v)
                continue
            dst[k] = c'\\'
            k += 1
        elif c != c'"' and c != c'\\' and c != c'/':
            dst[k] = c'\\'
            k += 1
        dst[k] = c
        k += 1
    return k


cdef inline void json_string(TextScratch *s, const uint8_t *p, uint32_t n, bint escaped, const uint8_t *key,
                             uint32_t key_n) noexcept nogil:
    """One string leaf: unescape, then a document of its own, GraphQL, or text."""
    cdef uint32_t mark = s.pool_n, k = n
    if escaped:
        if n > pool_room(s):
            s.cut = 1
            n = pool_room(s)
        k = unescape_json(p, n, s.pool + mark)
        p = s.pool + mark
        s.pool_n += k
    note_login(s, key, key_n, p, k)
    if key_n == 5 and memcmp(key, "query", 5) == 0 and graphql_like(p, k):
        walk_graphql(s, p, k)
    else:
        leaf(s, p, k, KIND_JSON, False)
    s.pool_n = mark


cdef inline bint walk_json(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """String leaves and odd names of a JSON document, possibly broken or cut short; numbers and
    literals carry no text. s.place holds the document's place.

    Returns False where the document held something that is no JSON: the caller may then score
    it as text, too (those parts have been scored as values already).
    """
    cdef uint8_t array[DEPTH_MAX]
    cdef uint32_t index[DEPTH_MAX]
    cdef uint16_t base[DEPTH_MAX]
    cdef uint32_t i = 0, j, depth = 0, k, deeper = 0
    cdef const uint8_t *key = p
    cdef uint32_t key_n = 0
    cdef uint32_t before = s.place_n
    cdef uint8_t c
    cdef bint clean = True, escaped, member = False
    while i < n and not s.overrun:
        c = p[i]
        if or_value_class[c] & 8 or c == c':':
            i += 1
            continue
        if c == c',':
            i += 1
            member = False
            if depth:
                s.place_n = base[depth - 1]
                if array[depth - 1]:
                    index[depth - 1] += 1
                    key_n = 0
            continue
        if c == c'{' or c == c'[':
            if depth and array[depth - 1] and not deeper:
                s.place_n = base[depth - 1]
                place_index(s, index[depth - 1])
            if depth < DEPTH_MAX:
                array[depth] = c == c'['
                index[depth] = 0
                base[depth] = <uint16_t>s.place_n
                depth += 1
            else:
                deeper += 1
            member = False
            i += 1
            continue
        if c == c'}' or c == c']':
            i += 1
            member = False
            if deeper:
                deeper -= 1
            elif depth:
                depth -= 1
                s.place_n = base[depth]
            else:
                clean = False
            continue
        if depth and array[depth - 1] and not deeper:
            s.place_n = base[depth - 1]
            place_index(s, index[depth - 1])
        if c == c'"':
            j = i + 1
            escaped = False
            while j < n and p[j] != c'"':
                if p[j] == c'\\':
                    escaped = True
                    j += 1
                j += 1
            if j > n:
                j = n
            k = j + 1
            while k < n and or_value_class[p[k]] & 8:
                k += 1
            if not member and k < n and p[k] == c':' and depth and (deeper or not array[depth - 1]):
                key = p + i + 1
                key_n = j - i - 1
                member = True
                if not deeper:
                    s.place_n = base[depth - 1]
                    place_member(s, key, key_n)
                score_name(s, key, key_n, False)
                i = k + 1
                continue
            json_string(s, p + i + 1, j - i - 1, escaped, key, key_n)
            i = j + 1
            continue
        j = i
        while j < n and p[j] != c',' and p[j] != c'}' and p[j] != c']' and p[j] != c'\n':
            j += 1
        k = j
        while k > i and or_value_class[p[k - 1]] & 8:
            k -= 1
        if not plain_literal(p + i, k - i):
            clean = False
            score_value(s, p + i, k - i, KIND_JSON, False)
        i = j
    s.place_n = before
    return clean


cdef inline bint plain_literal(const uint8_t *p, uint32_t n) noexcept nogil:
    """true, false, null or a JSON number."""
    cdef uint32_t i
    if n == 4 and (memcmp(p, "true", 4) == 0 or memcmp(p, "null", 4) == 0):
        return True
    if n == 5 and memcmp(p, "false", 5) == 0:
        return True
    if n > 40:
        return False
    for i in range(n):
        if not (or_value_class[p[i]] & 4 or p[i] == c'.' or p[i] == c'-' or p[i] == c'+' or (p[i] | 32) == c'e'):
            return False
    return True


cdef inline bint graphql_like(const uint8_t *p, uint32_t n) noexcept nogil:
    """Begins as a GraphQL document does."""
    cdef uint32_t i = 0
    while i < n and (or_value_class[p[i]] & 8 or p[i] == c','):
        i += 1
    p += i
    n -= i
    if n < 3 or memchr(p, c'{', n) == NULL:
        return False
    if p[0] == c'{':
        i = 1
        while i < n and or_value_class[p[i]] & 8:
            i += 1
        return i < n and (c'a' <= (p[i] | 32) <= c'z' or p[i] == c'_' or p[i] == c'.')
    return (n > 5 and memcmp(p, "query", 5) == 0) or (n > 8 and memcmp(p, "mutation", 8) == 0) \
        or (n > 12 and memcmp(p, "subscription", 12) == 0) or (n > 8 and memcmp(p, "fragment", 8) == 0)


cdef inline void walk_graphql(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """String arguments of a GraphQL document; the document itself is text only where it holds
    characters that the language has no use for."""
    cdef uint32_t i = 0, j, k
    cdef uint8_t c
    cdef bint odd = False
    k = place_text(s, <const uint8_t *>".graphql", 8)
    while i < n and not s.overrun:
        c = p[i]
        if c == c'"':
            j = i + 1
            if j + 1 < n and p[j] == c'"' and p[j + 1] == c'"':
                j += 2
                while j + 2 < n and not (p[j] == c'"' and p[j + 1] == c'"' and p[j + 2] == c'"'):
                    j += 1
                score_value(s, p + i + 3, (j if j + 2 < n else n) - i - 3, KIND_JSON, False)
                i = j + 3
                continue
            while j < n and p[j] != c'"' and p[j] != c'\n':
                if p[j] == c'\\':
                    j += 1
                j += 1
            if j > n:
                j = n
            leaf(s, p + i + 1, j - i - 1, KIND_JSON, False)
            i = j + 1
            continue
        if c == c'#':
            j = i
            while j < n and p[j] != c'\n':
                j += 1
            score_value(s, p + i, j - i, KIND_JSON, False)
            i = j
            continue
        if not (or_value_class[c] & 9 or c == c'{' or c == c'}' or c == c'(' or c == c')' or c == c'[' or c == c']'
                or c == c':' or c == c'!' or c == c'$' or c == c',' or c == c'@' or c == c'=' or c == c'|'
                or c == c'&'):
            odd = True
        i += 1
    if odd:
        score_value(s, p, n, KIND_JSON, False)
    s.place_n = k


# ---------------------------------------------------------------- XML

cdef inline bint xml_name(uint8_t c) noexcept nogil:
    return (or_value_class[c] & 1) != 0 or c == c':' or c >= 0x80


cdef inline bint xml_blank(uint8_t c) noexcept nogil:
    return c == c' ' or c == c'\n' or c == c'\r' or c == c'\t'


cdef inline bint blank_text(const uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if not xml_blank(p[i]):
            return False
    return True


cdef inline void walk_xml(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Text, attribute values, comments, CDATA, processing instructions and the DOCTYPE of an XML
    document, possibly broken. s.place holds the document's place."""
    cdef uint16_t base[DEPTH_MAX]
    cdef uint32_t i = 0, j, k, e, depth = 0, deeper = 0, level, before = s.place_n
    cdef uint8_t q
    cdef const uint8_t *found
    cdef bint closed
    while i < n and not s.overrun:
        if p[i] != c'<':
            found = <const uint8_t *>memchr(p + i, c'<', n - i)
            j = <uint32_t>(found - p) if found != NULL else n
            if not blank_text(p + i, j - i):
                leaf(s, p + i, j - i, KIND_XML, False)
            i = j
            continue
        if i + 1 < n and p[i + 1] == c'!':
            if i + 8 < n and memcmp(p + i, "<![CDATA[", 9) == 0:
                j = find(p, n, i + 9, "]]>", 3)
                leaf(s, p + i + 9, j - i - 9, KIND_XML, False)
                i = j + 3
            elif i + 3 < n and p[i + 2] == c'-' and p[i + 3] == c'-':
                j = find(p, n, i + 4, "-->", 3)
                score_value(s, p + i + 4, j - i - 4, KIND_XML, False)
                i = j + 3
            else:
                # DOCTYPE with its internal subset, as one value
                j = i
                level = 0
                while j < n:
                    if p[j] == c'[':
                        level = 1
                    elif p[j] == c']':
                        level = 0
                    elif p[j] == c'>' and level == 0:
                        break
                    j += 1
                k = place_text(s, <const uint8_t *>".doctype", 8)
                if j - i > 15 and not plain_doctype(p + i, j - i):
                    score_value(s, p + i, j - i, KIND_XML, False)
                s.place_n = k
                i = j + 1
            continue
        if i + 1 < n and p[i + 1] == c'?':
            j = find(p, n, i, "?>", 2)
            if not (i + 5 < n and memcmp(p + i, "<?xml", 5) == 0 and xml_blank(p[i + 5])):
                score_value(s, p + i, j - i, KIND_XML, False)
            i = j + 2
            continue
        if i + 1 < n and p[i + 1] == c'/':
            found = <const uint8_t *>memchr(p + i, c'>', n - i)
            i = <uint32_t>(found - p) + 1 if found != NULL else n
            if deeper:
                deeper -= 1
            elif depth:
                depth -= 1
                s.place_n = base[depth]
            continue
        j = i + 1
        while j < n and xml_name(p[j]):
            j += 1
        if j == i + 1:
            # a '<' that opens nothing
            found = <const uint8_t *>memchr(p + i + 1, c'<', n - i - 1)
            j = <uint32_t>(found - p) if found != NULL else n
            score_value(s, p + i, j - i, KIND_XML, False)
            i = j
            continue
        if depth < DEPTH_MAX:
            base[depth] = <uint16_t>s.place_n
            depth += 1
            place_member(s, p + i + 1, j - i - 1)
        else:
            deeper += 1
        closed = False
        while j < n and p[j] != c'>':
            if xml_blank(p[j]) or p[j] == c'=':
                j += 1
                continue
            if p[j] == c'/' and j + 1 < n and p[j + 1] == c'>':
                closed = True
                j += 1
                break
            if p[j] == c'"' or p[j] == c"'":
                q = p[j]
                found = <const uint8_t *>memchr(p + j + 1, q, n - j - 1) if j + 1 < n else NULL
                e = <uint32_t>(found - p) if found != NULL else n
                leaf(s, p + j + 1, e - j - 1, KIND_XML, False)
                j = e + 1
                continue
            e = j
            while e < n and p[e] != c'=' and p[e] != c'>' and not xml_blank(p[e]):
                e += 1
            k = place_text(s, <const uint8_t *>".@", 2)
            place_text(s, p + j, e - j if e - j < 48 else 48)
            score_name_xml(s, p + j, e - j)
            j = e
            while j < n and xml_blank(p[j]):
                j += 1
            if j < n and p[j] == c'=':
                j += 1
                while j < n and xml_blank(p[j]):
                    j += 1
                if j < n and (p[j] == c'"' or p[j] == c"'"):
                    found = <const uint8_t *>memchr(p + j + 1, p[j], n - j - 1) if j + 1 < n else NULL
                    e = <uint32_t>(found - p) if found != NULL else n
                    if not schema_url(p + j + 1, e - j - 1):
                        leaf(s, p + j + 1, e - j - 1, KIND_XML, False)
                    j = e + 1
            s.place_n = k
            if j == e and j < n and p[j] != c'>' and not xml_blank(p[j]):
                j += 1
        if closed or j >= n:
            if deeper:
                deeper -= 1
            elif depth:
                depth -= 1
                s.place_n = base[depth]
        i = j + 1
    s.place_n = before


cdef inline bint schema_url(const uint8_t *p, uint32_t n) noexcept nogil:
    """The address of a namespace every SOAP or Office client names."""
    return (n >= 23 and memcmp(p, "http://schemas.xmlsoap.", 23) == 0 and plain_url(p, n)) \
        or (n >= 18 and memcmp(p, "http://www.w3.org/", 18) == 0 and plain_url(p, n))


cdef inline bint plain_url(const uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if not (or_value_class[p[i]] & 1 or p[i] == c'/' or p[i] == c':' or p[i] == c'#'):
            return False
    return True


cdef inline bint plain_doctype(const uint8_t *p, uint32_t n) noexcept nogil:
    """<!DOCTYPE html and the like: names only, no quotes, no subset."""
    cdef uint32_t i
    for i in range(2, n):
        if not (or_value_class[p[i]] & 9):
            return False
    return True


cdef inline void score_name_xml(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if not xml_name(p[i]) and p[i] != c'/' and p[i] != c'?':
            score_value(s, p, n, KIND_KEY, False)
            return


cdef inline uint32_t find(const uint8_t *p, uint32_t n, uint32_t i, const char *lit, uint32_t k) noexcept nogil:
    """Index of lit[0..k) in p[i..n), n where it is not there."""
    cdef const uint8_t *found
    while i + k <= n:
        found = <const uint8_t *>memchr(p + i, lit[0], n - i - k + 1)
        if found == NULL:
            return n
        i = <uint32_t>(found - p)
        if memcmp(found, lit, k) == 0:
            return i
        i += 1
    return n


# ---------------------------------------------------------------- multipart

cdef inline Slice parameter(const uint8_t *p, uint32_t n, const char *name, uint32_t name_n) noexcept nogil:
    """Value of `name=value` or `name="value"` among the parameters of a header; p NULL: not there.
    name is given with its '='."""
    cdef Slice out
    cdef uint32_t i = 0, j
    out.p = NULL
    out.n = 0
    while i + name_n <= n:
        if (i == 0 or p[i - 1] == c';' or xml_blank(p[i - 1])) and same_nocase(p + i, name, name_n):
            i += name_n
            if i < n and p[i] == c'"':
                j = i + 1
                while j < n and p[j] != c'"':
                    j += 2 if p[j] == c'\\' else 1
                if j > n:
                    j = n
                out.p = <const char *>p + i + 1
                out.n = j - i - 1
                return out
            j = i
            while j < n and p[j] != c';' and not xml_blank(p[j]):
                j += 1
            out.p = <const char *>p + i
            out.n = j - i
            return out
        i += 1
    return out


cdef inline bint same_nocase(const uint8_t *p, const char *lit, uint32_t n) noexcept nogil:
    cdef uint32_t i
    cdef uint8_t c
    for i in range(n):
        c = p[i]
        if 65 <= c <= 90:
            c += 32
        if c != <uint8_t>lit[i]:
            return False
    return True


cdef inline void walk_multipart(TextScratch *s, const uint8_t *p, uint32_t n, Slice mark) noexcept nogil:
    """Fields of multipart/form-data: names, file names, values; of a file only the first KiB."""
    cdef uint32_t i, j, h, k, e, line
    cdef Slice name, file
    cdef uint8_t delim[80]
    if mark.p == NULL or mark.n == 0 or mark.n > 72:
        score_value(s, p, n, KIND_BODY, False)
        return
    delim[0] = c'-'
    delim[1] = c'-'
    memcpy(delim + 2, mark.p, mark.n)
    h = mark.n + 2
    i = find(p, n, 0, <const char *>delim, h)
    if i == n:
        score_value(s, p, n, KIND_BODY, False)
        return
    if i > 2:
        score_value(s, p, i, KIND_BODY, False)
    while i < n and not s.overrun:
        i += h
        if i + 1 < n and p[i] == c'-' and p[i + 1] == c'-':
            if n - i > 6 and not blank_text(p + i + 2, n - i - 2):
                score_value(s, p + i + 2, n - i - 2, KIND_BODY, False)
            return
        j = find(p, n, i, <const char *>delim, h)
        # headers of the part
        name.p = NULL
        name.n = 0
        file = name
        e = i
        while e < j:
            line = find(p, j, e, "\n", 1)
            k = line
            if k > e and p[k - 1] == c'\r':
                k -= 1
            if k == e and e > i + 1:
                e = line + 1
                break
            if k - e > 20 and same_nocase(p + e, "content-disposition:", 20):
                name = parameter(p + e + 20, k - e - 20, "name=", 5)
                file = parameter(p + e + 20, k - e - 20, "filename=", 9)
            e = line + 1
        if e > j:
            e = j
        k = j
        if k > e and p[k - 1] == c'\n':
            k -= 1
            if k > e and p[k - 1] == c'\r':
                k -= 1
        line = place_member(s, <const uint8_t *>name.p, name.n)
        if name.p != NULL:
            score_name(s, <const uint8_t *>name.p, name.n, False)
        if file.p != NULL:
            h = place_text(s, <const uint8_t *>".filename", 9)
            score_value(s, <const uint8_t *>file.p, file.n, KIND_FORM, False)
            s.place_n = h
            h = mark.n + 2
            if file.n or k > e:
                score_value(s, p + e, k - e if k - e < 1024 else 1024, KIND_FILE, False)
        else:
            if name.p != NULL:
                note_login(s, <const uint8_t *>name.p, name.n, p + e, k - e)
            leaf(s, p + e, k - e, KIND_FORM, False)
        s.place_n = line
        i = j


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


cdef inline void walk_body(TextScratch *s, const uint8_t *p, uint32_t n, Slice type) noexcept nogil:
    """Take a body apart by its content type, or by its look where that says nothing."""
    cdef uint32_t i = 0, k = 0
    cdef Slice mark
    cdef bint form
    if n > s.policy.body_bytes_max:
        n = s.policy.body_bytes_max
        s.cut = 1
    s.place_n = 0
    if type.n > 19 and same_nocase(<const uint8_t *>type.p, "multipart/", 10):
        place_text(s, <const uint8_t *>"form", 4)
        mark = parameter(<const uint8_t *>type.p, type.n, "boundary=", 9)
        walk_multipart(s, p, n, mark)
        return
    while i < n and (or_value_class[p[i]] & 8 or p[i] == 0xef or p[i] == 0xbb or p[i] == 0xbf):
        i += 1
    p += i
    n -= i
    if n == 0:
        return
    form = contains_nocase(type, "x-www-form-urlencoded", 21)
    if n > 40 and p[0] == c'-' and p[1] == c'-' and find(p, n, 0, "ontent-", 7) < 300:
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
    if json_like(p, n) or (contains_nocase(type, "json", 4) and (p[0] == c'"' or p[0] == c'{' or p[0] == c'[')):
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
    while i < n and not s.overrun:
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
        return
    values = s.n_values
    windows = s.n_windows
    kept = s.worst
    s.worst.linear = -1e30
    s.worst.text_n = 0
    s.worst.place_n = 0
    header_value(s, p, n, shape)
    if not s.cut and not s.overrun:
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
    if shape == OR_H_FREE and plain_word(s, p, h.value.n):
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
        if s.overrun:
            return
        walk_header(s, &r.headers[i])
