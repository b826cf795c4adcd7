"""What the Python host's modules share: the arena object and the helpers that turn values into bytes and back.
Python only; a host without an interpreter uses native/arena.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from native.arena cimport Arena
from native.base cimport Decision


cdef struct RingReader:
    # the one reader of a ring: what it waits for, and since when
    uint64_t stuck_at
    double stuck_since
    uint64_t given_up


cdef class ArenaFile:
    cdef Arena arena
    cdef readonly str path
    cdef RingReader events
    cdef RingReader escalations


cdef bytes as_bytes(object value)
cdef bint parse_client(object client, uint8_t *address) except -1
cdef uint64_t key_of_client(const Arena *arena, object client) except? 0
cdef str text_of(const char *p, uint32_t n)
cdef dict record_of_decision(const Decision *d)
