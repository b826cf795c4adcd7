"""When a route gives up optional stages for good, and when it takes them back.

The budget of one request is kept by estimates (plan_skips in native/budget.pxd). Where that isn't enough - a slow or
crowded machine, costs that scatter - more than one request in a hundred overruns, and the route *sheds*: the first
stages of the policy's skip order are left out of all its requests, one more after each bad window; the text is first
given a quarter of its time, since the begin of a request is better than nothing. Shed stages come back one at a time,
on trial, after a hold-off that doubles with each trial that fails.

The state is two words per route in the arena, shared by all workers of all processes and needing no control plane.
Whoever's request completes a window takes it out by compare-and-swap and is the one who judges it; dying in between
loses that one window. Nothing is ever held.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from native.base cimport STAGE_TEXT, STAGES, or_add64, or_cas64, or_load64, or_store64

cdef enum:
    SHED_WINDOW_REQUESTS = 2000  # a window is judged when it is full ...
    SHED_WINDOW_OVERRUNS = 20    # ... or has more overruns than a full one may have (1%) ...
    SHED_WINDOW_MS = 10000       # ... or is this old and has the fewest that say anything
    SHED_REQUESTS_MIN = 200
    SHED_QUIET_MS = 60000        # a route that few ask for is judged by so long without any overrun
    SHED_HOLD_MS_MAX = 300000    # between trials, at most (unless the policy's first hold-off is longer)
    SHED_DOUBLINGS_MAX = 15
    SHED_SHORT = 1 << 16         # beside bits of Stage: a quarter of the time for the text
    SHED_TRIAL = 256             # bit of RouteControl.state: the last change took a stage back


cdef struct RouteControl:
    uint64_t window              # requests, and overruns << 32, since the last judgement
    uint64_t opened_ms           # when it began; monotonic clock, 0: never
    uint64_t state               # level (4 bits), doublings (4), SHED_TRIAL, when it last changed (ms << 16)
    uint64_t shed                # times a stage was shed
    uint64_t taken_back          # times one was taken back on trial
    uint64_t pad[3]              # a cache line


cdef inline uint32_t shed_level(const RouteControl *c) noexcept nogil:
    """How far the route has gone along the skip order (shed_bits); may be further than it is long."""
    return <uint32_t>(or_load64(&c.state) & 15)


cdef inline uint64_t shed_hold_ms(uint64_t state, uint32_t first_ms) noexcept nogil:
    """How long the level stays as it is before a stage is tried again."""
    cdef uint64_t most = SHED_HOLD_MS_MAX if first_ms < SHED_HOLD_MS_MAX else first_ms
    cdef uint64_t ms = <uint64_t>first_ms << (state >> 4 & 15)
    return ms if ms < most else most


cdef inline uint64_t shed_after(uint64_t state, uint32_t requests, uint32_t overruns, uint64_t now_ms,
                                uint32_t levels, uint32_t first_ms) noexcept nogil:
    """The state after a window. levels: stages that may be shed; first_ms: the shortest hold-off.

    Bad: more than 1% overran. Good: at most half a percent. In between the level stays."""
    cdef uint64_t level = state & 15, doublings = state >> 4 & 15, changed = state >> 16
    cdef uint64_t hold = shed_hold_ms(state, first_ms)
    cdef uint64_t age
    if level > levels:
        level = levels                            # the policy names fewer stages than it did
    if changed > now_ms:
        changed = 0                               # of before a restart of the machine
    age = now_ms - changed
    if <uint64_t>overruns * 100 > requests:
        if level >= levels:
            return (state & ~<uint64_t>15) | level
        if state & SHED_TRIAL and age < 2 * hold:
            doublings = doublings + 1 if doublings < SHED_DOUBLINGS_MAX else doublings
        elif age >= 2 * hold:
            doublings = 0                         # that it went well for so long makes it a new trouble
        return level + 1 | doublings << 4 | now_ms << 16
    if level and <uint64_t>overruns * 200 <= requests and age >= hold:
        return level - 1 | doublings << 4 | SHED_TRIAL | now_ms << 16
    return (state & ~<uint64_t>15) | level


cdef inline uint32_t shed_levels(const uint8_t *skip, uint32_t n_skip) noexcept nogil:
    """How many levels this order of skipping has: one per stage, and one for a text that is cut short first."""
    cdef uint32_t i, levels = n_skip
    for i in range(n_skip):
        if skip[i] == STAGE_TEXT:
            return levels + 1
    return levels


cdef inline bint shed_note(RouteControl *c, bint overran, uint64_t now_ms, const uint8_t *skip, uint32_t n_skip,
                           uint32_t first_ms) noexcept nogil:
    """Count one request that went through the stages; judge the window where that completes it. True where the
    level changed."""
    cdef uint64_t one = <uint64_t>1 | <uint64_t>overran << 32
    cdef uint64_t seen = or_add64(&c.window, one) + one
    cdef uint64_t opened = or_load64(&c.opened_ms), state, fresh
    cdef uint32_t requests = <uint32_t>seen, overruns = <uint32_t>(seen >> 32)
    if opened == 0 or opened > now_ms:
        or_cas64(&c.opened_ms, opened, now_ms)
        return False
    if (requests < SHED_WINDOW_REQUESTS and overruns <= SHED_WINDOW_OVERRUNS
            and (requests < SHED_REQUESTS_MIN or now_ms - opened < SHED_WINDOW_MS)
            and (overruns or now_ms - opened < SHED_QUIET_MS)):
        return False
    if not or_cas64(&c.window, seen, 0):
        return False                              # another request came: it is the one that sees the window full
    or_store64(&c.opened_ms, now_ms)
    state = or_load64(&c.state)
    fresh = shed_after(state, requests, overruns, now_ms, shed_levels(skip, n_skip), first_ms)
    if fresh == state or not or_cas64(&c.state, state, fresh):
        return False
    if (fresh & 15) > (state & 15):
        or_add64(&c.shed, 1)
    elif (fresh & 15) < (state & 15):
        or_add64(&c.taken_back, 1)
    return (fresh & 15) != (state & 15)


cdef inline uint32_t shed_bits(const uint8_t *skip, uint32_t n_skip, uint32_t level) noexcept nogil:
    """What goes at this level: bits of Stage, and SHED_SHORT where the text is cut short but not left out."""
    cdef uint32_t i, bits = 0
    for i in range(n_skip):
        if level == 0:
            break
        level -= 1
        if skip[i] == STAGE_TEXT:
            if level == 0:
                return bits | SHED_SHORT
            level -= 1
        if skip[i] < STAGES:
            bits |= <uint32_t>1 << skip[i]
    return bits
