"""Envoy's external processing protocol as a sans-I/O state machine: message in, message out.

One StreamState per gRPC stream, which is one HTTP request. The transport frames messages,
calls stream_message() for each and sends what it returns; stream_close() ends a stream
at any time. A stream goes

    START --headers--> [BODY --body, trailers-->] DECIDED --response headers--> RESPONSE
                                              \\-> REFUSED (everything after it is ignored)

and any message that does not fit is a fault: the transport ends the stream with a gRPC error,
so that the proxy's own failure mode applies. Nothing here ever turns a fault into a refusal.

Header and body slices point into the message while it lasts; they are copied into pooled
buffers only when the decision has to wait for (more of) the body.
"""
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from native.address cimport forwarded_add, forwarded_address, parse_address
from native.base cimport (ACTION_THROTTLE, BODY_NONE, BODY_PART, BODY_WHOLE, HEADERS_MAX, Header, Request, Slice, lower,
                          or_now_ns, or_unix_us, slice_is, slice_is_nocase)
from native.pbwire cimport (PB_BYTES, PB_VARINT, PbField, PbReader, PbWriter, pb_close, pb_is, pb_next, pb_put_bytes,
                            pb_put_uint, pb_reader, pb_writer, pb_written)
from native.replies cimport (IN_REQUEST_BODY, IN_REQUEST_HEADERS, IN_REQUEST_TRAILERS, IN_RESPONSE_BODY,
                             IN_RESPONSE_HEADERS, IN_RESPONSE_TRAILERS, OUT_REQUEST_BODY, OUT_REQUEST_HEADERS,
                             OUT_REQUEST_TRAILERS, OUT_RESPONSE_BODY, OUT_RESPONSE_HEADERS, OUT_RESPONSE_TRAILERS,
                             is_ours, put_all_removals, put_decision_headers, put_immediate, put_metadata,
                             put_mode_override)
from native.streams cimport (BODY_MODE_BUFFERED, BODY_MODE_BUFFERED_PARTIAL, BODY_MODE_NONE, OUT_BYTES, PHASE_BODY,
                             PHASE_DECIDED, PHASE_FAULT, PHASE_REFUSED, PHASE_RESPONSE, PHASE_START,
                             STREAM_BODY_BYTES_MAX, STREAM_HEADER_BYTES_MAX, STREAM_MESSAGE_BYTES_MAX, Answer,
                             BodyPlan, ExtProcHost, StreamPool, StreamState, buffer_give, buffer_size, buffer_take,
                             pool_close, pool_init, stream_free, stream_open, stream_release_buffers)

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


# ---- reading -----------------------------------------------------------------------------------------

cdef inline bint take_pseudo(StreamState *s, Slice value, Slice *field, uint8_t *seen) noexcept nogil:
    cdef uint32_t room = STREAM_HEADER_BYTES_MAX - s.header_bytes
    if seen[0]:
        s.fault = FAULT_PSEUDO_TWICE
        return False
    seen[0] = 1
    if value.n > room:
        value.n = room
        s.request.headers_dropped += 1
    s.header_bytes += value.n
    field[0] = value
    return True


cdef inline bint take_request_header(StreamState *s, const ExtProcHost *host, Slice name, Slice value) noexcept nogil:
    """One header into the request; False, and s.fault set, when it may not be there."""
    cdef Header *h
    if name.n == 0:
        s.request.headers_dropped += 1
        return True
    if name.p[0] == 58:
        if slice_is(name, ":method", 7):
            return take_pseudo(s, value, &s.request.method, &s.has_method)
        if slice_is(name, ":path", 5):
            return take_pseudo(s, value, &s.request.path, &s.has_path)
        if slice_is(name, ":authority", 10):
            return take_pseudo(s, value, &s.request.authority, &s.has_authority)
        if slice_is(name, ":scheme", 7):
            return take_pseudo(s, value, &s.request.scheme, &s.has_scheme)
        return True
    # what follows must not depend on room: padding would switch it off
    if is_ours(name):
        s.has_foreign = 1
    if host.address_header.n == 0:
        if slice_is_nocase(name, "x-forwarded-for", 15):
            forwarded_add(&s.forwarded, value)
    elif same_name(name, host.address_header):
        forwarded_add(&s.forwarded, value)
    if (name.n == 12 and slice_is_nocase(name, "content-type", 12) and value.n >= 16
            and starts_nocase(value, "application/grpc", 16)):
        s.is_grpc = 1
    if (s.request.n_headers >= HEADERS_MAX or name.n > STREAM_HEADER_BYTES_MAX or value.n > STREAM_HEADER_BYTES_MAX
            or s.header_bytes + name.n + value.n > STREAM_HEADER_BYTES_MAX):
        s.request.headers_dropped += 1
        return True
    h = &s.headers[s.request.n_headers]
    h.name = name
    h.value = value
    s.header_bytes += name.n + value.n
    s.request.n_headers += 1
    return True


