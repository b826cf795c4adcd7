"""Requests judged by their headers alone, for a host that has them as text (sidecar/serve/auth_request.py): who is
asking, and what is said to whom, is found out by the same functions as for ext_proc."""
from libc.stdint cimport uint32_t, uintptr_t
from libc.string cimport memset

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from native.base cimport ACTION_THROTTLE, Slice, or_unix_us
from native.extproc_pool cimport NO_LENGTH, Answer, ExtProcHost, StreamState
from native.inspect cimport find_client, split_path, take_request_header, told

from native.arenafile import ACTIONS


cdef inline Slice slice_of(bytes text):
    cdef Slice s
    s.p = PyBytes_AS_STRING(text)
    s.n = <uint32_t>PyBytes_GET_SIZE(text)
    return s


cdef class Ruling:
    """What becomes of a request. status: 0 to let it pass, else what the client is to be answered with.
    told: are action, score and id to be passed on (answers.headers)?"""
    cdef readonly int status
    cdef readonly int retry_after_s
    cdef readonly bint told
    cdef readonly str action     # what is carried out
    cdef readonly double score   # 0..1
    cdef readonly str id         # 16 hexadecimal digits, as in decision records


cdef class HeaderJudge:
    """Decides on requests of which there are headers only. One per thread, like the engine that it drives.

    host_address is that of an ExtProcHost (native/extproc_pool.pxd); owner is whatever keeps it alive."""
    cdef ExtProcHost *host
    cdef object owner
    cdef StreamState state

    def __cinit__(self, uintptr_t host_address, object owner):
        if host_address == 0:
            raise ValueError("host_address is 0")
        self.host = <ExtProcHost *>host_address
        self.owner = owner

    def decide(self, bytes method not None, bytes target not None, bytes authority not None, list headers not None,
               bytes peer not None):
        """A Ruling on one request, which is counted and recorded like any other.

        target: path with query, as the client sent it. headers: (name, value) in bytes, in their order, without
        Host. peer: the client's address as the proxy sees it, in text; a header that client.address_header or
        client.trusted_hops point to comes first."""
        cdef StreamState *s = &self.state
        cdef Answer answer
        cdef bytes name, value
        cdef Ruling ruling = Ruling()
        if not method or not target:
            raise ValueError("a request has a method and a target")
        self.host.refresh(self.host)
        memset(s, 0, sizeof(StreamState) - sizeof(s.headers))
        s.content_length = NO_LENGTH
        for pseudo, value in ((b":method", method), (b":path", target), (b":authority", authority)):
            name = pseudo
            take_request_header(s, self.host, slice_of(name), slice_of(value))
        for name, value in headers:
            take_request_header(s, self.host, slice_of(name), slice_of(value))
        split_path(&s.request)
        s.request.headers = s.headers
        s.request.time_us = or_unix_us()
        s.attribute_address = slice_of(peer)
        find_client(s, self.host)
        with nogil:
            self.host.decide(self.host.ctx, &s.request, &s.decision)
        ruling.action = ACTIONS[s.decision.enforced]
        ruling.score = min(max(s.decision.score, 0.0), 1.0)
        ruling.id = f"{s.decision.id:016x}"
        ruling.told = told(self.host.tell_upstream, &s.decision)
        if s.decision.enforced >= ACTION_THROTTLE:
            memset(&answer, 0, sizeof(Answer))
            self.host.answer(self.host.ctx, &s.decision, &answer)
            ruling.status = answer.status
            ruling.retry_after_s = answer.retry_after_s
        return ruling
