"""A bounded queue in shared memory: many writers, one reader, no locks (after Dmitry Vyukov's bounded MPMC queue).

A slot begins with its sequence number: `position` says free, `position + 1` written. A full ring refuses, and the
writer goes on. One whose writer died amid a slot is got past by the reader, who gives that slot up.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from native.base cimport or_cas64, or_load64, or_store64


cdef struct Ring:
    char *slots
    uint32_t n                   # slots, a power of two
    uint32_t bytes               # of a slot
    uint64_t *head               # next to be claimed by a writer
    uint64_t *tail               # next to be read; moved by the reader only


cdef inline uint64_t *ring_slot(const Ring *r, uint64_t position) noexcept nogil:
    return <uint64_t *>(r.slots + (position & (r.n - 1)) * r.bytes)


cdef inline void ring_init(Ring *r) noexcept nogil:
    cdef uint64_t i
    for i in range(r.n):
        ring_slot(r, i)[0] = i
    r.head[0] = 0
    r.tail[0] = 0


cdef inline void *ring_claim(Ring *r, uint64_t *position) noexcept nogil:
    """A slot to fill, or NULL when the ring is full (the caller counts that and goes on)."""
    cdef uint64_t pos = or_load64(r.head)
    cdef uint64_t seq
    cdef uint64_t *slot
    cdef int _tries
    for _tries in range(64):
        slot = ring_slot(r, pos)
        seq = or_load64(slot)
        if seq == pos:
            if or_cas64(r.head, pos, pos + 1):
                position[0] = pos
                return slot
        elif <int64_t>(seq - pos) < 0:
            return NULL
        pos = or_load64(r.head)
    return NULL


cdef inline bint ring_publish(void *slot, uint64_t position) noexcept nogil:
    """False where the reader has given the slot up meanwhile (this writer slept for long)."""
    return or_cas64(<uint64_t *>slot, position, position + 1)


cdef inline void *ring_peek(const Ring *r) noexcept nogil:
    """The oldest slot, or NULL where there is none or it is still being written."""
    cdef uint64_t pos = r.tail[0]
    cdef uint64_t *slot = ring_slot(r, pos)
    return slot if or_load64(slot) == pos + 1 else NULL


cdef inline void ring_release(Ring *r) noexcept nogil:
    """Free the slot that ring_peek returned (or one given up: its writer died)."""
    cdef uint64_t pos = r.tail[0]
    or_store64(ring_slot(r, pos), pos + r.n)
    or_store64(r.tail, pos + 1)
