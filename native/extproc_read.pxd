"""Reading ProcessingRequests into the stream's state.

Nothing is trusted and nothing recurses: what is not needed is skipped by its length. Slices
of the request point into the message afterwards.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from native.base cimport Slice, slice_is
from native.extproc_pool cimport ExtProcHost, StreamState
from native.extproc_reply cimport IN_REQUEST_HEADERS, IN_RESPONSE_TRAILERS
from native.inspect cimport take_request_header
from native.pbwire cimport PB_BYTES, PB_VARINT, PbField, PbReader, pb_is, pb_next, pb_reader
from native.wording cimport is_ours

cdef enum Fault:
    STREAM_SEND = 0              # stream_message(): out is to be sent
    STREAM_SILENT = 1            # nothing is to be sent
    FAULT_MALFORMED = -1
    FAULT_TOO_LARGE = -2
    FAULT_EMPTY = -3
    FAULT_HEADERS_TWICE = -4
    FAULT_BODY_FIRST = -5
    FAULT_TRAILERS_FIRST = -6
    FAULT_AFTER_END = -7
    FAULT_RESPONSE_TWICE = -8
    FAULT_REQUEST_AFTER_RESPONSE = -9
    FAULT_NO_METHOD = -10
    FAULT_NO_PATH = -11
    FAULT_PSEUDO_TWICE = -12
    FAULT_DUPLEX = -13
    FAULT_NO_STATUS = -14
    FAULT_INTERNAL = -15
    FAULTS = 16

cdef extern from *:
    """
    static inline const char *or_fault_text(int fault) {
        static const char *const texts[16] = {
            "no fault",
            "malformed protobuf",
            "message too large",
            "message without a known part",
            "request headers twice",
            "request body before request headers",
            "request trailers before request headers",
            "request part after the end of the request",
            "response headers twice",
            "request part after the response headers",
            "no :method",
            "no :path",
            "a pseudo header twice",
            "full duplex body modes are not supported: use BUFFERED or STREAMED",
            "response without a valid :status",
            "internal error"};
        return fault <= 0 && fault > -16 ? texts[-fault] : "unknown fault"; }
    """
    const char *or_fault_text(int fault) noexcept nogil


cdef inline bint read_header(Slice entry, Slice *name, Slice *value) noexcept nogil:
    """A HeaderValue; its value is raw_value, or value where that is empty. False when malformed."""
    cdef PbReader r = pb_reader(entry.p, entry.n)
    cdef PbField f
    cdef Slice raw
    raw.p = NULL
    raw.n = 0
    name[0] = raw
    value[0] = raw
    while pb_next(&r, &f):
        if 1 <= f.number <= 3:
            if not pb_is(&r, &f, PB_BYTES):
                break
            if f.number == 1:
                name[0] = f.data
            elif f.number == 2:
                value[0] = f.data
            else:
                raw = f.data
    if raw.n:
        value[0] = raw
    return not r.malformed


cdef inline int status_number(Slice v) noexcept nogil:
    """100..999, or 0."""
    if v.n != 3 or not (49 <= v.p[0] <= 57 and 48 <= v.p[1] <= 57 and 48 <= v.p[2] <= 57):
        return 0
    return (v.p[0] - 48) * 100 + (v.p[1] - 48) * 10 + (v.p[2] - 48)


cdef inline bint read_header_map(StreamState *s, const ExtProcHost *host, Slice map_bytes,
                                 int *status) noexcept nogil:
    """A HeaderMap of the request, or, where status is not NULL, of the response. False: s.fault is set."""
    cdef PbReader r = pb_reader(map_bytes.p, map_bytes.n)
    cdef PbField f
    cdef Slice name, value
    while pb_next(&r, &f):
        if f.number != 1:
            continue
        if not pb_is(&r, &f, PB_BYTES):
            break
        if not read_header(f.data, &name, &value):
            r.malformed = 1
            break
        if status == NULL:
            if not take_request_header(s, host, name, value):
                s.fault = FAULT_PSEUDO_TWICE
                return False
        elif is_ours(name):
            s.has_foreign = 1
        elif slice_is(name, ":status", 7):
            status[0] = status_number(value)
    if r.malformed:
        s.fault = FAULT_MALFORMED
        return False
    return True


cdef inline bint read_http_headers(StreamState *s, const ExtProcHost *host, Slice part, int *status,
                                   bint *end) noexcept nogil:
    """HttpHeaders: the map and end_of_stream."""
    cdef PbReader r = pb_reader(part.p, part.n)
    cdef PbField f
    while pb_next(&r, &f):
        if f.number == 1:
            if not pb_is(&r, &f, PB_BYTES):
                break
            if not read_header_map(s, host, f.data, status):
                return False
        elif f.number == 3:
            if not pb_is(&r, &f, PB_VARINT):
                break
            end[0] = f.value != 0
    if r.malformed:
        s.fault = FAULT_MALFORMED
        return False
    return True


cdef inline bint read_http_body(StreamState *s, Slice part, Slice *body, bint *end) noexcept nogil:
    cdef PbReader r = pb_reader(part.p, part.n)
    cdef PbField f
    while pb_next(&r, &f):
        if f.number == 1:
            if not pb_is(&r, &f, PB_BYTES):
                break
            body[0] = f.data
        elif f.number == 2 or f.number == 3:
            if not pb_is(&r, &f, PB_VARINT):
                break
            if f.number == 2:
                end[0] = f.value != 0
            elif f.value:
                end[0] = True
    if r.malformed:
        s.fault = FAULT_MALFORMED
        return False
    return True


cdef inline bint read_value_address(StreamState *s, Slice struct_field) noexcept nogil:
    """Struct.fields entry {key, Value}: keeps a text value of source.address."""
    cdef PbReader r = pb_reader(struct_field.p, struct_field.n), v
    cdef PbField f, g
    cdef Slice text
    cdef bint wanted = False
    text.p = NULL
    text.n = 0
    while pb_next(&r, &f):
        if f.number == 1 and pb_is(&r, &f, PB_BYTES):
            wanted = slice_is(f.data, "source.address", 14)
        elif f.number == 2 and pb_is(&r, &f, PB_BYTES):
            v = pb_reader(f.data.p, f.data.n)
            while pb_next(&v, &g):
                if g.number == 3 and pb_is(&v, &g, PB_BYTES):
                    text = g.data
            if v.malformed:
                r.malformed = 1
    if wanted and text.n:
        s.attribute_address = text
    return not r.malformed


cdef inline bint read_attributes(StreamState *s, Slice entry) noexcept nogil:
    """ProcessingRequest.attributes entry: filter name -> Struct. Nested values are skipped by length."""
    cdef PbReader r = pb_reader(entry.p, entry.n), inner
    cdef PbField f, g
    while pb_next(&r, &f):
        if f.number != 2 or not pb_is(&r, &f, PB_BYTES):
            continue
        inner = pb_reader(f.data.p, f.data.n)
        while pb_next(&inner, &g):
            if g.number == 1 and pb_is(&inner, &g, PB_BYTES) and not read_value_address(s, g.data):
                inner.malformed = 1
        if inner.malformed:
            r.malformed = 1
    return not r.malformed


cdef inline bint read_config(StreamState *s, Slice part) noexcept nogil:
    """ProtocolConfiguration, in the first message of a stream."""
    cdef PbReader r = pb_reader(part.p, part.n)
    cdef PbField f
    while pb_next(&r, &f):
        if (f.number == 1 or f.number == 2) and pb_is(&r, &f, PB_VARINT):
            if f.number == 1:
                s.announced_body = <uint8_t>(f.value if f.value < 255 else 255)
            else:
                s.announced_response_body = <uint8_t>(f.value if f.value < 255 else 255)
    s.has_config = 1
    return not r.malformed


cdef struct Incoming:
    Slice message
    uint32_t part                # which member of the oneof, 0 none
    uint32_t start               # offset from which its occurrences are merged


cdef inline bint read_envelope(StreamState *s, Incoming *m) noexcept nogil:
    """Everything but the part itself. As protobuf has it: of different members of the oneof the
    last one counts, and a member that is repeated is merged."""
    cdef PbReader r = pb_reader(m.message.p, m.message.n)
    cdef PbField f
    cdef uint32_t at = 0
    m.part = 0
    m.start = 0
    while pb_next(&r, &f):
        if IN_REQUEST_HEADERS <= f.number <= IN_RESPONSE_TRAILERS:
            if not pb_is(&r, &f, PB_BYTES):
                break
            if f.number != m.part:
                m.part = f.number
                m.start = at
        elif f.number == 9 or f.number == 11:
            if not pb_is(&r, &f, PB_BYTES):
                break
            if not (read_attributes(s, f.data) if f.number == 9 else read_config(s, f.data)):
                r.malformed = 1
        elif f.number == 10:
            if not pb_is(&r, &f, PB_VARINT):
                break
            s.observing = f.value != 0
        at = <uint32_t>(<const char *>r.p - m.message.p)
    if r.malformed:
        s.fault = FAULT_MALFORMED
    elif m.part == 0:
        s.fault = FAULT_EMPTY
    elif s.announced_body > 3 or s.announced_response_body > 3:
        # there every body byte would have to be sent back by us
        s.fault = FAULT_DUPLEX
    return s.fault == 0
