"""Python's hold on the ext_proc state machine, and a host for tests.

All streams of a process share one pool and must be driven by threads that hold the
interpreter's lock while they do: message() keeps it, since one call takes microseconds.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE, mmap,
                         mprotect, munmap)

from native.address cimport parse_address
from native.base cimport PLACE_MAX, Decision, Request, Slice, or_now_ns
from native.extproc cimport stream_close, stream_expire, stream_message
from native.extproc_pool cimport (ANSWER_BYTES_MAX, STREAM_BODY_BYTES_MAX, STREAM_HEADER_BYTES_MAX,
                                  STREAM_MESSAGE_BYTES_MAX, TELL_ALL, TELL_FLAGGED, Answer, BodyPlan, ExtProcHost,
                                  StreamPool,
                                  StreamState, buffers_trim, pool_init, stream_free, stream_open)
from native.extproc_read cimport STREAM_SEND, or_fault_text

STREAMS_MAX = 65536
BUFFER_BYTES_MAX = 256 << 20
MESSAGE_BYTES_MAX = STREAM_MESSAGE_BYTES_MAX
HEADER_BYTES_MAX = STREAM_HEADER_BYTES_MAX
BODY_BYTES_MAX = STREAM_BODY_BYTES_MAX
REFUSAL_BYTES_MAX = ANSWER_BYTES_MAX

cdef StreamPool the_pool

if not pool_init(&the_pool, STREAMS_MAX, BUFFER_BYTES_MAX):
    raise MemoryError("no memory for the ext_proc output buffer")


class ProtocolError(Exception):
    """The proxy sent something that ext_proc does not allow; the stream is over. str() says what."""


def counts() -> dict[str, int]:
    """What all streams of this process counted, plus the pool's state (streams, bytes)."""
    c = the_pool.counts
    return {
        "messages": c.messages, "faults": c.faults, "decisions": c.decisions, "refusals": c.refusals,
        "headers_dropped": c.headers_dropped, "bodies_cut": c.bodies_cut, "late_decisions": c.late_decisions,
        "no_buffer": c.no_buffer, "streams": the_pool.live, "streams_made": the_pool.states,
        "buffer_bytes": the_pool.buffer_bytes,
    }


def limit_buffers(uint64_t bytes_max) -> int:
    """Sets how many bytes all kept headers and bodies may take together; returns the limit before."""
    cdef uint64_t before = the_pool.buffer_bytes_max
    the_pool.buffer_bytes_max = bytes_max
    buffers_trim(&the_pool, 0)
    return before


