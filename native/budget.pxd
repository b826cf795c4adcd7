"""The budget of one request: what the stages have been costing, and what must give way for the rest to fit.

Costs are running means of one worker. Where they are not enough, native/shedding.pxd leaves stages out for a while.
"""
from libc.stdint cimport uint32_t, uint64_t

from native.arena cimport *
from native.base cimport *
from native.policy cimport Policy, RoutePolicy
from native.shedding cimport SHED_SHORT, shed_bits, shed_level
from native.worker cimport MARGIN_MOST, Worker, drift, spent_ns


cdef inline uint64_t stage_done(Worker *w, Decision *d, int stage, uint64_t since_ns) noexcept nogil:
    cdef uint64_t now = or_now_ns()
    cdef uint32_t ns = spent_ns(since_ns, now)
    d.stage_ns[stage] = ns | 1                    # 0 means: did not run
    if w.aged & (<uint32_t>1 << stage):
        # tried again after a long time: what it costs now counts, not what was left of an old estimate
        w.aged &= ~(<uint32_t>1 << stage)
        w.stage_ns[stage] = <float>min(ns, <uint32_t>200000)
    else:
        w.stage_ns[stage] = drift(w.stage_ns[stage], ns, 200000)
    w.since_stage_run[stage] = 0
    return now


cdef inline float left_ns(const Worker *w, uint64_t now_ns, uint64_t deadline_ns) noexcept nogil:
    """Time for stages before the deadline: what comes after them needs its own."""
    cdef float left = <float>(deadline_ns - now_ns) if deadline_ns > now_ns else 0.0
    left -= 1.25 * w.tail_ns + 500
    return left if left > 0 else 0.0


cdef inline uint32_t before_text(const Policy *p) noexcept nogil:
    """Bits of the trees that give way before the text does."""
    cdef uint32_t i, bits = 0
    for i in range(p.n_skip):
        if p.skip[i] == STAGE_TEXT:
            break
        if p.skip[i] < STAGES:
            bits |= <uint32_t>1 << p.skip[i]
    return bits & ((1 << STAGE_XGBOOST) | (1 << STAGE_FOREST))


cdef inline uint64_t text_deadline(const Worker *w, uint32_t todo, uint32_t shed, uint32_t budget_us, uint64_t now_ns,
                                   uint64_t deadline_ns) noexcept nogil:
    """When the text stage must stop. Behind it comes what it does after its deadline, and of the trees those in
    todo that don't give way before it."""
    cdef float left = left_ns(w, now_ns, deadline_ns) - 1.5 * w.text_late_ns
    left -= min(w.margin_ns, MARGIN_MOST * <float>budget_us * 1000)
    cdef uint32_t later = todo & ~before_text(&w.policy)
    cdef int i
    for i in range(STAGE_XGBOOST, STAGES):
        if later & (<uint32_t>1 << i):
            left -= w.stage_ns[i]
    if shed & SHED_SHORT:
        left *= 0.25
    return now_ns + (<uint64_t>left if left > 1 else 1)


cdef inline uint32_t plan_skips(Worker *w, uint32_t todo, uint64_t now_ns, uint64_t deadline_ns,
                                uint32_t text_bytes) noexcept nogil:
    """Which of the stages still to do must give way so that the rest fits before the deadline:
    bits of Stage, in the policy's order."""
    cdef float left = left_ns(w, now_ns, deadline_ns)
    cdef float need = 0
    cdef float cost[6]
    cdef uint32_t skip = 0
    cdef int i, stage
    for i in range(STAGES):
        cost[i] = 0
        if todo & (<uint32_t>1 << i):
            cost[i] = w.text_ns_per_byte * text_bytes if i == STAGE_TEXT else w.stage_ns[i]
            need += cost[i]
    for i in range(w.policy.n_skip):
        if need <= left:
            break
        stage = w.policy.skip[i]
        if stage < STAGES and todo & (<uint32_t>1 << stage) and not skip & (<uint32_t>1 << stage):
            if stage == STAGE_TEXT and left > 4000 and cost[STAGE_TEXT] > left:
                # part of the text is better than none: it stops by itself at the deadline
                need = need - cost[STAGE_TEXT]
                continue
            skip |= <uint32_t>1 << stage
            need -= cost[stage]
            if cost[stage] < left or left < 2000:
                continue                          # not by its own cost
            w.since_stage_run[stage] += 1
            if w.since_stage_run[stage] > 1000:
                # nothing runs, so nothing is measured: forget slowly, then try again
                w.stage_ns[stage] *= 0.5
                if stage == STAGE_TEXT:
                    w.text_ns_per_byte *= 0.5
                w.since_stage_run[stage] = 0
                w.aged |= <uint32_t>1 << stage
    if skip & (<uint32_t>1 << STAGE_TEXT):
        # without values there is nothing to describe
        skip |= todo & ((<uint32_t>1 << STAGE_XGBOOST) | (<uint32_t>1 << STAGE_FOREST))
    return skip


cdef inline uint32_t shed_stages(const Worker *w, const RoutePolicy *route) noexcept nogil:
    """What this route does without at present: as shed_bits."""
    cdef uint32_t bits = shed_bits(w.policy.skip, w.policy.n_skip, shed_level(&w.arena.control[route.slot]))
    if bits & (1 << STAGE_TEXT):
        # without values there is nothing to describe
        bits |= (1 << STAGE_XGBOOST) | (1 << STAGE_FOREST)
    return bits


cdef inline bint is_small(const Worker *w, const RoutePolicy *route, uint32_t text_bytes) noexcept nogil:
    """Will all stages together cost little: 50 us and an eighth of the budget at most? It isn't such requests that
    overrun, so shedding spares them: whoever makes a route overrun must not blind it for everybody."""
    cdef float ns = (w.stage_ns[STAGE_BEHAVIOUR] + w.text_ns_per_byte * text_bytes + w.stage_ns[STAGE_XGBOOST]
                     + w.stage_ns[STAGE_FOREST])
    return ns < 50000 and ns < 125.0 * route.budget_us


cdef inline void text_cost(Worker *w, float ns_per_byte, uint64_t until_ns, uint64_t now_ns) noexcept nogil:
    """Learn from a text just read, whole or up to its deadline."""
    ns_per_byte = min(ns_per_byte, 200)
    if not w.found.overrun:
        w.text_ns_per_byte += 0.05 * (ns_per_byte - w.text_ns_per_byte)
        return
    # so much for a part: all of it would have cost more. By steps: the thread may have been scheduled away
    if ns_per_byte > w.text_ns_per_byte:
        w.text_ns_per_byte = min(ns_per_byte, 1.25 * w.text_ns_per_byte)
    w.text_late_ns = drift(w.text_late_ns, now_ns - until_ns if now_ns > until_ns else 0, 20000)
