"""Walk XML and multipart/form-data down to their values. The contract is that of native/leaves.pxd."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memchr, memcmp, memcpy

from native.base cimport Slice
from native.leaves cimport (
    late, leaf, note_login, or_value_class, place_member, place_text, score_name, score_value)
from native.textdefs cimport *

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
    while i < n and not late(s):
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
        while j < n and p[j] != c'>' and not late(s):
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


cdef inline uint32_t find(const uint8_t *p, uint32_t n, uint32_t i, const char *lit,
                          uint32_t k) noexcept nogil:
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
    while i < n and not late(s):
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
            if name.p == NULL or not note_login(s, <const uint8_t *>name.p, name.n, p + e, k - e):
                leaf(s, p + e, k - e, KIND_FORM, False)
        s.place_n = line
        i = j
