"""Score one value; walk pairs, JSON and GraphQL down to their values.

Walkers are tolerant: whatever the input, they read only inside their slice, keep to the limits of
the policy, and hand on what they cannot make sense of as plain text. A value's place is built in
s.place while walking and kept only when the value becomes the worst.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from native.base cimport mix64, or_now_ns
from native.decode cimport (base64_text, decode_round, fold_text, hex4, needs_strip, or_b64, put_codepoint,
                            strip_text)
from native.ngram cimport window_hash, window_score
from native.textdefs cimport *

cdef extern from *:
    """
    #ifndef OR_LEAF_TABLES
    #define OR_LEAF_TABLES
    #include <stdint.h>
    #include <string.h>
    /* bit 1: letter, digit or one of -_.~  2: may stand in a header of fixed shape
       4: digit  8: JSON blank */
    static const uint8_t or_value_class[256] = {
        ['0' ... '9'] = 1 | 2 | 4, ['A' ... 'Z'] = 1 | 2, ['a' ... 'z'] = 1 | 2, ['-'] = 1 | 2, ['_'] = 1 | 2,
        ['.'] = 1 | 2, ['~'] = 1, [' '] = 2 | 8, [','] = 2, [';'] = 2, ['='] = 2, ['/'] = 2, ['*'] = 2,
        ['+'] = 2, ['"'] = 2, ['?'] = 2, [':'] = 2, ['@'] = 2, ['\\t'] = 8, ['\\n'] = 8, ['\\r'] = 8};
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

cdef inline uint64_t time_left(TextScratch *s) noexcept nogil:
    """ns until the deadline, 0 where it is over. Decides how soon the clock is read again: a window costs about 1 us,
    a step of a walker some 20 ns, on a slow machine several times as much."""
    cdef uint64_t now
    if s.deadline_ns == 0:
        s.clock = 64
        s.ticks = 1024
        return <uint64_t>-1
    now = or_now_ns()
    if now >= s.deadline_ns:
        s.clock = 1
        s.ticks = 1
        return 0
    now = s.deadline_ns - now
    s.clock = 8 if now > 40000 else 2 if now > 10000 else 1
    s.ticks = 128 if now > 40000 else 32
    return now


cdef inline bint late(TextScratch *s) noexcept nogil:
    """Is the time up? Asked by walkers at every step: a document may be long and hold nothing to score."""
    s.ticks -= 1
    if s.ticks == 0 and not s.overrun and time_left(s) == 0:
        s.overrun = 1
    return s.overrun


cdef inline uint32_t within(TextScratch *s, uint32_t n, uint32_t ns_per_byte, uint32_t least) noexcept nogil:
    """So many of n bytes as the time left allows for at this price each, but at least `least`. For steps that go over
    many bytes without looking at the clock."""
    cdef uint64_t room
    if n <= least:
        return n
    room = time_left(s) // ns_per_byte
    if room < least:
        room = least
    return n if n < room else <uint32_t>room


cdef inline bint spent(TextScratch *s) noexcept nogil:
    """A limit or the deadline was hit: no more windows."""
    if s.n_windows >= s.policy.windows_max or s.n_values >= s.policy.values_max:
        s.cut = 1
        return True
    if s.overrun:
        return True
    s.clock -= 1
    if s.clock == 0 and time_left(s) == 0:
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


cdef inline bint data_url(const uint8_t *p, uint32_t n, uint8_t *dst, uint32_t *out_n) noexcept nogil:
    """Text behind 'base64,' up to the first byte that is no digit of base64, decoded to dst."""
    cdef uint32_t i = 6, e
    cdef const uint8_t *found
    while i + 12 < n:
        found = <const uint8_t *>memchr(p + i, c',', n - i)
        if found == NULL:
            return False
        i = <uint32_t>(found - p)
        if memcmp(p + i - 6, "base64", 6) == 0:
            i += 1
            e = i
            while e < n and or_b64[p[e]] and p[e] != c' ':
                e += 1
            return base64_text(p + i, e - i, dst, out_n)
        i += 1
    return False


