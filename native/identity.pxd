"""Who is asking: the address as a key, and the principal out of a header, cookie, token or
Basic credentials. Only keyed hashes (SipHash-2-4 under the arena's or the deployment's key)
leave this file; the secret itself is never stored."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from native.base cimport Request, Slice, siphash24, slice_is
from native.policy cimport (
    PRINCIPAL_BASIC, PRINCIPAL_COOKIE, PRINCIPAL_HEADER, PRINCIPAL_JWT, Policy, PrincipalSource)

cdef enum:
    TOKEN_MAX = 4096             # decoded bytes of a token that are looked at


cdef inline uint64_t address_key(const uint8_t *address, const uint64_t *key) noexcept nogil:
    """IPv4 whole, IPv6 by /64: a single customer owns at least that much."""
    cdef uint8_t a[16]
    cdef int i
    cdef bint mapped = True
    memcpy(a, address, 16)
    for i in range(10):
        if a[i]:
            mapped = False
    if mapped and not (a[10] == 0xff and a[11] == 0xff):
        mapped = False
    if not mapped:
        memset(a + 8, 0, 8)
    return siphash24(<const char *>a, 16, key[0], key[1]) | 1


cdef inline int base64_value(uint8_t c) noexcept nogil:
    if 65 <= c <= 90:
        return c - 65
    if 97 <= c <= 122:
        return c - 71
    if 48 <= c <= 57:
        return c + 4
    if c == 43 or c == 45:
        return 62
    if c == 47 or c == 95:
        return 63
    return -1


cdef inline uint32_t base64_decode(const char *p, uint32_t n, char *out, uint32_t room) noexcept nogil:
    """Both alphabets; stops at padding or anything foreign. Returns the bytes written."""
    cdef uint32_t i, bits = 0, at = 0
    cdef uint32_t acc = 0
    cdef int v
    for i in range(n):
        v = base64_value(<uint8_t>p[i])
        if v < 0 or at >= room:
            break
        acc = (acc << 6) | <uint32_t>v
        bits += 6
        if bits >= 8:
            bits -= 8
            out[at] = <char>((acc >> bits) & 0xff)
            at += 1
    return at


cdef inline Slice json_member(const char *p, uint32_t n, const char *name, uint32_t name_n) noexcept nogil:
    """The raw value of a member of the outermost object; empty where there is none."""
    cdef Slice s
    cdef uint32_t i = 0, start
    cdef int depth = 0
    cdef bint hit
    s.p = NULL
    s.n = 0
    while i < n:
        if p[i] == c'"':
            start = i + 1
            i += 1
            while i < n and p[i] != c'"':
                i += 2 if p[i] == c'\\' else 1
            if i >= n:
                return s
            hit = depth == 1 and i - start == name_n and memcmp(p + start, name, name_n) == 0
            i += 1
            while i < n and (p[i] == c' ' or p[i] == c'\t' or p[i] == c'\n' or p[i] == c'\r'):
                i += 1
            if not hit or i >= n or p[i] != c':':
                continue
            i += 1
            while i < n and (p[i] == c' ' or p[i] == c'\t' or p[i] == c'\n' or p[i] == c'\r'):
                i += 1
            start = i
            if i < n and p[i] == c'"':
                start = i + 1
                i += 1
                while i < n and p[i] != c'"':
                    i += 2 if p[i] == c'\\' else 1
            else:
                while i < n and p[i] != c',' and p[i] != c'}':
                    i += 1
            if i <= n:
                s.p = p + start
                s.n = i - start
            return s
        if p[i] == c'{' or p[i] == c'[':
            depth += 1
        elif p[i] == c'}' or p[i] == c']':
            depth -= 1
        i += 1
    return s


cdef inline Slice header_value(const Request *r, const char *name, uint32_t n) noexcept nogil:
    cdef uint32_t i
    cdef Slice none
    for i in range(r.n_headers):
        if r.headers[i].name.n == n and memcmp(r.headers[i].name.p, name, n) == 0:
            return r.headers[i].value
    none.p = NULL
    none.n = 0
    return none


cdef inline Slice cookie_value(Slice cookies, const char *name, uint32_t n) noexcept nogil:
    cdef uint32_t i = 0, start
    cdef Slice s
    s.p = NULL
    s.n = 0
    while i < cookies.n:
        while i < cookies.n and (cookies.p[i] == c' ' or cookies.p[i] == c';'):
            i += 1
        start = i
        while i < cookies.n and cookies.p[i] != c'=' and cookies.p[i] != c';':
            i += 1
        if i < cookies.n and cookies.p[i] == c'=' and i - start == n and memcmp(cookies.p + start, name, n) == 0:
            i += 1
            start = i
            while i < cookies.n and cookies.p[i] != c';':
                i += 1
            s.p = cookies.p + start
            s.n = i - start
            return s
        while i < cookies.n and cookies.p[i] != c';':
            i += 1
    return s


cdef inline uint64_t principal_of(const Request *r, const Policy *policy, const uint64_t *key,
                                  char *scratch) noexcept nogil:
    """Keyed hash of the first principal found in the policy's order, or 0. scratch: TOKEN_MAX bytes."""
    cdef uint32_t i, j, start, n
    cdef Slice v
    cdef const PrincipalSource *source
    for i in range(policy.n_principals):
        source = &policy.principal[i]
        if source.kind == PRINCIPAL_COOKIE:
            v = cookie_value(header_value(r, b"cookie", 6), source.name, source.name_n)
        else:
            v = header_value(r, source.name, source.name_n)
        if v.n == 0:
            continue
        if source.kind == PRINCIPAL_JWT:
            start = 7 if v.n > 7 and (v.p[0] | 32) == c'b' and v.p[6] == c' ' else 0
            while start < v.n and v.p[start] != c'.':
                start += 1
            start += 1
            j = start
            while j < v.n and v.p[j] != c'.':
                j += 1
            if start >= v.n or j >= v.n:
                continue                          # not a token of three parts
            n = base64_decode(v.p + start, j - start, scratch, TOKEN_MAX)
            v = json_member(scratch, n, source.claim, source.claim_n)
        elif source.kind == PRINCIPAL_BASIC:
            if v.n < 7 or (v.p[0] | 32) != c'b' or v.p[5] != c' ':
                continue
            n = base64_decode(v.p + 6, v.n - 6, scratch, TOKEN_MAX)
            j = 0
            while j < n and scratch[j] != c':':
                j += 1
            v.p = scratch
            v.n = j
        if v.n:
            return siphash24(v.p, v.n, key[0] ^ source.kind, key[1]) | 1
    return 0
