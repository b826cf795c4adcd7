"""gRPC over one HTTP/2 connection, without any I/O: what a stream is, and what it sends.

libnghttp2 reads and writes the frames. What is to be sent is kept with the stream until the
library asks for it (give_data); what comes in is the matter of native/rpc_read.pxd.

A stream's life: headers -> admitted (or answered at once with an error) -> messages -> ended:
by the peer (its half is closed, or it resets), by an error, by being idle, or by a drain.
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset, strlen

from native.base cimport Slice, or_add64
from native.extproc cimport stream_close
from native.extproc_pool cimport ExtProcHost, StreamPool, StreamState
from native.nghttp2 cimport *

cdef enum:
    OUT_INLINE = 512             # bytes of pending answer kept in the stream itself: a usual one has 60
    OUT_PENDING_MAX = 262144     # an answer or two; a peer that doesn't read gets no more
    WATCHERS_MAX = 64            # health watches, over all threads
    STREAMS_BESIDE = 1024        # held beside Limits.streams: health checks, and ended ones not yet read

cdef enum:                       # what a stream wants
    WANTS_UNKNOWN = 0
    WANTS_PROCESS = 1
    WANTS_CHECK = 2
    WANTS_WATCH = 3

cdef enum:                       # gRPC's status codes
    GRPC_OK = 0
    GRPC_INVALID_ARGUMENT = 3
    GRPC_NOT_FOUND = 5
    GRPC_RESOURCE_EXHAUSTED = 8
    GRPC_UNIMPLEMENTED = 12
    GRPC_INTERNAL = 13
    GRPC_UNAVAILABLE = 14


cdef struct Limits:
    uint32_t connections         # over all threads
    uint32_t streams             # ext_proc streams, over all threads; health checks come on top
    uint32_t message_bytes
    uint32_t header_bytes        # of one stream's request headers, as HPACK counts them
    uint64_t memory_bytes        # unfinished messages and unsent answers, per thread
    uint64_t idle_ns             # a stream without a whole message
    uint64_t keepalive_ns        # a connection without a whole frame: pinged
    uint64_t keepalive_timeout_ns    # ... and given up; also to read what we wrote, and for the first settings


cdef struct Shared:              # by the threads of a server, and with the thread that steers it
    uint64_t serving             # what health says: 1 or 0
    uint64_t phase               # RUNNING ...
    uint64_t streams             # ext_proc streams in progress
    uint64_t connections
    uint64_t watchers
    uint64_t rpcs                # streams of any kind that are held, ended ones whose peer doesn't read included


cdef enum:                       # of Shared.phase, in this order
    PHASE_RUNNING = 0
    PHASE_CLOSING = 1            # nothing new; what is in progress may end
    PHASE_EXPIRING = 2           # everything in progress is decided on what is known
    PHASE_DEAD = 3


cdef struct TransportCounts:     # of one thread; read by others at any time
    uint64_t connections_opened
    uint64_t connections_refused     # over the limit
    uint64_t connections_dropped     # for what the peer did or didn't do: protocol, silence, not reading
    uint64_t streams_opened
    uint64_t streams_refused
    uint64_t streams_idle_closed
    uint64_t streams_dropped         # the peer doesn't take its answers
    uint64_t protocol_errors
    uint64_t internal_errors
    uint64_t messages


cdef struct Conn


cdef struct Rpc:
    Rpc *next                    # of its connection; in the free list
    Rpc *prev
    Rpc *later                   # of its thread, in the order in which they were last heard
    Rpc *earlier
    Conn *conn
    StreamState *state           # of ext_proc; NULL for others and once ended
    uint64_t heard_ns
    int32_t id
    uint32_t header_bytes
    uint32_t need                # bytes of the message being read, where has_prefix
    uint32_t message_n           # bytes of it that are here
    uint32_t message_cap
    uint32_t out_n
    uint32_t out_at
    uint32_t out_cap
    char *message
    char *out                    # inline_out, or its own
    const char *text             # of the status; static
    uint8_t wants
    uint8_t status               # GRPC_..., valid once ended
    uint8_t ended                # nothing more is read; what is pending is sent, then the status
    uint8_t begun                # response headers were submitted
    uint8_t deferred             # the library waits for us to have data
    uint8_t half_closed          # by the peer
    uint8_t admitted             # counts in Shared.streams
    uint8_t watching             # counts in Shared.watchers
    uint8_t told                 # the last health status sent, plus 1
    uint8_t bad_method
    uint8_t is_grpc
    uint8_t prefix_n
    uint8_t prefix[5]
    char inline_out[OUT_INLINE]


cdef struct Thread:              # what the streams of one thread share
    StreamPool pool
    ExtProcHost *host
    Shared *shared
    Limits limits
    TransportCounts counts
    uint64_t now_ns              # of this round
    uint64_t memory_bytes
    Rpc *free_rpc
    Rpc *oldest                  # heard longest ago
    Rpc *newest


cdef struct Conn:
    Conn *next
    Conn *prev
    Thread *thread
    nghttp2_session *session
    Rpc *rpcs
    char *out                    # what a write left over
    uint32_t out_n
    uint32_t out_at
    uint64_t heard_ns            # last whole frame
    uint64_t wrote_ns            # last progress of a write
    int fd
    uint8_t armed                # waits until it may write, and doesn't read meanwhile
    uint8_t settled              # the peer's settings have come
    uint8_t pinged
    uint8_t closing              # told that no new stream is taken: 1 softly, 2 finally
    uint8_t at_end               # the peer has closed its side
    uint8_t broken               # send what is there, then close


# ---- lists -------------------------------------------------------------------------------------------

cdef inline void unqueue(Thread *t, Rpc *r) noexcept nogil:
    if r.earlier != NULL:
        r.earlier.later = r.later
    elif t.oldest == r:
        t.oldest = r.later
    if r.later != NULL:
        r.later.earlier = r.earlier
    elif t.newest == r:
        t.newest = r.earlier
    r.earlier = r.later = NULL


cdef inline void hear(Thread *t, Rpc *r) noexcept nogil:
    """To the end of the thread's queue, as the one heard last."""
    r.heard_ns = t.now_ns
    if t.newest == r:
        return
    unqueue(t, r)
    r.earlier = t.newest
    if t.newest != NULL:
        t.newest.later = r
    else:
        t.oldest = r
    t.newest = r


