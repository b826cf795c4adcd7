"""Undo what hides a payload: encodings, comments, empty quotes, base64; then fold the text.

Every step writes at most as many bytes as it has read, so each may work in place (dst == src),
and none reads outside src[0..n).
"""
from libc.stdint cimport uint8_t, uint32_t

cdef extern from *:
    """
    #ifndef OR_DECODE_TABLES
    #define OR_DECODE_TABLES
    #include <stdint.h>
    #include <string.h>
    /* 1: starts an escape, 2: '+' */
    static const uint8_t or_trigger[256] = {['%'] = 1, ['&'] = 1, ['\\\\'] = 1, ['+'] = 2};
    /* value of a hex digit plus one, 0: none */
    static const uint8_t or_hex1[256] = {
        ['0'] = 1, ['1'] = 2, ['2'] = 3, ['3'] = 4, ['4'] = 5, ['5'] = 6, ['6'] = 7, ['7'] = 8,
        ['8'] = 9, ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
        ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16};
    /* value of a base64 digit (both alphabets; a space is a '+' that a form decoded) plus one, 0: none */
    static const uint8_t or_b64[256] = {
        ['A'] = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
        ['a'] = 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49,
        50, 51, 52,
        ['0'] = 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, ['+'] = 63, ['-'] = 63, [' '] = 63,
        ['/'] = 64, ['_'] = 64};
    /* folding: 0 copied, 1 space, 2 newline, 3 high byte, 4 control, 5 capital */
    static const uint8_t or_fold[256] = {
        [0x01 ... 0x08] = 4, ['\\t'] = 1, ['\\n'] = 2, [0x0b] = 1, [0x0c] = 1, ['\\r'] = 2,
        [0x0e ... 0x1f] = 4, [' '] = 1, ['A' ... 'Z'] = 5, [0x7f] = 4, [0x80 ... 0xff] = 3};
    typedef struct { char name[10]; uint8_t n; uint8_t c; } or_entity;
    static const or_entity or_entities[] = {
        {"lt", 2, '<'}, {"gt", 2, '>'}, {"amp", 3, '&'}, {"quot", 4, '"'}, {"apos", 4, 39}, {"nbsp", 4, ' '},
        {"tab", 3, 9}, {"newline", 7, 10}, {"colon", 5, ':'}, {"lpar", 4, '('}, {"rpar", 4, ')'},
        {"sol", 3, '/'}, {"bsol", 4, 92}, {"num", 3, '#'}, {"semi", 4, ';'}, {"equals", 6, '='},
        {"period", 6, '.'}, {"comma", 5, ','}, {"excl", 4, '!'}, {"grave", 5, '`'}, {"dollar", 6, '$'},
        {"lbrace", 6, '{'}, {"rbrace", 6, '}'}, {"lsqb", 4, '['}, {"rsqb", 4, ']'}, {"plus", 4, '+'},
        {"percnt", 6, '%'}, {"lowbar", 6, '_'}, {"verbar", 6, '|'}, {"ast", 3, '*'}};
    /* p stands behind '&', n bytes are left; bytes taken (with ';') or 0; *c gets the character */
    static inline uint32_t or_entity_at(const uint8_t *p, uint32_t n, uint8_t *c) {
        char w[8]; uint32_t k = 0, i;
        while (k < n && k < 8 && ((p[k] | 32) >= 'a') && ((p[k] | 32) <= 'z')) {
            w[k] = (char)(p[k] | 32); k++; }
        if (k < 2 || k >= n || p[k] != ';') return 0;
        for (i = 0; i < sizeof or_entities / sizeof *or_entities; i++)
            if (or_entities[i].n == k && memcmp(or_entities[i].name, w, k) == 0) {
                *c = or_entities[i].c; return k + 1; }
        return 0;
    }
    #endif
    """
    const uint8_t or_trigger[256]
    const uint8_t or_hex1[256]
    const uint8_t or_b64[256]
    const uint8_t or_fold[256]
    uint32_t or_entity_at(const uint8_t *p, uint32_t n, uint8_t *c) noexcept nogil


