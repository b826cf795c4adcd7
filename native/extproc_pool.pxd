"""What an ext_proc stream needs to live: the host it asks, its state, the pool it comes from.

A pool belongs to one thread. It makes states and buffers when they are first needed and
keeps them for reuse, so that nothing is allocated once a worker has seen its usual load.
"""
from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from native.address cimport Forwarded
from native.base cimport Decision, Header, Request, Slice

cdef enum:
    # A longer message is refused unread. Far above what a proxy's buffers let through: where the proxy
    # fails open, a message that is too long would be a way past us. Body bytes over the limit cost nothing.
    STREAM_MESSAGE_BYTES_MAX = 67108864
    STREAM_HEADER_BYTES_MAX = 65536      # names + values of one request; the rest is dropped and counted
    STREAM_BODY_BYTES_MAX = 1048576      # whatever a route's limit says
    ANSWER_BYTES_MAX = 65536             # body of a refusal; a longer one is left out
    NO_LENGTH = 0xffffffff
    BUFFER_CLASSES = 9                   # 4 KiB << class, up to STREAM_BODY_BYTES_MAX
    BUFFER_BYTES_MIN = 4096
    OUT_BYTES = STREAM_MESSAGE_BYTES_MAX + 131072


cdef enum BodyMode:
    BODY_MODE_NONE = 0
    BODY_MODE_BUFFERED = 1               # held back by the proxy until all of it is here
    BODY_MODE_STREAMED = 2               # passed on while it is read; headers cannot be changed any more
    BODY_MODE_BUFFERED_PARTIAL = 3       # held back up to the proxy's buffer limit, decided on that part


cdef enum Tell:
    TELL_NOTHING = 0
    TELL_FLAGGED = 1                     # whatever isn't plainly allowed
    TELL_ALL = 2


cdef enum Upgrade:                       # bits: what the headers say of it
    UPGRADE_NAMED = 1                    # upgrade: something
    UPGRADE_ASKED = 2                    # connection: upgrade
    UPGRADE_FRAMED = 4                   # a body is announced


cdef struct BodyPlan:
    # zero on entry of the host's plan()
    # BodyMode. BUFFERED needs a content-length within the limit; without, BUFFERED_PARTIAL is asked for
    uint8_t mode
    uint32_t limit_bytes                 # 0: no body; more than STREAM_BODY_BYTES_MAX is cut to it
    uint8_t decide_now                   # decide on the headers alone, whatever the mode says


cdef struct Answer:
    # zero on entry of the host's answer(); slices must live until the next call on the stream
    uint16_t status                      # outside 200..599: 403, or 429 for a throttle
    Slice body
    Slice content_type
    uint16_t retry_after_s               # 0: the decision's


cdef struct ExtProcHost


ctypedef void (*plan_fn)(void *ctx, Request *r, BodyPlan *plan) noexcept nogil
ctypedef void (*decide_fn)(void *ctx, Request *r, Decision *d) noexcept nogil
ctypedef void (*answer_fn)(void *ctx, const Decision *d, Answer *a) noexcept nogil
ctypedef void (*respond_fn)(void *ctx, const Decision *d, int status,
                            uint64_t response_us) noexcept nogil
ctypedef Slice (*route_name_fn)(void *ctx, const Decision *d) noexcept nogil
ctypedef void (*refresh_fn)(ExtProcHost *host) noexcept nogil


cdef struct ExtProcHost:
    void *ctx
    refresh_fn refresh                   # now and then, between messages: take over what the fields below say
    plan_fn plan                         # after the headers: is a body needed?
    decide_fn decide                     # exactly once per request
    answer_fn answer                     # how a refusal looks
    route_name_fn route_name             # for people; plain ASCII, empty: not known. Valid as an Answer's slices
    respond_fn respond                   # at most once, after decide; never for a refused request
    uint8_t tell_upstream                # Tell: of which decisions the upstream hears in headers
    uint8_t tell_proxy                   # ... and the proxy in dynamic metadata
    uint8_t trusted_hops                 # our proxies in front of this one: see forwarded_address()
    Slice address_header                 # any case; empty: x-forwarded-for


cdef enum Phase:
    PHASE_START = 0
    PHASE_BODY = 1                       # the request's headers are known, its body is awaited
    PHASE_DECIDED = 2
    PHASE_REFUSED = 3                    # answered by us: whatever was on its way is ignored
    PHASE_RESPONSE = 4                   # the response's headers have been seen
    PHASE_FAULT = 5


cdef struct StreamState:
    StreamState *next                    # in the free list
    Request request
    Decision decision
    Forwarded forwarded
    Slice attribute_address              # source.address; points into the message
    uint64_t decided_ns                  # monotonic
    char *block                          # copied header bytes while a body is awaited
    char *body
    uint32_t body_n
    uint32_t body_limit
    uint32_t header_bytes
    uint64_t content_length              # NO_LENGTH: not given, or no number
    int fault
    int8_t block_class
    int8_t body_class
    uint8_t phase
    uint8_t decided
    uint8_t observing                    # observability mode: nothing is ever answered
    uint8_t is_grpc
    uint8_t has_foreign                  # the client sent x-outrider-* headers
    uint8_t end_of_request               # end_of_stream or trailers seen
    uint8_t plan_mode                    # BodyMode
    uint8_t announced_body               # protocol_config: Envoy's BodySendMode
    uint8_t announced_response_body
    uint8_t has_config
    uint8_t has_method
    uint8_t has_path
    uint8_t has_authority
    uint8_t has_scheme
    uint8_t upgrade                      # Upgrade
    uint8_t by_message                   # gRPC: decided on its first message
    Header headers[128]                  # last: only what a request uses of it is ever touched


