"""The protobuf wire format, read and written over pointer + length.

Reader: constant depth (nothing here descends into a message by itself, so nesting costs
no stack), every length checked against what is left. Malformed: a varint of more than
ten bytes or 64 bits, a truncated field, a length beyond the end, field number 0, a tag
of more than 32 bits, and groups (wire types 3 and 4), which no message read here uses.

Writer: fills its buffer from the end towards the start, so that the length of a nested
message is known when it is to be written and every varint is minimal. Fields are
therefore written last to first. A writer that runs out of room sets `full` and ignores
what follows; nothing is ever written outside the buffer.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, strlen

from native.base cimport Slice

cdef enum:
    PB_VARINT = 0
    PB_FIXED64 = 1
    PB_BYTES = 2
    PB_FIXED32 = 5


cdef struct PbReader:
    const uint8_t *p
    const uint8_t *end
    uint8_t malformed            # set once, never cleared: what was read before it stands


cdef struct PbField:
    uint32_t number
    uint8_t wire                 # PB_VARINT, PB_FIXED64, PB_BYTES or PB_FIXED32
    uint64_t value               # of the three numeric wire types
    Slice data                   # of PB_BYTES; points into the message


cdef struct PbWriter:
    uint8_t *start
    uint8_t *p                   # first byte written so far
    uint8_t *end
    uint8_t full


cdef inline PbReader pb_reader(const char *p, uint32_t n) noexcept nogil:
    cdef PbReader r
    r.p = <const uint8_t *>p
    # NULL + 0 is the one sum with NULL that C allows, but the sanitizers' authors disagree
    r.end = r.p if n == 0 else r.p + n
    r.malformed = 0
    return r


cdef inline bint pb_varint(PbReader *r, uint64_t *out) noexcept nogil:
    """One varint; False, and r.malformed set, when truncated or beyond 64 bits."""
    cdef uint64_t v = 0
    cdef uint8_t b
    cdef int shift = 0
    while r.p < r.end:
        b = r.p[0]
        r.p += 1
        if shift == 63 and b > 1:
            break
        v |= <uint64_t>(b & 0x7f) << shift
        if b < 0x80:
            out[0] = v
            return True
        shift += 7
    r.malformed = 1
    return False


cdef inline bint pb_next(PbReader *r, PbField *f) noexcept nogil:
    """The next field; False at the end of the message or where it is malformed (see r.malformed)."""
    cdef uint64_t tag, n
    if r.malformed or r.p >= r.end:
        return False
    if not pb_varint(r, &tag):
        return False
    f.number = <uint32_t>(tag >> 3)
    f.wire = <uint8_t>(tag & 7)
    f.value = 0
    f.data.p = NULL
    f.data.n = 0
    if tag > 0xffffffffu or f.number == 0:
        r.malformed = 1
        return False
    if f.wire == PB_BYTES:
        if not pb_varint(r, &n):
            return False
        if n > <uint64_t>(r.end - r.p):
            r.malformed = 1
            return False
        f.data.p = <const char *>r.p
        f.data.n = <uint32_t>n
        r.p += n
        return True
    if f.wire == PB_VARINT:
        return pb_varint(r, &f.value)
    n = 8 if f.wire == PB_FIXED64 else 4 if f.wire == PB_FIXED32 else 0
    if n == 0 or n > <uint64_t>(r.end - r.p):
        r.malformed = 1
        return False
    memcpy(&f.value, r.p, n)
    r.p += n
    return True


cdef inline bint pb_is(PbReader *r, const PbField *f, uint8_t wire) noexcept nogil:
    """A known field must have its wire type; with another one the message is malformed."""
    if f.wire == wire:
        return True
    r.malformed = 1
    return False


cdef inline PbWriter pb_writer(char *p, uint32_t n) noexcept nogil:
    cdef PbWriter w
    w.start = <uint8_t *>p
    w.end = w.start + n
    w.p = w.end
    w.full = 0
    return w


cdef inline uint32_t pb_written(const PbWriter *w) noexcept nogil:
    """Bytes written; as a mark, it is what pb_close() takes."""
    return <uint32_t>(w.end - w.p)


cdef inline void pb_put_raw(PbWriter *w, const char *p, uint32_t n) noexcept nogil:
    if w.full or n > <uint64_t>(w.p - w.start):
        w.full = 1
        return
    w.p -= n
    if n:
        memcpy(w.p, p, n)


cdef inline void pb_put_varint(PbWriter *w, uint64_t v) noexcept nogil:
    cdef char b[10]
    cdef uint32_t n = 0
    while v >= 0x80:
        b[n] = <char>((v & 0x7f) | 0x80)
        v >>= 7
        n += 1
    b[n] = <char>v
    pb_put_raw(w, b, n + 1)


cdef inline void pb_put_uint(PbWriter *w, uint32_t number, uint64_t v) noexcept nogil:
    pb_put_varint(w, v)
    pb_put_varint(w, <uint64_t>number << 3 | PB_VARINT)


cdef inline void pb_put_double(PbWriter *w, uint32_t number, double v) noexcept nogil:
    pb_put_raw(w, <const char *>&v, 8)
    pb_put_varint(w, <uint64_t>number << 3 | PB_FIXED64)


cdef inline void pb_put_bytes(PbWriter *w, uint32_t number, const char *p, uint32_t n) noexcept nogil:
    pb_put_raw(w, p, n)
    pb_put_varint(w, n)
    pb_put_varint(w, <uint64_t>number << 3 | PB_BYTES)


cdef inline void pb_put_text(PbWriter *w, uint32_t number, const char *text) noexcept nogil:
    """A NUL-terminated constant of ours."""
    pb_put_bytes(w, number, text, <uint32_t>strlen(text))


cdef inline void pb_close(PbWriter *w, uint32_t number, uint32_t mark) noexcept nogil:
    """Makes what was written since the mark the message in field `number`."""
    pb_put_varint(w, pb_written(w) - mark)
    pb_put_varint(w, <uint64_t>number << 3 | PB_BYTES)