cdef inline uint32_t put_codepoint(uint8_t *dst, uint32_t cp) noexcept nogil:
    """UTF-8 of a code point; the full-width forms of ASCII become ASCII. Returns bytes written."""
    if 0xff01 <= cp <= 0xff5e:
        cp -= 0xfee0
    if cp < 0x80:
        dst[0] = <uint8_t>cp
        return 1
    if cp < 0x800:
        dst[0] = <uint8_t>(0xc0 | (cp >> 6))
        dst[1] = <uint8_t>(0x80 | (cp & 63))
        return 2
    if cp < 0x10000:
        dst[0] = <uint8_t>(0xe0 | (cp >> 12))
        dst[1] = <uint8_t>(0x80 | ((cp >> 6) & 63))
        dst[2] = <uint8_t>(0x80 | (cp & 63))
        return 3
    dst[0] = <uint8_t>(0xf0 | ((cp >> 18) & 7))
    dst[1] = <uint8_t>(0x80 | ((cp >> 12) & 63))
    dst[2] = <uint8_t>(0x80 | ((cp >> 6) & 63))
    dst[3] = <uint8_t>(0x80 | (cp & 63))
    return 4


cdef inline uint32_t hex4(const uint8_t *p) noexcept nogil:
    """Four hex digits; 0xffffffff where one of them is none."""
    cdef uint32_t i, v = 0
    for i in range(4):
        if or_hex1[p[i]] == 0:
            return <uint32_t>0xffffffff
        v = (v << 4) | (or_hex1[p[i]] - 1)
    return v


cdef inline uint32_t decode_round(const uint8_t *src, uint32_t n, uint8_t *dst, bint plus,
                                  bint *changed, bint *again) noexcept nogil:
    """One round over percent, %u, HTML entities, \\u and \\x; '+' becomes a space where `plus`.

    Returns the bytes written. changed: an escape was undone; again: another round may find more.
    """
    cdef uint32_t i = 0, k = 0, j, v, d
    cdef uint8_t c, t, e
    cdef bint ch = False, ag = False
    while i < n:
        c = src[i]
        t = or_trigger[c]
        if t == 0:
            dst[k] = c
            k += 1
            i += 1
            continue
        if t == 2:
            dst[k] = c' ' if plus else c
            k += 1
            i += 1
            continue
        v = <uint32_t>0xffffffff
        j = 0
        if c == c'%':
            if i + 2 < n and or_hex1[src[i + 1]] and or_hex1[src[i + 2]]:
                dst[k] = <uint8_t>(((or_hex1[src[i + 1]] - 1) << 4) | (or_hex1[src[i + 2]] - 1))
                ag = ag or or_trigger[dst[k]] != 0
                k += 1
                i += 3
                ch = True
                continue
            if i + 5 < n and (src[i + 1] | 32) == c'u':
                v = hex4(src + i + 2)
                j = 6
        elif c == c'\\':
            if i + 3 < n and src[i + 1] == c'x' and or_hex1[src[i + 2]] and or_hex1[src[i + 3]]:
                v = ((or_hex1[src[i + 2]] - 1) << 4) | (or_hex1[src[i + 3]] - 1)
                j = 4
            elif i + 5 < n and src[i + 1] == c'u' and src[i + 2] != c'{':
                v = hex4(src + i + 2)
                j = 6
            elif i + 4 < n and src[i + 1] == c'u' and src[i + 2] == c'{':
                j = i + 3
                v = 0
                while j < n and j < i + 9 and or_hex1[src[j]]:
                    v = (v << 4) | (or_hex1[src[j]] - 1)
                    j += 1
                if j == i + 3 or j >= n or src[j] != c'}' or v > 0x10ffff:
                    v = <uint32_t>0xffffffff
                j = j + 1 - i
        elif i + 2 < n and src[i + 1] == c'#':
            j = i + 2
            v = 0
            d = 0
            if (src[j] | 32) == c'x':
                j += 1
                while j < n and d < 8 and or_hex1[src[j]]:
                    v = (v << 4) | (or_hex1[src[j]] - 1)
                    j += 1
                    d += 1
            else:
                while j < n and d < 9 and c'0' <= src[j] <= c'9':
                    v = v * 10 + (src[j] - c'0')
                    j += 1
                    d += 1
            if d == 0 or v > 0x10ffff:
                v = <uint32_t>0xffffffff
            elif j < n and src[j] == c';':
                j += 1
            j -= i
        else:
            j = or_entity_at(src + i + 1, n - i - 1, &e)
            if j:
                v = e
                j += 1
        if v == <uint32_t>0xffffffff:
            dst[k] = c
            k += 1
            i += 1
            continue
        j += i
        d = put_codepoint(dst + k, v)
        ag = ag or or_trigger[dst[k]] != 0
        k += d
        i = j
        ch = True
    changed[0] = ch
    # what an escape gave may be the start of the next one ("%25" + "27"), or end one begun before
    again[0] = ch and (ag or has_trigger(dst, k))
    return k