cdef class ExtProcStream:
    """One ext_proc stream: message() for each message received, close() at its end.

    host_address is that of an ExtProcHost (native/extproc_pool.pxd); owner is whatever keeps it alive.
    Raises MemoryError when STREAMS_MAX streams are open.
    """
    cdef StreamState *state
    cdef ExtProcHost *host
    cdef object owner

    def __cinit__(self, uintptr_t host_address, object owner):
        if host_address == 0:
            raise ValueError("host_address is 0")
        self.host = <ExtProcHost *>host_address
        self.owner = owner
        self.state = stream_open(&the_pool)
        if self.state == NULL:
            raise MemoryError("too many ext_proc streams")

    def __dealloc__(self):
        # the owner may be gone by now: the host is not asked
        if self.state != NULL:
            stream_free(&the_pool, self.state)

    def message(self, bytes data not None) -> bytes | None:
        """The ProcessingResponse to a serialized ProcessingRequest, None when there is none to send.

        Raises ProtocolError, from then on every time, and ValueError after close().
        """
        cdef Slice out
        if self.state == NULL:
            raise ValueError("the stream is closed")
        self.host.refresh(self.host)
        return self.answered(stream_message(&the_pool, self.state, self.host, PyBytes_AS_STRING(data),
                                            <uint64_t>PyBytes_GET_SIZE(data), &out), &out)

    cdef bytes answered(self, int result, const Slice *out):
        if result == STREAM_SEND:
            return PyBytes_FromStringAndSize(out.p, out.n)
        if result < 0:
            raise ProtocolError((<bytes>or_fault_text(result)).decode())
        return None

    def expire(self) -> bytes | None:
        """Nothing came for too long: a request still waiting for its body is decided on what is known.

        Returns a last message to send when it is refused; in either case end the stream without an error.
        """
        cdef Slice out
        if self.state == NULL:
            raise ValueError("the stream is closed")
        return self.answered(stream_expire(&the_pool, self.state, self.host, &out), &out)

    def message_before_a_wall(self, bytes data not None) -> bytes | None:
        """message(), with the data ending where readable memory ends: one byte read too far is a crash
        (for tests)."""
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        cdef size_t room = <size_t>(n + 4095) // 4096 * 4096
        cdef Slice out
        cdef char *memory
        if self.state == NULL:
            raise ValueError("the stream is closed")
        memory = <char *>mmap(NULL, room + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if memory == <char *>MAP_FAILED:
            raise MemoryError
        mprotect(memory + room, 4096, PROT_NONE)
        memcpy(memory + room - n, PyBytes_AS_STRING(data), n)
        try:
            return self.answered(stream_message(&the_pool, self.state, self.host, memory + room - n,
                                                <uint64_t>n, &out), &out)
        finally:
            munmap(memory, room + 4096)

    def close(self) -> None:
        """Ends the stream; a request still waiting for its body is decided on what is known."""
        if self.state != NULL:
            state = self.state
            self.state = NULL
            stream_close(&the_pool, state, self.host)


cdef void quiet_refresh(ExtProcHost *host) noexcept nogil:
    pass


cdef void quiet_plan(void *ctx, Request *r, BodyPlan *plan) noexcept nogil:
    pass


cdef void quiet_decide(void *ctx, Request *r, Decision *d) noexcept nogil:
    pass


cdef void quiet_answer(void *ctx, const Decision *d, Answer *a) noexcept nogil:
    pass


cdef Slice quiet_route_name(void *ctx, const Decision *d) noexcept nogil:
    cdef Slice name
    name.p = NULL
    name.n = 0
    return name


cdef void quiet_respond(void *ctx, const Decision *d, int status, uint64_t response_us) noexcept nogil:
    pass


def machine_ns(list messages not None, uint32_t rounds) -> list[int]:
    """What a whole stream of these messages costs, ns per round, with a host that does nothing (bench)."""
    cdef ExtProcHost host
    cdef StreamState *s
    cdef Slice out
    cdef uint64_t begun
    cdef list result = []
    cdef const char *p[8]
    cdef uint64_t n[8]
    cdef uint32_t k, count = <uint32_t>min(len(messages), 8)
    host.ctx = NULL
    host.refresh = quiet_refresh
    host.plan = quiet_plan
    host.decide = quiet_decide
    host.answer = quiet_answer
    host.respond = quiet_respond
    host.route_name = quiet_route_name
    host.tell_upstream = TELL_ALL
    host.tell_proxy = TELL_FLAGGED
    host.trusted_hops = 0
    host.address_header.p = NULL
    host.address_header.n = 0
    for k in range(count):
        p[k] = PyBytes_AS_STRING(messages[k])
        n[k] = <uint64_t>PyBytes_GET_SIZE(messages[k])
    for _ in range(rounds):
        begun = or_now_ns()
        s = stream_open(&the_pool)
        if s == NULL:
            raise MemoryError("too many ext_proc streams")
        for k in range(count):
            stream_message(&the_pool, s, &host, p[k], n[k], &out)
        stream_close(&the_pool, s, &host)
        result.append(or_now_ns() - begun)
    return result


def address_bytes(bytes text not None) -> bytes | None:
    """parse_address() for tests: 16 bytes, or None."""
    cdef uint8_t out[16]
    cdef Slice s
    s.p = PyBytes_AS_STRING(text)
    s.n = <uint32_t>PyBytes_GET_SIZE(text)
    if not parse_address(s, out):
        return None
    return PyBytes_FromStringAndSize(<char *>out, 16)


cdef class RecordingHost:
    """A host whose verdicts are set from Python and that keeps what it was asked (for tests).

    decisions, plans and responses are lists; every attribute may be changed between messages.
    """
    cdef ExtProcHost host
    cdef readonly list requests, planned, responses
    cdef public uint8_t action, enforced, mode, body_mode, decide_now
    cdef public uint32_t limit_bytes
    cdef public uint16_t status, retry_after_s, route
    cdef public double score
    cdef public uint64_t id
    cdef public list reasons
    cdef public bytes place, body, content_type, route_name
    cdef bytes header

    def __cinit__(self, int trusted_hops=0, bytes address_header=b"", int tell_upstream=TELL_ALL,
                  int tell_proxy=TELL_ALL):
        self.requests = []
        self.planned = []
        self.responses = []
        self.reasons = []
        self.place = self.body = self.content_type = self.route_name = b""
        self.header = address_header
        self.mode = 1
        self.limit_bytes = 65536
        self.host.ctx = <void *>self
        self.host.refresh = quiet_refresh
        self.host.plan = recording_plan
        self.host.decide = recording_decide
        self.host.answer = recording_answer
        self.host.respond = recording_respond
        self.host.route_name = recording_route_name
        self.host.tell_upstream = tell_upstream
        self.host.tell_proxy = tell_proxy
        self.host.trusted_hops = trusted_hops
        self.host.address_header.p = PyBytes_AS_STRING(self.header)
        self.host.address_header.n = <uint32_t>PyBytes_GET_SIZE(self.header)

    def host_address(self) -> int:
        """Of the ExtProcHost; valid as long as this object."""
        return <uintptr_t>&self.host

    def refuse(self, action: int, score: float = 0.95) -> None:
        """Verdict and what is carried out are both this action from now on."""
        self.action = self.enforced = action
        self.score = score


cdef bytes taken(Slice s):
    return PyBytes_FromStringAndSize(s.p, s.n)


cdef dict as_dict(const Request *r):
    cdef uint32_t i
    return {
        "method": taken(r.method), "path": taken(r.path), "query": taken(r.query),
        "authority": taken(r.authority), "scheme": taken(r.scheme),
        "headers": [(taken(r.headers[i].name), taken(r.headers[i].value)) for i in range(r.n_headers)],
        "headers_dropped": r.headers_dropped, "body": taken(r.body), "body_bytes": r.body_bytes,
        "body_state": r.body_state, "time_us": r.time_us,
        "address": PyBytes_FromStringAndSize(<const char *>r.address, 16) if r.has_address else None,
    }


cdef void recording_plan(void *ctx, Request *r, BodyPlan *plan) noexcept nogil:
    with gil:
        host = <RecordingHost>ctx
        host.planned.append(as_dict(r))
        plan.mode = host.body_mode
        plan.limit_bytes = host.limit_bytes
        plan.decide_now = host.decide_now


cdef void recording_decide(void *ctx, Request *r, Decision *d) noexcept nogil:
    cdef int i
    with gil:
        host = <RecordingHost>ctx
        host.requests.append(as_dict(r))
        d.id = host.id
        d.action = host.action
        d.enforced = host.enforced
        d.mode = host.mode
        d.score = host.score
        d.route = host.route
        d.n_reasons = <uint8_t>min(len(host.reasons), 4)
        for i in range(d.n_reasons):
            d.reason[i] = host.reasons[i]
        d.place_n = <uint16_t>min(len(host.place), <int>PLACE_MAX)
        memcpy(d.place, PyBytes_AS_STRING(host.place), d.place_n)


cdef void recording_answer(void *ctx, const Decision *d, Answer *a) noexcept nogil:
    with gil:
        host = <RecordingHost>ctx
        a.status = host.status
        a.retry_after_s = host.retry_after_s
        a.body.p = PyBytes_AS_STRING(host.body)
        a.body.n = <uint32_t>PyBytes_GET_SIZE(host.body)
        a.content_type.p = PyBytes_AS_STRING(host.content_type)
        a.content_type.n = <uint32_t>PyBytes_GET_SIZE(host.content_type)


cdef Slice recording_route_name(void *ctx, const Decision *d) noexcept nogil:
    cdef Slice name
    with gil:
        name.p = PyBytes_AS_STRING((<RecordingHost>ctx).route_name)
        name.n = <uint32_t>PyBytes_GET_SIZE((<RecordingHost>ctx).route_name)
    return name


cdef void recording_respond(void *ctx, const Decision *d, int status, uint64_t response_us) noexcept nogil:
    with gil:
        (<RecordingHost>ctx).responses.append((d.id, status, response_us))