cdef inline bint same_name(Slice a, Slice b) noexcept nogil:
    cdef uint32_t i
    if a.n != b.n:
        return False
    for i in range(a.n):
        if lower(<uint8_t>a.p[i]) != lower(<uint8_t>b.p[i]):
            return False
    return True


cdef inline bint starts_nocase(Slice s, const char *lit, uint32_t n) noexcept nogil:
    s.n = n if s.n > n else s.n
    return slice_is_nocase(s, lit, n)


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


cdef inline bint read_header_map(StreamState *s, const ExtProcHost *host, Slice map_bytes, int *status) noexcept nogil:
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


# ---- deciding ----------------------------------------------------------------------------------------

cdef inline void find_client(StreamState *s, const ExtProcHost *host) noexcept nogil:
    """The client's address: a header that the operator named, or hops to count, come first; with
    neither the proxy's own idea (attribute source.address) does, then X-Forwarded-For."""
    cdef bint named = host.address_header.n > 0 or host.trusted_hops > 0
    if host.trusted_hops == 0 and slice_is_nocase(host.address_header, "x-forwarded-for", 15):
        named = False
    if not named and s.attribute_address.n and parse_address(s.attribute_address, s.request.address):
        s.request.has_address = 1
    elif forwarded_address(&s.forwarded, host.trusted_hops, s.request.address):
        s.request.has_address = 1
    elif named and s.attribute_address.n and parse_address(s.attribute_address, s.request.address):
        s.request.has_address = 1
    else:
        memset(s.request.address, 0, 16)


cdef inline void move_slice(Slice *s, char **to) noexcept nogil:
    if s.n:
        memcpy(to[0], s.p, s.n)
    s.p = to[0]
    to[0] += s.n


cdef inline bint keep_headers(StreamPool *pool, StreamState *s) noexcept nogil:
    """Copies what the request's slices point to out of the message; False: no buffer left."""
    cdef Request *r = &s.request
    cdef uint32_t i
    cdef char *to
    # the query is part of path as counted, one byte ('?') less
    s.block = buffer_take(pool, s.header_bytes, &s.block_class)
    if s.block == NULL:
        pool.counts.no_buffer += 1
        return False
    to = s.block
    move_slice(&r.method, &to)
    move_slice(&r.path, &to)
    move_slice(&r.query, &to)
    move_slice(&r.authority, &to)
    move_slice(&r.scheme, &to)
    for i in range(r.n_headers):
        move_slice(&s.headers[i].name, &to)
        move_slice(&s.headers[i].value, &to)
    return True


cdef inline bint keep_body(StreamPool *pool, StreamState *s, Slice chunk) noexcept nogil:
    """Appends the chunk as far as the limit goes; False: the limit is passed, or no buffer left.

    The buffer doubles, so that a body in tiny chunks is copied twice at most on average.
    """
    cdef char *larger
    cdef int8_t larger_class
    cdef uint32_t n = chunk.n
    cdef bint fits = True
    if n > s.body_limit - s.body_n:
        n = s.body_limit - s.body_n
        fits = False
    if n == 0:
        return fits
    if s.body == NULL or s.body_n + n > buffer_size(s.body_class):
        larger = buffer_take(pool, s.body_n + n, &larger_class)
        if larger == NULL:
            pool.counts.no_buffer += 1
            # what fits into the buffer at hand is still read
            n = <uint32_t>buffer_size(s.body_class) - s.body_n if s.body != NULL else 0
            fits = False
        else:
            if s.body != NULL:
                memcpy(larger, s.body, s.body_n)
                buffer_give(pool, s.body, s.body_class)
            s.body = larger
            s.body_class = larger_class
    if n:
        memcpy(s.body + s.body_n, chunk.p, n)
        s.body_n += n
    return fits