cdef inline bint has_trigger(const uint8_t *p, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        if or_trigger[p[i]] == 1:
            return True
    return False


cdef inline uint32_t overlong(const uint8_t *p, uint32_t n, uint8_t lead) noexcept nogil:
    """Bytes behind the lead byte of an over-long form of '!'..'?' in 3 to 6 bytes (e0 80 af), else 0."""
    cdef uint32_t k, i
    if lead == 0xe0:
        k = 2
    elif lead == 0xf0:
        k = 3
    elif lead == 0xf8:
        k = 4
    elif lead == 0xfc:
        k = 5
    else:
        return 0
    if n < k or (p[k - 1] & 0xc0) != 0x80 or (p[k - 1] & 0x3f) < 0x21:
        return 0
    for i in range(k - 1):
        if p[i] != 0x80:
            return 0
    return k


cdef inline uint32_t fold_text(const uint8_t *src, uint32_t n, uint8_t *dst) noexcept nogil:
    """Lower case, runs of blanks to one space, runs of line ends to one newline, control bytes to
    0x01, runs of other high bytes to at most three 0x80. Over-long and full-width forms of ASCII
    become ASCII. Returns the bytes written."""
    cdef uint32_t i = 0, k = 0, v
    cdef uint8_t c, f, last = 255, high = 0
    while i < n:
        c = src[i]
        f = or_fold[c]
        i += 1
        if f == 5:
            c |= 32
        elif f != 0:
            if f == 3:
                if (c == 0xc0 or c == 0xc1) and i < n and (src[i] & 0xc0) == 0x80:
                    c = <uint8_t>(((c & 1) << 6) | (src[i] & 63))
                    i += 1
                    f = or_fold[c]
                elif (c == 0xc0 or c == 0xc1) and i < n and src[i] < 0x80:
                    continue               # a broken sequence that sloppy decoders skip
                elif overlong(src + i, n - i, c):
                    i += overlong(src + i, n - i, c)
                    c = src[i - 1] & 0x3f
                    f = or_fold[c]
                elif c == 0xe2 and i + 1 < n \
                        and ((src[i] == 0x88 and (src[i + 1] == 0x95 or src[i + 1] == 0x96))
                             or (src[i] == 0x81 and src[i + 1] == 0x84)):
                    c = c'\\' if src[i + 1] == 0x96 else c'/'      # U+2215, U+2216, U+2044
                    i += 2
                    f = 0
                elif c == 0xef and i + 1 < n and (src[i] == 0xbc or src[i] == 0xbd) \
                        and (src[i + 1] & 0xc0) == 0x80:
                    v = (<uint32_t>0xf000) | (<uint32_t>(src[i] & 63) << 6) | (src[i + 1] & 63)
                    if 0xff01 <= v <= 0xff5e:
                        c = <uint8_t>(v - 0xfee0)
                        i += 2
                        f = or_fold[c]
                if f == 5:
                    c |= 32
                elif f == 3:
                    if high == 3:
                        continue
                    high += 1
                    dst[k] = 0x80
                    k += 1
                    last = 255
                    continue
            if f == 1:
                high = 0
                if last == 1:
                    continue
                dst[k] = c' '
                k += 1
                last = 1
                continue
            if f == 2:
                high = 0
                if last == 2:
                    continue
                dst[k] = c'\n'
                k += 1
                last = 2
                continue
            if f == 4:
                c = 1
        high = 0
        last = 0
        dst[k] = c
        k += 1
    return k


cdef inline bint base64_text(const uint8_t *p, uint32_t n, uint8_t *dst, uint32_t *out_n) noexcept nogil:
    """Decode p as base64 (either alphabet, padding optional) where it is at least 12 digits and at
    least 95% of what comes out is printable. dst needs n bytes."""
    cdef uint32_t i, k = 0, acc = 0, bits = 0, odd = 0, allowed
    cdef uint8_t c
    while n > 0 and p[n - 1] == c'=':
        n -= 1
    if n < 12 or (n & 3) == 1:
        return False
    allowed = (n * 3 // 4) // 20
    for i in range(n):
        if or_b64[p[i]] == 0:
            return False
        acc = (acc << 6) | (or_b64[p[i]] - 1)
        bits += 6
        if bits >= 8:
            bits -= 8
            c = <uint8_t>(acc >> bits)
            if (c < 32 and c != 9 and c != 10 and c != 13) or c > 126:
                odd += 1
                if odd > allowed:
                    return False
            dst[k] = c
            k += 1
    out_n[0] = k
    return True


cdef inline bint is_word(uint8_t c) noexcept nogil:
    return c'a' <= c <= c'z' or c'0' <= c <= c'9' or c == c'_'


cdef inline bint needs_strip(const uint8_t *p, uint32_t n) noexcept nogil:
    """A cheap look whether strip_text would change the folded text p."""
    cdef uint32_t i
    cdef uint8_t c, d
    for i in range(n - 1 if n else 0):
        c = p[i]
        d = p[i + 1]
        if c == c'/':
            if d == c'*':
                return True
        elif c == c'"' or c == c"'":
            if d == c or ((d == c'+' or d == c'.' or d == c'|') and i + 2 < n):
                return True
        elif c == c'\\' or c == c'^':
            if is_word(d):
                return True
        elif c == c'$':
            if d == c'@' or d == c'i' or d == c'{':
                return True
        elif c <= 1:
            if is_word(d):
                return True
    return False


cdef inline bint joins(const uint8_t *p, uint32_t n, uint32_t i, uint32_t *end) noexcept nogil:
    """At p[i] a quote that ends a string which the next characters join to another: 'a'+'b', "a" . "b",
    'a'||'b'. end gets the index behind the second quote."""
    cdef uint32_t j = i + 1, ops = 0
    cdef uint8_t q = p[i]
    while j < n and j < i + 6:
        if p[j] == q and ops:
            end[0] = j + 1
            return True
        if p[j] == c'+' or p[j] == c'.' or p[j] == c'|':
            ops += 1
        elif p[j] != c' ':
            return False
        j += 1
    return False


cdef inline uint32_t strip_text(const uint8_t *p, uint32_t n, uint8_t *dst) noexcept nogil:
    """Folded text without what interpreters ignore: /*..*/ becomes a space (/*!..*/ keeps its inside),
    empty quotes and control bytes inside words, backslashes and carets before letters, $@ and joins of
    strings go, $IFS becomes a space. Returns the bytes written."""
    cdef uint32_t i = 0, k = 0, e = 0
    cdef uint8_t c, d
    while i < n:
        c = p[i]
        d = p[i + 1] if i + 1 < n else 0
        if c == c'/' and d == c'*':
            if i + 2 < n and p[i + 2] == c'!':
                i += 3
                while i < n and c'0' <= p[i] <= c'9':
                    i += 1
                c = c' '
            else:
                i += 2
                while i + 1 < n and not (p[i] == c'*' and p[i + 1] == c'/'):
                    i += 1
                i = i + 2 if i + 1 < n else n
                c = c' '
            if k == 0 or dst[k - 1] != c' ':
                dst[k] = c
                k += 1
            continue
        if c == c'*' and d == c'/':
            i += 2
            continue
        if (c == c'"' or c == c"'") and d == c and k > 0 and is_word(dst[k - 1]) \
                and i + 2 < n and is_word(p[i + 2]):
            i += 2
            continue
        if (c == c'"' or c == c"'") and joins(p, n, i, &e):
            i = e
            continue
        if (c == c'\\' or c == c'^') and is_word(d) and not (k > 0 and dst[k - 1] == c'['):
            i += 1
            continue
        if c == c'$' and d == c'@':
            i += 2
            continue
        if c <= 1 and is_word(d) and k > 0 and is_word(dst[k - 1]):
            i += 1
            continue
        if c == c'$' and i + 3 < n and d == c'i' and p[i + 2] == c'f' and p[i + 3] == c's':
            i += 4
            if i + 1 < n and p[i] == c'$' and c'0' <= p[i + 1] <= c'9':
                i += 2
            dst[k] = c' '
            k += 1
            continue
        if c == c'$' and i + 5 < n and d == c'{' and p[i + 2] == c'i' and p[i + 3] == c'f' \
                and p[i + 4] == c's' and p[i + 5] == c'}':
            i += 6
            dst[k] = c' '
            k += 1
            continue
        dst[k] = c
        k += 1
        i += 1
    return k