cdef inline Rpc *rpc_open(Conn *c, int32_t id) noexcept nogil:
    cdef Thread *t = c.thread
    cdef Rpc *r = t.free_rpc
    if r != NULL:
        t.free_rpc = r.next
    else:
        r = <Rpc *>malloc(sizeof(Rpc))
        if r == NULL:
            return NULL
    memset(r, 0, sizeof(Rpc) - OUT_INLINE)
    r.conn = c
    r.id = id
    r.out = r.inline_out
    r.out_cap = OUT_INLINE
    r.next = c.rpcs
    if c.rpcs != NULL:
        c.rpcs.prev = r
    c.rpcs = r
    hear(t, r)
    return r


cdef inline void release_state(Thread *t, Rpc *r) noexcept nogil:
    """The ext_proc side is over: an unfinished request is decided on what came of it."""
    if r.state != NULL:
        stream_close(&t.pool, r.state, t.host)
        r.state = NULL
    if r.admitted:
        r.admitted = 0
        or_add64(&t.shared.streams, <uint64_t>-1)
    if r.watching:
        r.watching = 0
        or_add64(&t.shared.watchers, <uint64_t>-1)
    if r.message != NULL:
        free(r.message)
        t.memory_bytes -= r.message_cap
        r.message = NULL
        r.message_cap = r.message_n = 0


cdef inline void rpc_free(Rpc *r) noexcept nogil:
    cdef Conn *c = r.conn
    cdef Thread *t = c.thread
    release_state(t, r)
    or_add64(&t.shared.rpcs, <uint64_t>-1)
    if r.out != r.inline_out:
        free(r.out)
        t.memory_bytes -= r.out_cap
    unqueue(t, r)
    if r.prev != NULL:
        r.prev.next = r.next
    else:
        c.rpcs = r.next
    if r.next != NULL:
        r.next.prev = r.prev
    r.next = t.free_rpc
    t.free_rpc = r


# ---- sending -----------------------------------------------------------------------------------------

cdef inline nghttp2_nv header(const char *name, const char *value) noexcept nogil:
    cdef nghttp2_nv h
    h.name = <uint8_t *>name
    h.value = <uint8_t *>value
    h.namelen = strlen(name)
    h.valuelen = strlen(value)
    # the strings are constants
    h.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE
    return h


cdef extern from *:
    """
    static inline const char *or_grpc_status(int status) {
        static const char *const digits[17] = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11",
                                               "12", "13", "14", "15", "16"};
        return digits[status >= 0 && status <= 16 ? status : 2]; }
    """
    const char *or_grpc_status(int status) noexcept nogil