cdef inline void score_piece(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind,
                             bint plus) noexcept nogil:
    """Decode, fold and score at most CHUNK_BYTES, and the variants they call for."""
    cdef uint8_t rounds = 0, more = 0
    cdef uint32_t k, m = 0
    cdef bint coded
    k = decode_all(s, p, n, s.buf_a + 1, plus, &rounds)
    coded = base64_text(s.buf_a + 1, k, s.buf_b + 1, &m) or data_url(s.buf_a + 1, k, s.buf_b + 1, &m)
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


cdef inline void keep_raw(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """The worst window so far lies in these n bytes, at most CHUNK_BYTES. They stay where they are as long as the
    request does, but for those in the pool."""
    if s.pool <= p < s.pool + POOL_BYTES and not s.in_header:
        memcpy(s.kept, p, n)
        p = s.kept
    s.worst.raw = p


cdef inline void score_value(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind,
                             bint plus) noexcept nogil:
    """Score one value, piece by piece where it is long."""
    cdef uint32_t k
    cdef float before
    if n == 0 or is_number(p, n) or spent(s):
        return
    s.n_values += 1
    while True:
        # in short time a shorter piece: it is decoded whole before its first window is scored
        k = within(s, n if n < CHUNK_BYTES else <uint32_t>CHUNK_BYTES, 16, 2 * CHUNK_OVERLAP)
        before = s.worst.linear
        score_piece(s, p, k, kind, plus)
        if s.worst.linear > before:
            keep_raw(s, p, k)
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


cdef inline bint random_password(const uint8_t *p, uint32_t n) noexcept nogil:
    """Looks like a generated password: short, no blank, no comment, no word of four letters in one case. Such
    strings are full of quotes and brackets, and whoever has one must be able to log in."""
    cdef uint32_t i, run = 0
    cdef uint8_t c, case_ = 0, now
    if n > 64:
        return False
    for i in range(n):
        c = p[i]
        if c <= 32 or (c == c'/' and i + 1 < n and p[i + 1] == c'*'):
            return False
        if c == c'%' and i + 2 < n and p[i + 1] == c'2' and p[i + 2] == c'0':
            return False
        now = 1 if 97 <= c <= 122 else 2 if 65 <= c <= 90 else 0
        run = run + 1 if now and now == case_ else 1
        case_ = now
        if now and run >= 4:
            return False
    return True


cdef inline bint note_login(TextScratch *s, const uint8_t *k, uint32_t kn, const uint8_t *p,
                            uint32_t n) noexcept nogil:
    """Remember the user name of a login form: a member named like one, beside a password. True where the
    value is a password that need not be read."""
    cdef int f = or_login_field(k, kn)
    if f == 2:
        s.has_password = 1
        return random_password(p, n)
    if f == 1 and n and s.login == 0:
        s.login = mix64(text_name_hash(<const char *>p, n if n < 256 else 256)) | 1
    return False


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


# ---------------------------------------------------------------- pairs

cdef inline void walk_pairs(TextScratch *s, const uint8_t *p, uint32_t n, uint8_t kind,
                            bint login) noexcept nogil:
    """name=value&name=value of a query or form; s.place holds the prefix."""
    cdef uint32_t i = 0, j, e, k
    cdef const uint8_t *found
    while i < n and not late(s):
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
                if not (login and note_login(s, p + i, e - i, p + e + 1, j - e - 1)):
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
        k = within(s, n, 8, 1024)                 # scoring it takes longer than that
        if k < n:
            s.part = 1
            n = k
        k = unescape_json(p, n, s.pool + mark)
        p = s.pool + mark
        s.pool_n += k
    if note_login(s, key, key_n, p, k):
        pass
    elif key_n == 5 and memcmp(key, "query", 5) == 0 and graphql_like(p, k):
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
    while i < n and not late(s):
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
        if not (or_value_class[p[i]] & 4 or p[i] == c'.' or p[i] == c'-' or p[i] == c'+'
                or (p[i] | 32) == c'e'):
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
    while i < n and not late(s):
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
        if not (or_value_class[c] & 9 or c == c'{' or c == c'}' or c == c'(' or c == c')' or c == c'['
                or c == c']' or c == c':' or c == c'!' or c == c'$' or c == c',' or c == c'@' or c == c'='
                or c == c'|' or c == c'&'):
            odd = True
        i += 1
    if odd:
        score_value(s, p, n, KIND_JSON, False)
    s.place_n = k