cdef inline void decide(StreamPool *pool, StreamState *s, const ExtProcHost *host) noexcept nogil:
    """Asks the host, once; the request's slices are gone afterwards."""
    s.request.headers = s.headers
    if s.request.body_state == BODY_PART:
        pool.counts.bodies_cut += 1
    host.decide(host.ctx, &s.request, &s.decision)
    s.decided_ns = or_now_ns()
    s.decided = 1
    pool.counts.decisions += 1
    s.phase = PHASE_REFUSED if s.decision.enforced >= ACTION_THROTTLE and not s.observing else PHASE_DECIDED
    stream_release_buffers(pool, s)


cdef inline void decide_on_kept(StreamPool *pool, StreamState *s, const ExtProcHost *host,
                                uint8_t body_state) noexcept nogil:
    s.request.body.p = s.body
    s.request.body.n = s.body_n
    s.request.body_state = body_state if s.request.body_bytes or body_state == BODY_PART else BODY_NONE
    decide(pool, s, host)


# ---- writing -----------------------------------------------------------------------------------------

cdef inline int send(PbWriter *w, StreamState *s, Slice *out) noexcept nogil:
    if s.observing:
        return STREAM_SILENT
    if w.full:
        s.fault = FAULT_INTERNAL
        return FAULT_INTERNAL
    out.p = <const char *>w.p
    out.n = pb_written(w)
    return STREAM_SEND


cdef inline int refuse(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice *out) noexcept nogil:
    cdef PbWriter w = pb_writer(pool.out, OUT_BYTES)
    cdef Answer a
    memset(&a, 0, sizeof(Answer))
    host.answer(host.ctx, &s.decision, &a)
    pool.counts.refusals += 1
    put_metadata(&w, &s.decision)
    put_immediate(&w, &s.decision, &a, s.is_grpc)
    return send(&w, s, out)


cdef inline int proceed(StreamPool *pool, StreamState *s, Slice message, uint32_t part, bint decided_now,
                        Slice *out) noexcept nogil:
    """CONTINUE, in the answer that belongs to this part of the request."""
    cdef PbWriter w = pb_writer(pool.out, OUT_BYTES)
    cdef uint32_t common
    cdef bint headers = part == IN_REQUEST_HEADERS
    if decided_now:
        put_metadata(&w, &s.decision)
    if headers and s.phase == PHASE_BODY:
        put_mode_override(&w, s)
    common = pb_written(&w)
    if part != IN_REQUEST_TRAILERS:
        if headers and s.has_foreign:
            put_all_removals(&w, message, part, decided_now)
        if decided_now:
            put_decision_headers(&w, &s.decision)
        if pb_written(&w) != common:
            pb_close(&w, 2, common)
        # CommonResponse: status CONTINUE is 0
        pb_close(&w, 1, common)
    pb_close(&w, OUT_REQUEST_HEADERS if headers else OUT_REQUEST_BODY if part == IN_REQUEST_BODY
             else OUT_REQUEST_TRAILERS, common)
    return send(&w, s, out)


# ---- the machine -------------------------------------------------------------------------------------

cdef inline void split_path(Request *r) noexcept nogil:
    cdef const char *mark = NULL
    if r.path.n:
        mark = <const char *>memchr(r.path.p, 63, r.path.n)
    if mark != NULL:
        r.query.p = mark + 1
        r.query.n = <uint32_t>(r.path.p + r.path.n - mark - 1)
        r.path.n = <uint32_t>(mark - r.path.p)


cdef inline bint body_wanted(StreamState *s, const ExtProcHost *host) noexcept nogil:
    cdef BodyPlan plan
    memset(&plan, 0, sizeof(BodyPlan))
    host.plan(host.ctx, &s.request, &plan)
    if plan.mode == BODY_MODE_NONE or plan.mode > BODY_MODE_BUFFERED_PARTIAL:
        return False
    if plan.limit_bytes == 0 or plan.decide_now:
        return False
    # an observing stream cannot ask: only a body that comes anyway can be waited for
    if s.observing and s.announced_body == 0:
        return False
    s.plan_mode = plan.mode
    s.body_limit = plan.limit_bytes if plan.limit_bytes < STREAM_BODY_BYTES_MAX else STREAM_BODY_BYTES_MAX
    return True


