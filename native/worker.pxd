"""What one thread needs to decide: a Worker; how it follows the policy and the models; and how it hands a decision
on to the counters, the event ring and the judge.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from native.arena cimport *
from native.base cimport *
from native.clients cimport BUCKET_WAYS
from native.escalate cimport CLIENT_BURST_MS, SERVICE_BURST_US, payload_key, rate_take
from native.identity cimport header_value
from native.models cimport ModelSet, TreeScratch
from native.policy cimport *
from native.ring cimport ring_claim, ring_publish
from native.shedding cimport shed_note
from native.text cimport CHUNK_BYTES, TextResult, TextScratch, TextWorst


cdef enum:
    PREEMPTED_NS = 2000000       # later than this is the scheduler's doing, not a stage's
    PATH_BYTES = 65536           # of a path in its normal form; hosts keep fewer


cdef extern from *:
    """
    #define OR_MARGIN_MOST 0.4f
    """
    const float MARGIN_MOST "OR_MARGIN_MOST"    # of a budget that Worker.margin_ns may take


cdef struct ModelSlot:
    ModelSet *current            # swapped by the control plane; read through worker_models


cdef struct Worker:
    Arena *arena
    ModelSlot *slot
    ModelSet *in_use             # what this worker scores with now; the swapper waits for it to change
    CounterSlot *counters
    RouteCounters *route_counters    # ROUTES_MAX
    uint64_t policy_generation
    uint64_t random
    uint8_t unhurried            # no stage is skipped for lack of time: training, replay, tests
    float stage_ns[6]            # running mean cost of each stage
    float text_ns_per_byte
    float tail_ns                # what comes after the last stage
    float text_late_ns           # how long the text stage goes on after its deadline
    float margin_ns              # kept free so that few of the texts read up to their deadline overrun the budget
    uint32_t since_stage_run[6]  # decisions since a stage last ran: its estimate is aged when starved
    uint32_t aged                # bits of Stage: estimates halved since the stage last ran
    uint8_t without_policy       # the last decision was none: there was no policy to be had
    uint8_t anonymous            # look at the text alone: no principal is read from the headers
    uint8_t has_behaviour        # the row is of this request
    uint8_t secret               # its worst value's place names a secret
    float unusual                # the Isolation Forest's score of the row, calibrated; NaN where it wasn't run
    float behaviour[32]          # the last row, for training and for people
    TreeScratch trees
    TextScratch text
    TextResult found
    char token[4096]
    char path[65536]             # PATH_BYTES
    Policy policy


cdef inline void count(Worker *w, int what, uint64_t n) noexcept nogil:
    or_add64(&w.counters.value[what], n)


cdef inline bint worker_refresh(Worker *w) noexcept nogil:
    """Take over a new policy, if there is one. False while there never was any."""
    cdef uint64_t g = or_load64(&w.arena.head.policy_generation)
    cdef int _tries
    if g == 0:
        return False                              # none yet, or the file behind the arena has gone
    if g == w.policy_generation:
        return True
    for _tries in range(8):
        memcpy(&w.policy, &w.arena.policy[g & 1], sizeof(Policy))
        or_fence_acquire()
        if or_load64(&w.arena.head.policy_generation) == g and w.policy.generation == g:
            policy_bound(&w.policy)
            w.policy_generation = g
            return True
        g = or_load64(&w.arena.head.policy_generation)
    # the writer is faster than we copy: go on with the old one, whole, at the next request;
    # a torn copy must not be used
    policy_bound(&w.policy)
    w.policy_generation = 0
    return False


cdef inline ModelSet *worker_models(Worker *w) noexcept nogil:
    """The current models, marked as in use (a hazard pointer: write, then look again)."""
    cdef ModelSet *m
    cdef int _tries
    for _tries in range(16):
        m = <ModelSet *>or_load64(<uint64_t *>&w.slot.current)
        or_store64(<uint64_t *>&w.in_use, <uint64_t>m)
        or_fence_full()
        if <ModelSet *>or_load64(<uint64_t *>&w.slot.current) == m:
            return m
    or_store64(<uint64_t *>&w.in_use, 0)
    return NULL


cdef inline void worker_models_done(Worker *w) noexcept nogil:
    or_store64(<uint64_t *>&w.in_use, 0)


cdef extern from *:
    """
    static inline void or_fence_full(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    void or_fence_full() noexcept nogil


cdef inline void worker_init(Worker *w, Arena *arena, ModelSlot *slot) noexcept nogil:
    cdef uint64_t n
    memset(w, 0, sizeof(Worker))
    w.arena = arena
    w.slot = slot
    n = or_add64(&arena.head.next_slot, 1) % arena.n_slots
    w.counters = &arena.counters[n]
    w.random = mix64(or_now_ns() + n) | 1
    w.route_counters = &arena.route_counters[n * ROUTES_MAX]
    w.text_ns_per_byte = 20
    w.tail_ns = 1000
    w.text_late_ns = 2000
    for n in range(STAGES):
        w.stage_ns[n] = 3000


cdef inline uint32_t put_part(char *to, uint32_t room, Slice s) noexcept nogil:
    """As much of s as there is room for; returns how much that is."""
    cdef uint32_t n = s.n if s.n < room else room
    if n:
        memcpy(to, s.p, n)
    return n


cdef inline void fill_event(const Worker *w, const Request *r, const Decision *d, Event *e) noexcept nogil:
    memcpy(&e.decision, d, sizeof(Decision))
    e.has_address = r.has_address
    memcpy(e.address, r.address, 16)
    e.method_n = <uint8_t>put_part(e.method, 16, r.method)
    e.path_n = <uint16_t>put_part(e.path, 256, r.path)
    e.authority_n = <uint16_t>put_part(e.authority, 64, r.authority)
    e.agent_n = <uint16_t>put_part(e.agent, 128, header_value(r, b"user-agent", 10))
    e.route_n = w.policy.route[d.route].name_n
    memcpy(e.route, w.policy.route[d.route].name, NAME_MAX)


cdef inline void write_event(Worker *w, const Request *r, const Decision *d) noexcept nogil:
    cdef uint64_t position
    cdef Event *e = <Event *>ring_claim(&w.arena.events, &position)
    if e == NULL:
        count(w, COUNT_EVENTS_DROPPED, 1)
        return
    fill_event(w, r, d, e)
    ring_publish(e, position)
    count(w, COUNT_EVENTS, 1)


cdef inline void write_escalation(Worker *w, const Request *r, const Decision *d) noexcept nogil:
    """Hand the request and its worst value to the control plane, which cuts and redacts: no time for that here."""
    cdef uint64_t position
    cdef const TextWorst *worst = &w.text.worst
    cdef Slice part
    cdef Escalation *e = <Escalation *>ring_claim(&w.arena.escalations, &position)
    if e == NULL:
        count(w, COUNT_ESCALATIONS_DROPPED, 1)
        return
    fill_event(w, r, d, &e.event)
    e.why = d.escalate
    e.unusual = w.unusual
    e.has_behaviour = w.has_behaviour
    if w.has_behaviour:
        memcpy(e.behaviour, w.behaviour, sizeof(w.behaviour))
    e.type_n = <uint16_t>put_part(e.type, BODY_TYPE_MAX, header_value(r, b"content-type", 12))
    e.path_n = <uint16_t>put_part(e.target, TARGET_MAX, r.path)
    e.target_n = e.path_n
    if r.query.n and e.path_n < TARGET_MAX:
        e.target[e.path_n] = c'?'
        e.target_n = <uint16_t>(e.path_n + 1 + put_part(e.target + e.path_n + 1, TARGET_MAX - 1 - e.path_n, r.query))
    e.secret = 0
    e.text_n = 0
    e.payload_key = 0
    # the scratch holds this request's text only where its kernel ran and found some
    if d.raw_linear == d.raw_linear and worst.text_n:
        e.secret = w.secret
        if not w.secret:
            e.as_sent = worst.raw != w.text.kept
            part.p = <const char *>worst.raw
            part.n = worst.raw_bytes
            e.text_n = <uint16_t>put_part(e.text, CHUNK_BYTES, part)
            # of a text that nobody would have asked about alone there is no key: others send it, too
            if (d.score_text >= w.policy.route[d.route].payload_floor
                    and d.score_text >= w.policy.route[d.route].escalate_from):
                e.payload_key = payload_key(worst, w.arena.key)
    ring_publish(e, position)
    count(w, COUNT_ESCALATED, 1)


cdef inline float next_random(Worker *w) noexcept nogil:
    """Uniform in [0, 1), xorshift64*: for sampling only."""
    w.random ^= w.random >> 12
    w.random ^= w.random << 25
    w.random ^= w.random >> 27
    return <float>((w.random * <uint64_t>2685821657736338717u) >> 40) / 16777216.0


cdef inline uint64_t *key_place(const Arena *arena, uint32_t slot) noexcept nogil:
    """Where the key of this entry (index + 1) stands."""
    return &arena.buckets[(slot - 1) // BUCKET_WAYS].key[(slot - 1) % BUCKET_WAYS]


cdef inline int to_escalate(Worker *w, const RoutePolicy *route, const Decision *d) noexcept nogil:
    """Is the judge to be asked, and why? Not about what is refused anyway, nor about a secret's text that it isn't to
    see."""
    cdef float text = 0 if w.secret else d.score_text
    if d.action < ACTION_BLOCK:
        if w.unusual >= route.escalate_novel and not route.escalate_from <= text < route.escalate_to:
            return ESCALATED_NOVEL
        if text < d.score_behaviour:
            text = d.score_behaviour
        if route.escalate_from <= text < route.escalate_to:
            return ESCALATED_UNCERTAIN
    if route.escalate_sample > 0 and next_random(w) < route.escalate_sample:
        return ESCALATED_SAMPLED
    return ESCALATED_NOT


cdef inline bint may_escalate(Worker *w, const Decision *d) noexcept nogil:
    """Within the client's rate and the service's? The address counts where there is one: a principal is a claim, and
    there are as many as somebody likes."""
    cdef uint32_t slot = d.client_slot if d.client_slot else d.principal_slot
    cdef uint64_t key = d.client_key if d.client_slot else d.principal_key
    cdef uint64_t now_us = <uint64_t>d.time_us if d.time_us > 0 else 0
    if (slot and or_load64(key_place(w.arena, slot)) == key
            and not rate_take(&w.arena.entries[slot - 1].escalated_ms, <uint32_t>(now_us // 1000),
                              w.policy.escalate_client_ms, CLIENT_BURST_MS)):
        return False
    return rate_take(&w.arena.head.escalated_us, <uint32_t>now_us, w.policy.escalate_all_us, SERVICE_BURST_US)


cdef inline float drift(float mean, uint64_t ns, float most) noexcept nogil:
    """A running mean, one step on. An outlier (the thread was scheduled away) must not count for long."""
    return mean + 0.05 * ((<float>ns if ns < most else most) - mean)


cdef inline uint32_t spent_ns(uint64_t start_ns, uint64_t now_ns) noexcept nogil:
    cdef uint64_t ns = now_ns - start_ns
    return <uint32_t>(ns if ns < 4000000000u else 4000000000u)


cdef inline void text_margin(Worker *w, const Decision *d) noexcept nogil:
    """After a text read up to its deadline: keep more free if that overran, a little less if not. It settles where one
    in 150 overruns; interruptions by the machine come on top of what the stages cost."""
    cdef float budget = <float>d.budget_us * 1000
    if d.spent_ns > budget:
        w.margin_ns = min(w.margin_ns + 1000, MARGIN_MOST * budget)
    elif w.margin_ns >= 7:
        w.margin_ns -= 7


cdef inline void finish(Worker *w, const Request *r, Decision *d, uint64_t start_ns, uint64_t since_ns) noexcept nogil:
    """What is carried out, the counters, and the event. since_ns: when the last stage was done; 0: no stage but
    the lists was asked."""
    cdef const RoutePolicy *route = &w.policy.route[d.route]
    cdef RouteCounters *own = &w.route_counters[route.slot]
    cdef uint64_t now
    cdef uint32_t bit
    cdef bint wanted, over, in_part = d.skipped & (1 << STAGE_TEXT) and d.stage_ns[STAGE_TEXT]
    cdef int i
    d.enforced = d.action
    if d.mode == MODE_OBSERVE and d.action > ACTION_TAG:
        d.enforced = ACTION_TAG
    d.retry_after_s = w.policy.retry_after_s if d.enforced == ACTION_THROTTLE else 0
    count(w, COUNT_REQUESTS, 1)
    count(w, COUNT_ACTION + d.action, 1)
    count(w, COUNT_ENFORCED + d.enforced, 1)
    or_add64(&own.action[d.action], 1)
    if d.skipped:
        for i in range(STAGES):
            bit = <uint32_t>1 << i
            if d.skipped & bit:
                count(w, COUNT_SKIPPED + i, 1)
                or_add64(&own.skipped[i], 1)
                if d.shed & bit:
                    count(w, COUNT_SHED, 1)
                    or_add64(&own.shed[i], 1)
        if in_part:
            count(w, COUNT_TEXT_PART, 1)
            or_add64(&own.text_part, 1)
    for i in range(STAGES):
        if d.stage_ns[i]:
            or_add64(&own.stage[i][bucket_of_ns(d.stage_ns[i])], 1)
    now = or_now_ns()
    d.spent_ns = spent_ns(start_ns, now)
    wanted = d.action != ACTION_ALLOW or w.policy.allow_sample >= 1 or next_random(w) < w.policy.allow_sample
    if d.escalate:
        write_escalation(w, r, d)
    if wanted:
        write_event(w, r, d)
    if wanted or d.escalate:
        now = or_now_ns()                         # handing records on is part of the time taken
        d.spent_ns = spent_ns(start_ns, now)
    or_add64(&own.latency[or_fine_bucket(d.spent_ns)], 1)
    or_add64(&own.spent_ns, d.spent_ns)
    if d.budget_us:
        over = d.spent_ns > d.budget_us * <uint64_t>1000
        if over:
            count(w, COUNT_OVERRUNS, 1)
            or_add64(&own.overruns, 1)
        # what the lists have settled in no time says nothing about those that went through the stages
        if since_ns and w.policy.shed and not w.unhurried:
            # a thread that was scheduled away for milliseconds, or a request that was refused, is no reason to
            # leave anything out of the others
            over = over and d.enforced < ACTION_THROTTLE and d.spent_ns < d.budget_us * <uint64_t>1000 + PREEMPTED_NS
            shed_note(&w.arena.control[route.slot], over, now // 1000000, w.policy.skip, w.policy.n_skip,
                      w.policy.shed_hold_ms)
        if in_part:
            text_margin(w, d)
    if since_ns:
        w.tail_ns = drift(w.tail_ns, now - since_ns, 20000)
