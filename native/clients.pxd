"""The client table: who has called, in fixed memory.

Eight entries to a bucket, the keys of a bucket in one cache line. A new client takes the
place of the entry that is worth least, where worth is the number of its requests, halved
every ten minutes of idleness: an attacker who rotates addresses competes with his own
one-request entries for the cheapest place of each bucket and does not push out clients that
are in use.

Entries are guarded by a word that holds the time at which it was taken. A holder that died
or slept loses it after LOCK_STALE_MS; a taker never waits longer than LOCK_SPINS. What is
then lost is the accuracy of one client's statistics, never the progress of the others.
"""
from libc.math cimport exp2f
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from native.base cimport or_cas32, or_load64, or_now_ns, or_store64

cdef extern from *:
    """
    #if defined(__x86_64__)
    #define or_pause() __builtin_ia32_pause()
    #else
    #define or_pause() ((void)0)
    #endif
    """
    void or_pause() noexcept nogil

cdef enum:
    BUCKET_WAYS = 8
    WINDOWS = 5                  # 1 s, 10 s, 60 s, 600 s, 3600 s
    QUANTITIES = 11
    SKETCHES = 4
    LOCK_SPINS = 400
    LOCK_STALE_MS = 50
    WORTH_HALF_LIFE_US = 600000000
    CLOCK_BACK_US = 300000000    # a clock this far behind what was seen was set back; less is disorder
    PARTIES = 8                  # addresses remembered per principal

cdef enum:                       # WindowIndex
    WINDOW_1S = 0
    WINDOW_10S = 1
    WINDOW_60S = 2
    WINDOW_600S = 3
    WINDOW_3600S = 4

cdef enum:                       # Quantity
    Q_REQUESTS = 0
    Q_WRITES = 1                 # anything but GET, HEAD, OPTIONS
    Q_LOGINS = 2                 # attempts on what looks or is declared as a login
    Q_LOGIN_FAILURES = 3
    Q_DENIED = 4                 # 401 or 403 elsewhere
    Q_MISSING = 5                # 404 or 410
    Q_ERRORS = 6                 # 5xx
    Q_KILOBYTES = 7              # of the payloads
    Q_OBJECTS = 8                # requests that name an object by its id
    Q_OBJECTS_REFUSED = 9        # ... and were answered 401, 403, 404 or 410
    Q_ATTACKS = 10               # refused for their text

cdef enum:                       # SketchIndex
    SKETCH_PATHS = 0
    SKETCH_OBJECTS = 1
    SKETCH_IDENTITIES = 2        # principals, or user names tried at a login
    SKETCH_AGENTS = 3


cdef struct Window:
    int64_t epoch                # number of the current span: time / length
    float now[11]
    float before[11]


cdef struct Sketch:
    uint64_t now[4]              # linear counting over 256 bits
    uint64_t before[4]


cdef struct Party:
    # what was done in a principal's name from one address; the name is only a claim until the API has
    # looked at it, so what others do with it must not be held against everybody who bears it
    uint32_t address             # half of the address's key, 0: free
    uint8_t logins               # failed
    uint8_t faults               # answered 401, 403, 404 or 410 elsewhere
    uint8_t walked               # ids a step from the one before
    uint8_t objects              # requests that named an object


cdef struct ClientEntry:
    uint32_t lock
    uint32_t worth_count         # requests as of worth_us, before halving
    int64_t worth_us
    int64_t first_us
    int64_t last_us
    int64_t sketch_epoch
    Window window[5]
    Sketch sketch[4]
    uint64_t templates[2]        # 64-bit linear counting of object templates, now and before
    uint64_t attacked[2]         # 64 bits: paths on which attacks were seen, now and before
    uint64_t requests
    uint64_t last_object
    int64_t step                 # difference of the last two object ids
    uint32_t last_template
    uint32_t last_agent
    uint16_t step_run            # how often in a row that difference was the same
    uint16_t fail_streak         # login failures without a success between
    uint16_t agent_changes
    uint8_t held_action
    uint8_t held_kind            # DetectorKind
    float gap_mean               # of ln(ms between requests), exponentially weighted
    float gap_var
    float history_mean           # of ln(1 + requests per minute)
    float history_var
    float size_mean              # of ln(1 + payload bytes)
    float size_var
    float response_mean          # of ln(1 + response ms)
    float held_value
    int64_t held_until_us
    uint16_t held_reason
    uint16_t spare
    uint32_t escalated_ms        # when it has all of its escalations left (native/escalate.pxd)
    Party party[8]               # of a principal; halved as the sketches turn. Whole cache lines so far: keep it so


cdef struct Bucket:
    uint64_t key[8]              # 0: free


cdef inline uint64_t bucket_at(uint64_t key, uint32_t n_buckets) noexcept nogil:
    # the high half: the lowest bit of every key is set (0 means free)
    return (key >> 32) & (n_buckets - 1)


