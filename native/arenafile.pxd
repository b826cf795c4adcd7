"""What the Python host's modules share: the arena object and the helpers that turn values into bytes and back.
Python only; a host without an interpreter uses native/arena.pxd."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from native.arena cimport Arena
from native.base cimport Decision


cdef class ArenaFile:
    cdef Arena arena
    cdef readonly str path
    cdef uint64_t stuck_at
    cdef double stuck_since
    cdef readonly uint64_t events_given_up


cdef bytes as_bytes(object value)
cdef bint parse_client(object client, uint8_t *address) except -1
cdef uint64_t key_of_client(const Arena *arena, object client) except? 0
cdef str text_of(const char *p, uint32_t n)
cdef dict record_of_decision(const Decision *d)