cdef struct StreamCounts:
    uint64_t messages
    uint64_t faults
    uint64_t decisions
    uint64_t refusals
    uint64_t headers_dropped             # beyond HEADERS_MAX or STREAM_HEADER_BYTES_MAX
    uint64_t bodies_cut                  # over the limit, or ended early
    uint64_t late_decisions              # only when the response was there: is allow_mode_override off?
    uint64_t no_buffer                   # decided on less because the pool was exhausted


cdef struct StreamPool:
    StreamState *free_state
    char *free_buffer[9]
    char *out                            # one answer; overwritten by the next call on any stream of the pool
    uint32_t states
    uint32_t states_max
    uint32_t live
    uint64_t buffer_bytes                # made, in use or free
    uint64_t buffer_bytes_max
    StreamCounts counts


cdef inline void pool_init_states(StreamPool *pool, uint32_t states_max, uint64_t buffer_bytes_max) noexcept nogil:
    """A pool for hosts that write no messages: there is no room for answers."""
    memset(pool, 0, sizeof(StreamPool))
    pool.states_max = states_max
    pool.buffer_bytes_max = buffer_bytes_max


cdef inline bint pool_init(StreamPool *pool, uint32_t states_max, uint64_t buffer_bytes_max) noexcept nogil:
    """False when there is no memory; the pool is then empty and may be closed."""
    pool_init_states(pool, states_max, buffer_bytes_max)
    # larger than any answer can become; pages that are never written cost nothing
    pool.out = <char *>malloc(OUT_BYTES)
    return pool.out != NULL


cdef inline uint64_t buffer_size(int buffer_class) noexcept nogil:
    return <uint64_t>BUFFER_BYTES_MIN << buffer_class


cdef inline void buffers_trim(StreamPool *pool, uint64_t wanted) noexcept nogil:
    """Gives free buffers of other sizes back, large ones first, until `wanted` more bytes fit."""
    cdef int k
    cdef char *b
    for k in range(BUFFER_CLASSES - 1, -1, -1):
        while pool.free_buffer[k] != NULL and pool.buffer_bytes + wanted > pool.buffer_bytes_max:
            b = pool.free_buffer[k]
            memcpy(&pool.free_buffer[k], b, sizeof(void *))
            free(b)
            pool.buffer_bytes -= buffer_size(k)


cdef inline char *buffer_take(StreamPool *pool, uint64_t bytes_needed, int8_t *buffer_class) noexcept nogil:
    """At least that many bytes, or NULL: over STREAM_BODY_BYTES_MAX, or the pool is exhausted."""
    cdef int k = 0
    cdef char *b
    while k < BUFFER_CLASSES and buffer_size(k) < bytes_needed:
        k += 1
    if k == BUFFER_CLASSES:
        return NULL
    b = pool.free_buffer[k]
    if b != NULL:
        memcpy(&pool.free_buffer[k], b, sizeof(void *))
    else:
        buffers_trim(pool, buffer_size(k))
        if pool.buffer_bytes + buffer_size(k) > pool.buffer_bytes_max:
            return NULL
        b = <char *>malloc(buffer_size(k))
        if b == NULL:
            return NULL
        pool.buffer_bytes += buffer_size(k)
    buffer_class[0] = <int8_t>k
    return b


cdef inline void buffer_give(StreamPool *pool, char *b, int buffer_class) noexcept nogil:
    memcpy(b, &pool.free_buffer[buffer_class], sizeof(void *))
    pool.free_buffer[buffer_class] = b


cdef inline void stream_release_buffers(StreamPool *pool, StreamState *s) noexcept nogil:
    """After this the request's slices are gone."""
    if s.block != NULL:
        buffer_give(pool, s.block, s.block_class)
        s.block = NULL
    if s.body != NULL:
        buffer_give(pool, s.body, s.body_class)
        s.body = NULL


cdef inline StreamState *stream_open(StreamPool *pool) noexcept nogil:
    """A fresh state, or NULL: states_max are in use, or no memory."""
    cdef StreamState *s = pool.free_state
    if s != NULL:
        pool.free_state = s.next
    else:
        if pool.states >= pool.states_max:
            return NULL
        s = <StreamState *>calloc(1, sizeof(StreamState))
        if s == NULL:
            return NULL
        pool.states += 1
    # all but the header table, which n_headers guards
    memset(s, 0, sizeof(StreamState) - sizeof(s.headers))
    s.content_length = NO_LENGTH
    pool.live += 1
    return s


cdef inline void stream_free(StreamPool *pool, StreamState *s) noexcept nogil:
    """Back to the pool without asking the host anything."""
    stream_release_buffers(pool, s)
    s.next = pool.free_state
    pool.free_state = s
    pool.live -= 1


cdef inline void pool_close(StreamPool *pool) noexcept nogil:
    """All streams must have been freed."""
    cdef StreamState *s
    cdef char *b
    cdef int k
    while pool.free_state != NULL:
        s = pool.free_state
        pool.free_state = s.next
        free(s)
    for k in range(BUFFER_CLASSES):
        while pool.free_buffer[k] != NULL:
            b = pool.free_buffer[k]
            memcpy(&pool.free_buffer[k], b, sizeof(void *))
            free(b)
    free(pool.out)
    pool.out = NULL