cdef inline int on_request_headers(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                                   bint end, Slice *out) noexcept nogil:
    cdef Request *r = &s.request
    if not s.has_method or r.method.n == 0:
        return FAULT_NO_METHOD
    # a CONNECT of HTTP/1 and HTTP/2 names an authority only
    if (not s.has_path or r.path.n == 0) and not slice_is(r.method, "CONNECT", 7):
        return FAULT_NO_PATH
    split_path(r)
    r.headers = s.headers
    r.time_us = or_unix_us()
    pool.counts.headers_dropped += r.headers_dropped
    find_client(s, host)
    s.end_of_request = end
    if not end and body_wanted(s, host):
        if keep_headers(pool, s):
            s.phase = PHASE_BODY
            return proceed(pool, s, message, IN_REQUEST_HEADERS, False, out)
        r.body_state = BODY_PART
    decide(pool, s, host)
    if s.phase == PHASE_REFUSED:
        return refuse(pool, s, host, out)
    return proceed(pool, s, message, IN_REQUEST_HEADERS, True, out)


cdef inline int on_request_body(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                                Slice chunk, bint end, Slice *out) noexcept nogil:
    cdef bint was_waiting = s.phase == PHASE_BODY
    cdef bint whole, fits
    s.request.body_bytes += chunk.n
    s.end_of_request = end
    if was_waiting:
        # A buffered body comes in one message, without end_of_stream where trailers follow. Where the
        # proxy announced chunks it may not have taken our override: then only the end counts.
        whole = end or (s.plan_mode == BODY_MODE_BUFFERED and s.announced_body != 1)
        if s.body_n == 0 and (whole or chunk.n > s.body_limit or s.plan_mode == BODY_MODE_BUFFERED_PARTIAL):
            # nothing kept so far: no need to copy
            fits = chunk.n <= s.body_limit
            s.request.body.p = chunk.p
            s.request.body.n = chunk.n if fits else s.body_limit
            s.request.body_state = (BODY_PART if not (whole and fits) else BODY_WHOLE if chunk.n else BODY_NONE)
            decide(pool, s, host)
        else:
            fits = keep_body(pool, s, chunk)
            if whole or not fits:
                decide_on_kept(pool, s, host, BODY_WHOLE if fits else BODY_PART)
        if s.phase == PHASE_REFUSED:
            return refuse(pool, s, host, out)
    return proceed(pool, s, message, IN_REQUEST_BODY, was_waiting and s.phase == PHASE_DECIDED, out)


cdef inline int on_request_trailers(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                                    Slice *out) noexcept nogil:
    cdef bint was_waiting = s.phase == PHASE_BODY
    s.end_of_request = 1
    if was_waiting:
        decide_on_kept(pool, s, host, BODY_WHOLE)
        if s.phase == PHASE_REFUSED:
            return refuse(pool, s, host, out)
    return proceed(pool, s, message, IN_REQUEST_TRAILERS, was_waiting, out)


