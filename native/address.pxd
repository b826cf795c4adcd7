"""Client addresses: text to 16 bytes, and which hop of a forwarded-for list to believe."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from native.base cimport Slice, lower

cdef enum:
    ADDRESS_TEXT_MAX = 128       # longer text is no address (the longest with a port and zone has about 70)
    FORWARDED_MAX = 8            # address headers looked at, counted from the last one


cdef inline bint is_blank(char c) noexcept nogil:
    return c == 32 or c == 9


cdef inline Slice trimmed(Slice s) noexcept nogil:
    """Without the spaces and tabs around it."""
    while s.n and is_blank(s.p[0]):
        s.p += 1
        s.n -= 1
    while s.n and is_blank(s.p[s.n - 1]):
        s.n -= 1
    return s


cdef inline bint parse_ipv4(Slice s, uint8_t *out) noexcept nogil:
    """Dotted quad of decimal numbers into out[4]; leading zeros are refused: some read them as octal."""
    cdef uint32_t i = 0, part, digits, value
    for part in range(4):
        if part:
            if i >= s.n or s.p[i] != 46:
                return False
            i += 1
        digits = 0
        value = 0
        while i < s.n and 48 <= s.p[i] <= 57:
            if digits == 3 or (digits == 1 and value == 0):
                return False
            value = value * 10 + <uint32_t>(s.p[i] - 48)
            digits += 1
            i += 1
        if digits == 0 or value > 255:
            return False
        out[part] = <uint8_t>value
    return i == s.n


cdef inline int hex_digit(char c) noexcept nogil:
    cdef uint8_t b = lower(<uint8_t>c)
    if 48 <= b <= 57:
        return b - 48
    if 97 <= b <= 102:
        return b - 87
    return -1


cdef inline bint parse_ipv6(Slice s, uint8_t *out) noexcept nogil:
    """RFC 4291 text, the last 32 bits also as a dotted quad, into out[16]; no zone, no brackets."""
    cdef uint8_t raw[16]
    cdef uint32_t i = 0, start, n = 0, digits, value
    cdef int gap = -1, d
    cdef Slice tail
    memset(raw, 0, 16)
    if s.n >= 2 and s.p[0] == 58 and s.p[1] == 58:
        gap = 0
        i = 2
    while i < s.n:
        if n == 16:
            return False
        start = i
        digits = 0
        value = 0
        while i < s.n:
            d = hex_digit(s.p[i])
            if d < 0:
                break
            if digits == 4:
                return False
            value = value << 4 | <uint32_t>d
            digits += 1
            i += 1
        if i < s.n and s.p[i] == 46:
            if n > 12:
                return False
            tail.p = s.p + start
            tail.n = s.n - start
            if not parse_ipv4(tail, raw + n):
                return False
            n += 4
            i = s.n
            break
        if digits == 0:
            return False
        raw[n] = <uint8_t>(value >> 8)
        raw[n + 1] = <uint8_t>(value & 0xff)
        n += 2
        if i == s.n:
            break
        if s.p[i] != 58:
            return False
        i += 1
        if i == s.n:
            return False
        if s.p[i] == 58:
            if gap >= 0:
                return False
            gap = <int>n
            i += 1
    if gap < 0:
        if n != 16:
            return False
        memcpy(out, raw, 16)
        return True
    # "::" stands for at least one group of zeros
    if n > 14:
        return False
    memset(out, 0, 16)
    memcpy(out, raw, <size_t>gap)
    memcpy(out + 16 - (n - <uint32_t>gap), raw + gap, n - <uint32_t>gap)
    return True


cdef inline bint port_or_nothing(Slice s) noexcept nogil:
    """Empty, or ":" and one to five digits."""
    cdef uint32_t i
    if s.n == 0:
        return True
    if s.n < 2 or s.n > 6 or s.p[0] != 58:
        return False
    for i in range(1, s.n):
        if not 48 <= s.p[i] <= 57:
            return False
    return True


cdef inline bint parse_address(Slice s, uint8_t *out) noexcept nogil:
    """An IP address as proxies write it into out[16] (IPv4 mapped into ::ffff:0:0/96).

    Accepted: 192.0.2.1, 192.0.2.1:80, 2001:db8::1, [2001:db8::1], [2001:db8::1]:80, each also
    with a zone (%eth0, dropped), in double quotes, or with blanks around it. False for
    anything else; out is then undefined.
    """
    cdef uint32_t i, colons = 0
    cdef Slice rest
    s = trimmed(s)
    if s.n >= 2 and s.p[0] == 34 and s.p[s.n - 1] == 34:
        s.p += 1
        s.n -= 2
    if s.n < 2 or s.n > ADDRESS_TEXT_MAX:
        return False
    rest.p = s.p
    rest.n = 0
    if s.p[0] == 91:
        i = 1
        while i < s.n and s.p[i] != 93:
            i += 1
        if i == s.n:
            return False
        rest.p = s.p + i + 1
        rest.n = s.n - i - 1
        s.p += 1
        s.n = i - 1
        if not port_or_nothing(rest):
            return False
        colons = 2
    else:
        for i in range(s.n):
            if s.p[i] == 58:
                colons += 1
    if colons < 2:
        for i in range(s.n):
            if s.p[i] == 58:
                rest.p = s.p + i
                rest.n = s.n - i
                s.n = i
                break
        if not port_or_nothing(rest):
            return False
        memset(out, 0, 10)
        out[10] = 255
        out[11] = 255
        return parse_ipv4(s, out + 12)
    for i in range(s.n):
        if s.p[i] == 37:
            if i + 1 == s.n:
                return False
            s.n = i
            break
    return parse_ipv6(s, out)


cdef struct Forwarded:
    # the last FORWARDED_MAX headers of that name, a ring
    Slice value[8]
    uint32_t n                   # seen in all


cdef inline void forwarded_add(Forwarded *f, Slice value) noexcept nogil:
    f.value[f.n % FORWARDED_MAX] = value
    f.n += 1


cdef inline bint forwarded_address(const Forwarded *f, uint16_t trusted_hops, uint8_t *out) noexcept nogil:
    """The address that `trusted_hops` proxies of ours vouch for.

    Every proxy appends the address it was called from, so the right-most element was written
    by the nearest one. trusted_hops = 0 takes that element; each further trusted proxy
    moves one element to the left. A list that is too short gives its left-most element: the
    request came past some of the proxies, and this is still the earliest that one of ours
    wrote. False when there is no list or the chosen element is no address: what stands
    left of it was written by the client and is never used in its place.
    """
    cdef uint32_t k, left = trusted_hops, seen = 0
    cdef uint32_t have = f.n if f.n < FORWARDED_MAX else FORWARDED_MAX
    cdef Slice s, element
    cdef Slice chosen
    chosen.p = NULL
    chosen.n = 0
    for k in range(have):
        s = f.value[(f.n - 1 - k) % FORWARDED_MAX]
        while True:
            # the element after the last comma
            element.p = s.p + s.n
            element.n = 0
            while s.n and s.p[s.n - 1] != 44:
                s.n -= 1
                element.p -= 1
                element.n += 1
            element = trimmed(element)
            if element.n:
                chosen = element
                seen += 1
                if left == 0:
                    return parse_address(chosen, out)
                left -= 1
            if s.n == 0:
                break
            s.n -= 1
    return seen > 0 and parse_address(chosen, out)
