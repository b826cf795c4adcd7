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
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from native.base cimport BODY_PART, BODY_WHOLE, Request, Slice, or_now_ns, or_unix_us, slice_is
from native.extproc_pool cimport (BODY_MODE_STREAMED, OUT_BYTES, PHASE_BODY, PHASE_DECIDED, PHASE_FAULT, PHASE_REFUSED,
                                  PHASE_RESPONSE, PHASE_START, STREAM_MESSAGE_BYTES_MAX, Answer, ExtProcHost,
                                  StreamPool, StreamState, stream_free, stream_release_buffers)
from native.extproc_read cimport (FAULT_AFTER_END, FAULT_BODY_FIRST, FAULT_HEADERS_TWICE, FAULT_INTERNAL,
                                  FAULT_NO_METHOD, FAULT_NO_PATH, FAULT_NO_STATUS,
                                  FAULT_REQUEST_AFTER_RESPONSE, FAULT_RESPONSE_TWICE, FAULT_TOO_LARGE,
                                  FAULT_TRAILERS_FIRST, STREAM_SEND, STREAM_SILENT, Incoming, read_envelope,
                                  read_http_body, read_http_headers)
from native.extproc_reply cimport (IN_REQUEST_BODY, IN_REQUEST_HEADERS, IN_REQUEST_TRAILERS, IN_RESPONSE_BODY,
                                   IN_RESPONSE_HEADERS, OUT_REQUEST_BODY, OUT_REQUEST_HEADERS,
                                   OUT_REQUEST_TRAILERS, OUT_RESPONSE_BODY, OUT_RESPONSE_HEADERS,
                                   OUT_RESPONSE_TRAILERS, put_all_removals, put_decision_headers,
                                   put_immediate, put_metadata, put_mode_override)
from native.inspect cimport (body_wanted, decide, decide_on_kept, find_client, keep_headers, split_path, take_body,
                             told)
from native.pbwire cimport PbField, PbReader, PbWriter, pb_close, pb_next, pb_reader, pb_writer, pb_written


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
    if told(host.tell_proxy, &s.decision):
        put_metadata(&w, &s.decision, host.route_name(host.ctx, &s.decision))
    put_immediate(&w, &s.decision, &a, s.is_grpc)
    return send(&w, s, out)


cdef inline int proceed(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                        uint32_t part, bint decided_now, Slice *out) noexcept nogil:
    """CONTINUE, in the answer that belongs to this part of the request."""
    cdef PbWriter w = pb_writer(pool.out, OUT_BYTES)
    cdef uint32_t common
    cdef bint headers = part == IN_REQUEST_HEADERS
    cdef bint tell = decided_now and told(host.tell_upstream, &s.decision)
    if decided_now and told(host.tell_proxy, &s.decision):
        put_metadata(&w, &s.decision, host.route_name(host.ctx, &s.decision))
    if headers and s.phase == PHASE_BODY:
        put_mode_override(&w, s)
    common = pb_written(&w)
    if part != IN_REQUEST_TRAILERS:
        if headers and s.has_foreign:
            put_all_removals(&w, message, part, tell)
        if tell:
            put_decision_headers(&w, &s.decision)
        if pb_written(&w) != common:
            pb_close(&w, 2, common)
        # CommonResponse: status CONTINUE is 0
        pb_close(&w, 1, common)
    pb_close(&w, OUT_REQUEST_HEADERS if headers else OUT_REQUEST_BODY if part == IN_REQUEST_BODY
             else OUT_REQUEST_TRAILERS, common)
    return send(&w, s, out)


# ---- the machine -------------------------------------------------------------------------------------

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
            return proceed(pool, s, host, message, IN_REQUEST_HEADERS, False, out)
        r.body_state = BODY_PART
    decide(pool, s, host)
    if s.phase == PHASE_REFUSED:
        return refuse(pool, s, host, out)
    return proceed(pool, s, host, message, IN_REQUEST_HEADERS, True, out)


cdef inline int on_request_body(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                                Slice chunk, bint end, Slice *out) noexcept nogil:
    cdef bint was_waiting = s.phase == PHASE_BODY
    s.request.body_bytes += chunk.n
    s.end_of_request = end
    if was_waiting:
        # A buffered body comes in one message, without end_of_stream where trailers follow. Where the
        # proxy announced chunks it may not have taken our override: then only the end counts.
        take_body(pool, s, host, chunk, end, s.plan_mode != BODY_MODE_STREAMED and s.announced_body != 1)
        if s.phase == PHASE_REFUSED:
            return refuse(pool, s, host, out)
    return proceed(pool, s, host, message, IN_REQUEST_BODY, was_waiting and s.phase == PHASE_DECIDED, out)


cdef inline int on_request_trailers(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice message,
                                    Slice *out) noexcept nogil:
    cdef bint was_waiting = s.phase == PHASE_BODY
    s.end_of_request = 1
    if was_waiting:
        decide_on_kept(pool, s, host, BODY_WHOLE)
        if s.phase == PHASE_REFUSED:
            return refuse(pool, s, host, out)
    return proceed(pool, s, host, message, IN_REQUEST_TRAILERS, was_waiting, out)


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
    if late and told(host.tell_proxy, &s.decision):
        put_metadata(&w, &s.decision, host.route_name(host.ctx, &s.decision))
    mark = pb_written(&w)
    if s.has_foreign:
        put_all_removals(&w, message, IN_RESPONSE_HEADERS, False)
        pb_close(&w, 2, mark)
    pb_close(&w, 1, mark)
    pb_close(&w, OUT_RESPONSE_HEADERS, mark)
    return send(&w, s, out)


cdef inline int on_rest_of_response(StreamPool *pool, StreamState *s, uint32_t part,
                                    Slice *out) noexcept nogil:
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


cdef inline int stream_message(StreamPool *pool, StreamState *s, const ExtProcHost *host, const char *p,
                               uint64_t n,
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


cdef inline int stream_expire(StreamPool *pool, StreamState *s, const ExtProcHost *host,
                              Slice *out) noexcept nogil:
    """The transport will wait no longer. A request still waiting for its body is decided on what came
    of it; STREAM_SEND: it is refused, out is what to send. Otherwise the transport just ends the stream
    well, and the proxy goes on without us: an error here would let slow clients choose how we fail."""
    out.p = NULL
    out.n = 0
    if s.phase != PHASE_BODY:
        return STREAM_SILENT
    decide_on_kept(pool, s, host, BODY_PART)
    return refuse(pool, s, host, out) if s.phase == PHASE_REFUSED else STREAM_SILENT


cdef inline void stream_close(StreamPool *pool, StreamState *s, const ExtProcHost *host) noexcept nogil:
    """Ends the stream. A request whose body never ended is decided on what came of it, so that
    the client's windows know of it; nobody is answered."""
    if s.phase == PHASE_BODY:
        decide_on_kept(pool, s, host, BODY_PART)
    stream_free(pool, s)