cdef inline int on_response_headers(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                                    int status, Slice *out) noexcept nogil:
    cdef PbWriter w = pb_writer(pool.out, OUT_BYTES)
    cdef bint late = s.phase == PHASE_BODY
    cdef uint32_t mark
    if status == 0:
        return FAULT_NO_STATUS
    if late:
        # answered before its body was here, or our override was not allowed
        pool.counts.late_decisions += 1
        decide_on_kept(pool, s, host, BODY_PART)
        if s.phase == PHASE_REFUSED:
            return refuse(pool, s, host, out)
    if s.decided:
        host.respond(host.ctx, &s.decision, status, 0 if late else (or_now_ns() - s.decided_ns) // 1000)
    s.phase = PHASE_RESPONSE
    if late:
        put_metadata(&w, &s.decision)
    mark = pb_written(&w)
    if s.has_foreign:
        put_all_removals(&w, message, IN_RESPONSE_HEADERS, False)
        pb_close(&w, 2, mark)
    pb_close(&w, 1, mark)
    pb_close(&w, OUT_RESPONSE_HEADERS, mark)
    return send(&w, s, out)


cdef inline int on_rest_of_response(StreamPool *pool, StreamState *s, uint32_t part, Slice *out) noexcept nogil:
    """Response bodies and trailers are none of our business."""
    cdef PbWriter w = pb_writer(pool.out, OUT_BYTES)
    if part == IN_RESPONSE_BODY:
        pb_close(&w, 1, 0)
        pb_close(&w, OUT_RESPONSE_BODY, 0)
    else:
        pb_close(&w, OUT_RESPONSE_TRAILERS, 0)
    return send(&w, s, out)


cdef inline int order_fault(const StreamState *s, uint32_t part) noexcept nogil:
    """0, or why this part may not come now."""
    if part == IN_REQUEST_HEADERS:
        return (0 if s.phase == PHASE_START else FAULT_REQUEST_AFTER_RESPONSE if s.phase == PHASE_RESPONSE
                else FAULT_HEADERS_TWICE)
    if part == IN_REQUEST_BODY or part == IN_REQUEST_TRAILERS:
        if s.phase == PHASE_START:
            return FAULT_BODY_FIRST if part == IN_REQUEST_BODY else FAULT_TRAILERS_FIRST
        if s.end_of_request:
            return FAULT_AFTER_END
        return 0
    if part == IN_RESPONSE_HEADERS and s.phase == PHASE_RESPONSE:
        return FAULT_RESPONSE_TWICE
    return 0


cdef inline int read_part(StreamPool *pool, StreamState *s, const ExtProcHost *host, const Incoming *m,
                          Slice *out) noexcept nogil:
    cdef PbReader r = pb_reader(m.message.p + m.start, m.message.n - m.start)
    cdef PbField f
    cdef Slice body
    cdef int status = 0
    cdef bint end = False, ok = True
    body.p = NULL
    body.n = 0
    if m.part == IN_RESPONSE_HEADERS:
        s.has_foreign = 0
    while ok and pb_next(&r, &f):
        if f.number != m.part:
            continue
        if m.part == IN_REQUEST_HEADERS:
            ok = read_http_headers(s, host, f.data, NULL, &end)
        elif m.part == IN_RESPONSE_HEADERS:
            ok = read_http_headers(s, host, f.data, &status, &end)
        elif m.part == IN_REQUEST_BODY:
            ok = read_http_body(s, f.data, &body, &end)
    if not ok:
        return s.fault
    if m.part == IN_REQUEST_HEADERS:
        return on_request_headers(pool, s, host, m.message, end, out)
    if m.part == IN_REQUEST_BODY:
        return on_request_body(pool, s, host, m.message, body, end, out)
    if m.part == IN_REQUEST_TRAILERS:
        return on_request_trailers(pool, s, host, m.message, out)
    if m.part == IN_RESPONSE_HEADERS:
        return on_response_headers(pool, s, host, m.message, status, out)
    return on_rest_of_response(pool, s, m.part, out)


cdef inline int stream_message(StreamPool *pool, StreamState *s, const ExtProcHost *host, const char *p, uint64_t n,
                               Slice *out) noexcept nogil:
    """One ProcessingRequest. STREAM_SEND: out is the ProcessingResponse, valid until the next call on
    any stream of the pool. STREAM_SILENT: nothing to send. Negative: a Fault, for good."""
    cdef Incoming m
    cdef int result
    pool.counts.messages += 1
    out.p = NULL
    out.n = 0
    if s.phase == PHASE_FAULT:
        return s.fault
    if s.phase == PHASE_REFUSED:
        return STREAM_SILENT
    m.message.p = p
    m.message.n = <uint32_t>n
    if n > STREAM_MESSAGE_BYTES_MAX:
        result = FAULT_TOO_LARGE
    elif not read_envelope(s, &m):
        result = s.fault
    else:
        result = order_fault(s, m.part)
        if result == 0:
            result = read_part(pool, s, host, &m, out)
    # it pointed into the message
    s.attribute_address.n = 0
    if result < 0:
        s.fault = result
        s.phase = PHASE_FAULT
        pool.counts.faults += 1
        stream_release_buffers(pool, s)
    return result


cdef inline void stream_close(StreamPool *pool, StreamState *s, const ExtProcHost *host) noexcept nogil:
    """Ends the stream. A request whose body never ended is decided on what came of it, so that
    the client's windows know of it; nobody is answered."""
    if s.phase == PHASE_BODY:
        decide_on_kept(pool, s, host, BODY_PART)
    stream_free(pool, s)