cdef inline uint32_t lock_stamp() noexcept nogil:
    return (<uint32_t>(or_now_ns() // 1000000) & 0x7fffffff) | <uint32_t>0x80000000


cdef inline int entry_lock(ClientEntry *e, uint32_t *mine) noexcept nogil:
    """1 taken, 2 taken from a holder that was gone, 0 let go. mine is what entry_unlock needs."""
    cdef int _spin
    cdef uint32_t seen, now
    mine[0] = lock_stamp()
    for _spin in range(LOCK_SPINS):
        seen = e.lock
        if seen == 0 and or_cas32(&e.lock, 0, mine[0]):
            return 1
        or_pause()
    now = lock_stamp()
    seen = e.lock
    if seen == 0:
        return 1 if or_cas32(&e.lock, 0, mine[0]) else 0
    if ((now - seen) & 0x7fffffff) > LOCK_STALE_MS:
        mine[0] = now
        return 2 if or_cas32(&e.lock, seen, now) else 0
    return 0


cdef inline void entry_unlock(ClientEntry *e, uint32_t mine) noexcept nogil:
    # fails, rightly, where somebody took it from us
    or_cas32(&e.lock, mine, 0)


cdef inline float entry_worth(const ClientEntry *e, int64_t now_us) noexcept nogil:
    cdef int64_t idle = now_us - e.worth_us
    if idle <= 0:
        # from a clock that was ahead: nothing known, else such entries could never be evicted
        return <float>e.worth_count if idle > -CLOCK_BACK_US else 0.0
    return <float>e.worth_count * exp2f(-<float>idle / <float>WORTH_HALF_LIFE_US)


cdef inline void entry_touch(ClientEntry *e, int64_t now_us) noexcept nogil:
    """Count one more request into the entry's worth. Worth is aged only now and then, so that
    the halving doesn't cost an exp2 per request."""
    if now_us - e.worth_us > WORTH_HALF_LIFE_US // 8:
        e.worth_count = <uint32_t>entry_worth(e, now_us)
        e.worth_us = now_us
    if e.worth_count < 1000000:
        e.worth_count += 1


cdef inline void entry_reset(ClientEntry *e, int64_t now_us) noexcept nogil:
    cdef uint32_t lock = e.lock
    memset(e, 0, sizeof(ClientEntry))
    e.lock = lock
    e.first_us = now_us
    e.worth_us = now_us


cdef inline ClientEntry *client_find(Bucket *buckets, ClientEntry *entries, uint32_t n_buckets, uint64_t key,
                                     uint32_t *slot) noexcept nogil:
    """The entry of this key, not locked, or NULL."""
    cdef uint64_t at = bucket_at(key, n_buckets)
    cdef Bucket *b = &buckets[at]
    cdef int i
    for i in range(BUCKET_WAYS):
        if or_load64(&b.key[i]) == key:
            slot[0] = <uint32_t>(at * BUCKET_WAYS + i + 1)
            return &entries[at * BUCKET_WAYS + i]
    return NULL


cdef inline ClientEntry *client_take(Bucket *buckets, ClientEntry *entries, uint32_t n_buckets, uint64_t key,
                                     int64_t now_us, uint32_t *slot, uint32_t *mine, int *how) noexcept nogil:
    """The locked entry of this key, found or claimed; NULL where it could not be had in time.

    how: bit 0 claimed, bit 1 somebody was evicted for it, bit 2 a lock was taken from a gone
    holder, bit 3 contended. Two threads that claim the same new key at once may make two
    entries of it; the first of the bucket is then used and the other ages away.
    """
    cdef uint64_t at = bucket_at(key, n_buckets)
    cdef Bucket *b = &buckets[at]
    cdef ClientEntry *e
    cdef int i, _tries, victim, got
    cdef float worth, least
    cdef uint64_t old
    how[0] = 0
    for _tries in range(3):
        e = client_find(buckets, entries, n_buckets, key, slot)
        if e != NULL:
            got = entry_lock(e, mine)
            if got == 0:
                how[0] |= 8
                return NULL
            if got == 2:
                how[0] |= 4
            if or_load64(&b.key[slot[0] - 1 - at * BUCKET_WAYS]) == key:
                return e
            entry_unlock(e, mine[0])        # evicted between the look and the lock
            continue
        victim = -1
        least = 0
        for i in range(BUCKET_WAYS):
            if or_load64(&b.key[i]) == 0:
                victim = i
                break
            worth = entry_worth(&entries[at * BUCKET_WAYS + i], now_us)
            if victim < 0 or worth < least:
                victim = i
                least = worth
        old = or_load64(&b.key[victim])
        e = &entries[at * BUCKET_WAYS + victim]
        got = entry_lock(e, mine)
        if got == 0:
            how[0] |= 8
            return NULL
        if got == 2:
            how[0] |= 4
        if or_load64(&b.key[victim]) != old:
            entry_unlock(e, mine[0])
            continue
        entry_reset(e, now_us)
        or_store64(&b.key[victim], key)
        slot[0] = <uint32_t>(at * BUCKET_WAYS + victim + 1)
        how[0] |= 1 | (2 if old else 0)
        return e
    how[0] |= 8
    return NULL
