"""What of a request goes to the judge: how many may, and the key under which a text is known.

Who is asked about is decided in `worker_decide` (native/engine.pxd); the record is written by native/worker.pxd.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from native.base cimport or_cas32, or_load32, siphash24
from native.textdefs cimport TextWorst

cdef enum:
    CLIENT_BURST_MS = 60000      # a client's rate is per minute,
    SERVICE_BURST_US = 1000000   # the service's per second

cdef extern from *:
    """
    #define OR_PAYLOAD_DOMAIN 0x7061796c6f616421ull  /* "payload!": texts and clients share no keys */
    """
    const uint64_t OR_PAYLOAD_DOMAIN


cdef inline bint rate_take(uint32_t *full_at, uint32_t now, uint32_t least, uint32_t burst) noexcept nogil:
    """One more, every `least` on average and burst / least at once? A token bucket in one word: the time at which it is
    full again, 0 for full. Times wrap. Never waits: where others keep moving the word, no."""
    cdef uint32_t seen, ahead
    cdef int _tries
    for _tries in range(4):
        seen = or_load32(full_at)
        ahead = seen - now
        # further ahead than it ever is put: long past, or left by a clock that was set back since
        if seen == 0 or ahead > burst + 1:
            ahead = 0
        if ahead + least > burst:
            return False
        ahead += now + least
        if or_cas32(full_at, seen, ahead if ahead else 1):
            return True
    return False


cdef inline uint64_t payload_key(const TextWorst *worst, const uint64_t *key) noexcept nogil:
    """Keyed hash of the worst window as the kernel reads it (decoded, lower case, blanks folded), each number in it
    as 0: the same for the same payload with other numbers. 0 where there is no window."""
    cdef uint8_t text[168]
    cdef uint32_t i, n = 0
    cdef uint8_t c, last = 0
    if worst.text_n == 0:
        return 0
    for i in range(min(worst.text_n, 168)):
        c = worst.text[i]
        if c'0' <= c <= c'9':
            if last == c'0':
                continue
            c = c'0'
        text[n] = c
        n += 1
        last = c
    return siphash24(<const char *>text, n, key[0], key[1] ^ OR_PAYLOAD_DOMAIN) | 1
