"""gRPC over one HTTP/2 connection, without any I/O: what comes in.

libnghttp2 calls the functions at the end of this file; they find out what a stream wants, put
its messages together again and hand them to the ext_proc machine, or answer about health.
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy, strlen

from native.base cimport Slice, or_add64, or_load64
from native.extproc cimport stream_expire, stream_message
from native.extproc_pool cimport stream_open
from native.extproc_read cimport FAULT_INTERNAL, FAULT_TOO_LARGE, STREAM_SEND, or_fault_text
from native.nghttp2 cimport *
from native.pbwire cimport PB_BYTES, PbField, PbReader, pb_next, pb_reader
from native.rpc cimport *

# ---- health ------------------------------------------------------------------------------------------

cdef extern from *:
    """
    #define OR_SERVICE "envoy.service.ext_proc.v3.ExternalProcessor"
    static const char or_service[] = OR_SERVICE;
    static const char or_path_process[] = "/" OR_SERVICE "/Process";
    static const char or_path_check[] = "/grpc.health.v1.Health/Check";
    static const char or_path_watch[] = "/grpc.health.v1.Health/Watch";
    /* HealthCheckResponse: status SERVING, NOT_SERVING, SERVICE_UNKNOWN */
    static const char or_health[4][2] = {{8, 0}, {8, 1}, {8, 2}, {8, 3}};
    """
    const char *or_service
    const char *or_path_process
    const char *or_path_check
    const char *or_path_watch
    const char or_health[4][2]


cdef enum:
    HEALTH_SERVING = 1
    HEALTH_NOT_SERVING = 2
    HEALTH_UNKNOWN = 3


cdef inline void tell_health(Rpc *r, int status) noexcept nogil:
    cdef Slice m
    if r.told == status + 1:
        return
    r.told = <uint8_t>(status + 1)
    m.p = or_health[status]
    m.n = 2
    send_message(r, m)


cdef inline int health_now(Thread *t) noexcept nogil:
    return HEALTH_SERVING if or_load64(&t.shared.serving) else HEALTH_NOT_SERVING


cdef inline void on_health(Rpc *r, const char *p, uint32_t n) noexcept nogil:
    cdef Thread *t = r.conn.thread
    cdef PbReader reader = pb_reader(p, n)
    cdef PbField f
    cdef Slice name
    cdef bint known
    name.p = NULL
    name.n = 0
    while pb_next(&reader, &f):
        if f.number == 1 and f.wire == PB_BYTES:
            name = f.data
    if reader.malformed:
        t.counts.protocol_errors += 1
        finish(r, GRPC_INVALID_ARGUMENT, "malformed protobuf")
        return
    # the empty name is the server as a whole
    known = name.n == 0 or (name.n == strlen(or_service) and memcmp(name.p, or_service, name.n) == 0)
    if r.wants == WANTS_CHECK:
        if known:
            tell_health(r, health_now(t))
            finish(r, GRPC_OK, NULL)
        else:
            finish(r, GRPC_NOT_FOUND, "unknown service")
    elif r.watching:
        finish(r, GRPC_INVALID_ARGUMENT, "one message too many")
    elif or_load64(&t.shared.phase) != PHASE_RUNNING:
        finish(r, GRPC_UNAVAILABLE, "shutting down")
    elif or_add64(&t.shared.watchers, 1) >= WATCHERS_MAX:
        or_add64(&t.shared.watchers, <uint64_t>-1)
        finish(r, GRPC_RESOURCE_EXHAUSTED, "too many watchers")
    else:
        r.watching = 1
        # an unknown service may come to be known elsewhere: not here, but the watch stays open as the protocol asks
        tell_health(r, health_now(t) if known else HEALTH_UNKNOWN)


# ---- receiving ---------------------------------------------------------------------------------------

cdef inline void on_message(Rpc *r, const char *p, uint32_t n) noexcept nogil:
    cdef Thread *t = r.conn.thread
    cdef Slice out
    cdef int result
    hear(t, r)
    t.counts.messages += 1
    if r.wants != WANTS_PROCESS:
        on_health(r, p, n)
        return
    t.host.refresh(t.host)                        # a new policy may have come with the last decision
    result = stream_message(&t.pool, r.state, t.host, p, n, &out)
    if result == STREAM_SEND:
        send_message(r, out)
    elif result < 0:
        # an error and never a refusal: the proxy's own failure mode decides
        if result == FAULT_INTERNAL:
            t.counts.internal_errors += 1
            finish(r, GRPC_INTERNAL, or_fault_text(result))
        else:
            t.counts.protocol_errors += 1
            finish(r, GRPC_RESOURCE_EXHAUSTED if result == FAULT_TOO_LARGE else GRPC_INVALID_ARGUMENT,
                   or_fault_text(result))


cdef inline bint keep_part(Thread *t, Rpc *r, const char *p, uint32_t n) noexcept nogil:
    """Appends to the unfinished message. Its buffer grows with what is here, not with what is announced."""
    cdef uint64_t cap = r.message_cap
    cdef uint64_t wanted = <uint64_t>r.message_n + n
    cdef char *larger
    if wanted > cap:
        cap = cap * 2 if cap else 4096
        while cap < wanted:
            cap *= 2
        if cap > r.need:
            cap = r.need
        if t.memory_bytes + cap - r.message_cap > t.limits.memory_bytes:
            return False
        larger = <char *>realloc(r.message, cap)
        if larger == NULL:
            return False
        t.memory_bytes += cap - r.message_cap
        r.message = larger
        r.message_cap = <uint32_t>cap
    if n == 0:
        return True                               # only the prefix is here yet
    memcpy(r.message + r.message_n, p, n)
    r.message_n += n
    return True


cdef inline void take_message(Rpc *r) noexcept nogil:
    """The message put together of parts; its buffer is given back, most streams need it once."""
    cdef Thread *t = r.conn.thread
    cdef char *message = r.message
    cdef uint32_t cap = r.message_cap
    r.message = NULL
    r.message_cap = 0
    on_message(r, message, r.message_n)
    r.message_n = 0
    free(message)
    t.memory_bytes -= cap


cdef inline void on_bytes(Rpc *r, const char *p, size_t n) noexcept nogil:
    """Message bytes: each message is a flag, four bytes of length, and its bytes, cut anyhow."""
    cdef Thread *t = r.conn.thread
    cdef uint32_t take
    while n and not r.ended:
        if r.prefix_n < 5:
            take = 5 - r.prefix_n
            if take > n:
                take = <uint32_t>n
            memcpy(r.prefix + r.prefix_n, p, take)
            r.prefix_n += <uint8_t>take
            p += take
            n -= take
            if r.prefix_n < 5:
                return
            r.need = (<uint32_t>r.prefix[1] << 24 | <uint32_t>r.prefix[2] << 16 | <uint32_t>r.prefix[3] << 8
                      | r.prefix[4])
            r.message_n = 0
            if r.prefix[0] != 0:
                t.counts.protocol_errors += 1
                finish(r, GRPC_UNIMPLEMENTED, "compressed messages are not supported")
                return
            if r.need > t.limits.message_bytes:
                t.counts.protocol_errors += 1
                finish(r, GRPC_RESOURCE_EXHAUSTED, "message too large")
                return
        if r.message_n == 0 and n >= r.need:
            # whole in what was read: no need to copy
            take = r.need
            r.prefix_n = 0
            on_message(r, p, take)
        else:
            take = r.need - r.message_n
            if take > n:
                take = <uint32_t>n
            if not keep_part(t, r, p, take):
                t.counts.streams_refused += 1
                finish(r, GRPC_RESOURCE_EXHAUSTED, "out of memory for messages")
                return
            if r.message_n == r.need:
                r.prefix_n = 0
                take_message(r)
        p += take
        n -= take


cdef inline void on_half_closed(Rpc *r) noexcept nogil:
    """The peer will say no more."""
    cdef Thread *t = r.conn.thread
    r.half_closed = 1
    if r.ended or r.watching:
        return                                    # a watcher listens on
    if r.prefix_n:
        t.counts.protocol_errors += 1
        finish(r, GRPC_INVALID_ARGUMENT, "the stream ended within a message")
    elif r.wants != WANTS_PROCESS:
        t.counts.protocol_errors += 1
        finish(r, GRPC_INVALID_ARGUMENT, "no message")
    else:
        finish(r, GRPC_OK, NULL)


cdef inline void on_request(Rpc *r) noexcept nogil:
    """All headers are here: what does the stream want, and may it?"""
    cdef Thread *t = r.conn.thread
    if r.header_bytes > t.limits.header_bytes:
        t.counts.protocol_errors += 1
        finish(r, GRPC_RESOURCE_EXHAUSTED, "request headers too large")
    elif r.bad_method or not r.is_grpc:
        t.counts.protocol_errors += 1
        finish(r, GRPC_UNIMPLEMENTED, "not a gRPC request: POST and content-type application/grpc are expected")
    elif r.wants == WANTS_UNKNOWN:
        finish(r, GRPC_UNIMPLEMENTED, "unknown method")
    elif r.wants == WANTS_PROCESS:
        if or_add64(&t.shared.streams, 1) >= t.limits.streams:
            or_add64(&t.shared.streams, <uint64_t>-1)
            t.counts.streams_refused += 1
            finish(r, GRPC_RESOURCE_EXHAUSTED, "too many streams")
            return
        r.admitted = 1
        r.state = stream_open(&t.pool)
        if r.state == NULL:
            t.counts.streams_refused += 1
            finish(r, GRPC_RESOURCE_EXHAUSTED, "too many streams")
            return
        t.counts.streams_opened += 1


cdef inline void expire(Rpc *r) noexcept nogil:
    """Nothing came for too long, or we are going: decided on what is known, without an error."""
    cdef Thread *t = r.conn.thread
    cdef Slice out
    if r.ended:
        drop(r)                                   # has long been answered, and doesn't read it
        return
    if r.state == NULL:
        finish(r, GRPC_UNAVAILABLE, "shutting down" if r.watching else "nothing came for too long")
        return
    if stream_expire(&t.pool, r.state, t.host, &out) == STREAM_SEND:
        send_message(r, out)
    finish(r, GRPC_OK, NULL)


# ---- what the library calls --------------------------------------------------------------------------

cdef inline int begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *conn) noexcept nogil:
    cdef Thread *t = (<Conn *>conn).thread
    cdef Rpc *r
    if frame.hd.type != NGHTTP2_HEADERS or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        return 0
    if or_add64(&t.shared.rpcs, 1) >= <uint64_t>t.limits.streams + STREAMS_BESIDE:
        or_add64(&t.shared.rpcs, <uint64_t>-1)
        t.counts.streams_refused += 1
        nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame.hd.stream_id, NGHTTP2_REFUSED_STREAM)
        return 0
    r = rpc_open(<Conn *>conn, frame.hd.stream_id)
    if r == NULL:
        or_add64(&t.shared.rpcs, <uint64_t>-1)
    if r == NULL or nghttp2_session_set_stream_user_data(session, frame.hd.stream_id, r) != 0:
        if r != NULL:
            rpc_free(r)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
    return 0


cdef inline bint starts(const uint8_t *p, size_t n, const char *text) noexcept nogil:
    cdef size_t k = strlen(text)
    return n >= k and memcmp(p, text, k) == 0


cdef inline bint equal(const uint8_t *p, size_t n, const char *text) noexcept nogil:
    return n == strlen(text) and memcmp(p, text, n) == 0


cdef inline int take_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_n,
                            const uint8_t *value, size_t n, uint8_t flags, void *conn) noexcept nogil:
    cdef Rpc *r
    if frame.hd.type != NGHTTP2_HEADERS or frame.headers.cat != NGHTTP2_HCAT_REQUEST:
        return 0
    r = <Rpc *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if r == NULL:
        return 0
    r.header_bytes += <uint32_t>(name_n + n + 32)
    if equal(name, name_n, ":path"):
        r.wants = (WANTS_PROCESS if equal(value, n, or_path_process)
                   else WANTS_CHECK if equal(value, n, or_path_check)
                   else WANTS_WATCH if equal(value, n, or_path_watch) else WANTS_UNKNOWN)
    elif equal(name, name_n, ":method"):
        r.bad_method = not equal(value, n, "POST")
    elif equal(name, name_n, "content-type"):
        r.is_grpc = starts(value, n, "application/grpc")
    return 0


cdef inline int take_frame(nghttp2_session *session, const nghttp2_frame *frame, void *conn) noexcept nogil:
    cdef Conn *c = <Conn *>conn
    cdef Rpc *r
    c.heard_ns = c.thread.now_ns
    c.pinged = 0
    if frame.hd.type == NGHTTP2_SETTINGS:
        c.settled = 1
        return 0
    if frame.hd.type != NGHTTP2_HEADERS and frame.hd.type != NGHTTP2_DATA:
        return 0
    r = <Rpc *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
    if r == NULL:
        return 0
    if frame.hd.type == NGHTTP2_HEADERS and frame.headers.cat == NGHTTP2_HCAT_REQUEST:
        on_request(r)
    if frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        on_half_closed(r)
    return 0


cdef inline int take_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t n,
                          void *conn) noexcept nogil:
    cdef Rpc *r = <Rpc *>nghttp2_session_get_stream_user_data(session, id)
    if r != NULL:
        on_bytes(r, <const char *>data, n)
    return 0


cdef inline int sent_frame(nghttp2_session *session, const nghttp2_frame *frame, void *conn) noexcept nogil:
    """We have ended a stream that the peer goes on with: it is told to stop (RFC 9113, 8.1)."""
    cdef Conn *c = <Conn *>conn
    cdef Rpc *r
    if frame.hd.type == NGHTTP2_GOAWAY and frame.goaway.error_code != NGHTTP2_NO_ERROR and not c.broken:
        # the library found a protocol error: counted, and closed once this is written
        c.broken = 1
        c.thread.counts.connections_dropped += 1
        return 0
    if frame.hd.type == NGHTTP2_HEADERS and frame.hd.flags & NGHTTP2_FLAG_END_STREAM:
        r = <Rpc *>nghttp2_session_get_stream_user_data(session, frame.hd.stream_id)
        if r != NULL and not r.half_closed:
            nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame.hd.stream_id, NGHTTP2_NO_ERROR)
    return 0


cdef inline int close_stream(nghttp2_session *session, int32_t id, uint32_t error, void *conn) noexcept nogil:
    cdef Rpc *r = <Rpc *>nghttp2_session_get_stream_user_data(session, id)
    if r != NULL:
        nghttp2_session_set_stream_user_data(session, id, NULL)
        rpc_free(r)
    return 0