cdef inline ssize_t give_data(nghttp2_session *session, int32_t id, uint8_t *buf, size_t room,
                              uint32_t *flags, nghttp2_data_source *source, void *conn) noexcept nogil:
    """The library can send: what is pending, and at the end the status as trailers."""
    cdef Rpc *r = <Rpc *>source.ptr
    cdef size_t n = r.out_n - r.out_at
    cdef nghttp2_nv trailers[2]
    if n > room:
        n = room
    if n:
        memcpy(buf, r.out + r.out_at, n)
        r.out_at += <uint32_t>n
    if r.out_at == r.out_n:
        r.out_at = r.out_n = 0
        if r.ended:
            flags[0] |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM
            trailers[0] = header("grpc-status", or_grpc_status(r.status))
            if r.text != NULL:
                trailers[1] = header("grpc-message", r.text)
            if nghttp2_submit_trailer(session, id, trailers, 2 if r.text != NULL else 1) != 0:
                return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE
            return <ssize_t>n
    if n == 0:
        r.deferred = 1
        return NGHTTP2_ERR_DEFERRED
    return <ssize_t>n


cdef inline void wake(Rpc *r) noexcept nogil:
    """There is something to send, or the end."""
    cdef nghttp2_session *session = r.conn.session
    cdef nghttp2_data_provider data
    cdef nghttp2_nv headers[4]
    cdef size_t n = 2
    if r.begun:
        if r.deferred:
            r.deferred = 0
            nghttp2_session_resume_data(session, r.id)
        return
    r.begun = 1
    headers[0] = header(":status", "200")
    headers[1] = header("content-type", "application/grpc")
    if r.ended and r.out_n == 0:
        # nothing but a status: all of it in the headers
        headers[2] = header("grpc-status", or_grpc_status(r.status))
        n = 3
        if r.text != NULL:
            headers[3] = header("grpc-message", r.text)
            n = 4
        if nghttp2_submit_response(session, r.id, headers, n, NULL) == 0:
            return
    else:
        data.source.ptr = r
        data.read_callback = give_data
        if nghttp2_submit_response(session, r.id, headers, n, &data) == 0:
            return
    nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, r.id, NGHTTP2_INTERNAL_ERROR)


cdef inline void finish(Rpc *r, uint8_t status, const char *text) noexcept nogil:
    """Ends the stream with this status once what is pending has been sent. text: plain ASCII, static."""
    if r.ended:
        return
    r.ended = 1
    r.status = status
    r.text = text
    release_state(r.conn.thread, r)
    wake(r)


cdef inline void drop(Rpc *r) noexcept nogil:
    """The peer doesn't take what it asked for: reset."""
    r.conn.thread.counts.streams_dropped += 1
    r.ended = 1
    r.out_n = r.out_at = 0
    release_state(r.conn.thread, r)
    nghttp2_submit_rst_stream(r.conn.session, NGHTTP2_FLAG_NONE, r.id, NGHTTP2_CANCEL)


cdef inline bint out_room(Thread *t, Rpc *r, uint64_t wanted) noexcept nogil:
    cdef uint64_t cap = r.out_cap
    cdef char *larger
    if r.out_at:
        r.out_n -= r.out_at
        memmove(r.out, r.out + r.out_at, r.out_n)
        r.out_at = 0
    wanted += r.out_n
    if wanted <= cap:
        return True
    while cap < wanted:
        cap *= 2
    # one answer always fits, whatever its size, so long as the memory does
    if (r.out_n and wanted > OUT_PENDING_MAX) or t.memory_bytes + cap > t.limits.memory_bytes:
        return False
    larger = <char *>malloc(cap)
    if larger == NULL:
        return False
    memcpy(larger, r.out, r.out_n)
    if r.out != r.inline_out:
        free(r.out)
        t.memory_bytes -= r.out_cap
    t.memory_bytes += cap
    r.out = larger
    r.out_cap = <uint32_t>cap
    return True


cdef inline void send_message(Rpc *r, Slice m) noexcept nogil:
    cdef Thread *t = r.conn.thread
    cdef char *to
    if r.ended:
        return
    if not out_room(t, r, <uint64_t>m.n + 5):
        drop(r)
        return
    to = r.out + r.out_n
    to[0] = 0
    to[1] = <char>(m.n >> 24)
    to[2] = <char>(m.n >> 16)
    to[3] = <char>(m.n >> 8)
    to[4] = <char>m.n
    if m.n:
        memcpy(to + 5, m.p, m.n)
    r.out_n += m.n + 5
    wake(r)
