"""The core as proxies' plugins host it: what native/plugins/outrider.h promises.

This file is compiled to C and linked into an Envoy or NGINX module without an interpreter: nothing here may need one.
`or_headers_done`, `or_body` and `or_response` are a request's way; `look_after` is what the watching thread does
four times a second; everything else is between them.

Who may touch what: a *site* is shared by all threads of the process, its `current` attachment is exchanged by the
watcher only. A *thread* has a worker, a pool and requests of its own. It marks the attachment that it is about to use
(a hazard pointer), and the watcher unmaps a retired one when no thread has it marked.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memchr, memcmp, memcpy, memset, strlen

from native.address cimport forwarded_add
from native.arena cimport (COUNT_ATTACHED, COUNT_UNJUDGED_CLOSED, COUNT_UNJUDGED_OPEN, MODEL_PATH_MAX, Arena,
                           arena_close, arena_open)
from native.base cimport (ACTION_BLOCK, ACTION_THROTTLE, BODY_PART, BODY_WHOLE, PLACE_MAX, REASONS_MAX, Slice, or_add64,
                          or_cas64, or_fence_acquire, or_load64, or_now_ns, or_store64, or_unix_us, slice_is_nocase)
from native.extproc_pool cimport (BODY_MODE_STREAMED, PHASE_BODY, PHASE_DECIDED, PHASE_REFUSED, PHASE_RESPONSE,
                                  UPGRADE_FRAMED, Answer,
                                  ExtProcHost, StreamPool, StreamState, pool_init_states, stream_free, stream_open)
from native.host cimport host_init, host_refresh, models_fit
from native.inspect cimport (body_wanted, decide, decide_on_kept, find_client, keep_headers, split_path, take_body,
                             take_request_header, told)
from native.models cimport ModelSet, modelset_close, modelset_open
from native.reasons cimport or_reason_name
from native.worker cimport ModelSlot, Worker, or_fence_full, worker_init, worker_refresh
from native.wording cimport (bounded, escape_place, hex64, is_ours, number_text, or_action_name, or_details, printable,
                             score_text)

cdef extern from "outrider.h":
    ctypedef struct or_site:
        pass
    ctypedef struct or_request:
        pass
    ctypedef struct or_text:
        const char *p
        size_t n
    ctypedef struct or_field:
        or_text name
        or_text value
    ctypedef struct or_answer:
        uint32_t status
        int grpc_status
        or_text body
        or_text details
        size_t n_fields
        const or_field *fields
    ctypedef struct or_record:
        int is_decided
        int tell
        or_text action
        or_text enforced
        or_text mode
        or_text id
        or_text score
        double score_number
        or_text route
        or_text place
        size_t n_reasons
        or_text *reasons
        or_text reasons_list
        double spent_us
    ctypedef enum or_verdict:
        OR_PASS
        OR_REFUSE
        OR_HOLD
        OR_READ
    ctypedef void (*or_log_fn)(void *ctx, int level, const char *text, size_t n) noexcept nogil
    int OR_LOG_INFO, OR_LOG_WARNING, OR_LOG_ERROR

cdef extern from "system.h":
    ctypedef struct or_watcher:
        int running
    enum:
        OR_SITES_MAX
    void *or_thread_get(uint32_t site) noexcept nogil
    void or_thread_set(uint32_t site, void *thread) noexcept nogil
    int or_watcher_start(or_watcher *w, void (*tick)(void *) noexcept nogil, void *arg,
                         unsigned every_ms) noexcept nogil
    void or_watcher_stop(or_watcher *w) noexcept nogil
    int or_guard_add(void *base, uint64_t bytes) noexcept nogil
    bint or_guard_lost(int i) noexcept nogil
    void or_guard_drop(int i) noexcept nogil
    bint or_is_planted(const char *path, uint32_t owner) noexcept nogil
    int or_path_is(const char *path, uint64_t *device, uint64_t *inode, int64_t *bytes) noexcept nogil

cdef enum:                       # what is complained of
    OF_ARENA
    OF_MODELS

cdef enum:
    ARENA_PATH_MAX = 1024
    REQUESTS_MAX = 65536         # in progress, per thread
    KEPT_BYTES_MAX = 67108864    # of headers and bodies that wait, per thread
    RETIRED_MAX = 8              # attachments or model sets that some thread still uses
    WATCH_EVERY_MS = 250
    MODELS_AWAITED = 40          # looks at a new arena before it is taken without models, where one is attached
    MODELS_AGAIN = 20            # looks between two tries of models that were refused
    TEXT_MAX = 512               # of a log line


cdef struct Attachment:
    Arena arena
    uint64_t number              # of its site, from 1: an address may come again, this doesn't
    ModelSlot slot
    uint64_t models_tried        # generation last loaded or refused
    uint32_t models_wait         # looks before a refused one is tried again: it may have been put in order
    ModelSet *retired[8]
    uint32_t n_retired
    int guard


cdef struct Site


cdef struct Thread


cdef struct PluginRequest:
    PluginRequest *next          # in the free list
    Site *site
    Thread *thread               # NULL: the spare one
    StreamState *stream
    uint64_t epoch
    uint8_t verdict
    uint8_t unjudged             # follows the failure mode
    uint8_t is_read              # the body is passed on while it is read
    uint8_t has_method
    or_answer answer
    or_record record
    or_field fields[3]
    char id_text[16]
    char score_text[6]
    char number[10]
    char place[384]
    char list[160]


cdef struct Thread:
    Thread *next                 # of the same site
    Site *site
    Attachment *in_use           # what this thread is in the middle of using, NULL between calls
    uint64_t epoch               # Attachment.number of what the worker was made for: older tickets are worth nothing
    Worker *worker
    ExtProcHost host
    StreamPool pool
    PluginRequest *free_request


cdef struct Site:
    uint32_t index
    uint32_t fail_closed
    char path[1024]
    or_log_fn log
    void *log_ctx
    Attachment *current
    Attachment *retired[8]
    uint32_t n_retired
    uint64_t attachments         # made so far
    uint64_t awaited_inode
    uint32_t awaited             # looks at an arena that is not complete yet
    Thread *threads
    uint64_t unjudged            # without an arena to count in
    uint64_t said[2]             # by topic, hash of the last complaint: each is made once
    or_watcher watcher
    PluginRequest spare          # of threads that have no memory for one: stateless, follows the failure mode


cdef Site *sites[16]             # OR_SITES_MAX
cdef uint32_t n_sites


# ---- texts ------------------------------------------------------------------------------------------

cdef inline or_text text_of(const char *p) noexcept nogil:
    cdef or_text t
    t.p = p
    t.n = strlen(p)
    return t


cdef inline or_text text_part(const char *p, size_t n) noexcept nogil:
    cdef or_text t
    t.p = p
    t.n = n
    return t


cdef void say(Site *site, int level, const char *text) noexcept nogil:
    """One line to the proxy's log. What it names (paths) may hold anything: only printable bytes go through."""
    cdef char line[512]
    cdef size_t n = strlen(text)
    cdef size_t i
    if n > TEXT_MAX:
        n = TEXT_MAX
    for i in range(n):
        line[i] = text[i] if 32 <= <uint8_t>text[i] < 127 else c'?'
    site.log(site.log_ctx, level, line, n)


cdef void complain(Site *site, uint32_t topic, int level, const char *text) noexcept nogil:
    """say(), once for the same text in a row of a topic: the watcher meets it four times a second."""
    cdef uint64_t h = <uint64_t>0xcbf29ce484222325u
    cdef const char *p = text
    while p[0]:
        h = (h ^ <uint8_t>p[0]) * <uint64_t>0x100000001b3u
        p += 1
    if h != site.said[topic]:
        site.said[topic] = h
        say(site, level, text)


# ---- the arena comes and goes (the watcher's thread) -----------------------------------------------------------

cdef bint is_used(const Site *site, const Attachment *a) noexcept nogil:
    cdef Thread *t = <Thread *>or_load64(<uint64_t *>&site.threads)
    while t != NULL:
        if <Attachment *>or_load64(<uint64_t *>&t.in_use) == a:
            return True
        t = t.next
    return False


cdef bint scores_with(const Site *site, const ModelSet *m) noexcept nogil:
    cdef Thread *t = <Thread *>or_load64(<uint64_t *>&site.threads)
    while t != NULL:
        if t.worker != NULL and <ModelSet *>or_load64(<uint64_t *>&t.worker.in_use) == m:
            return True
        t = t.next
    return False


cdef void sweep_models(Site *site, Attachment *a) noexcept nogil:
    cdef uint32_t i, kept = 0
    or_fence_full()
    for i in range(a.n_retired):
        if scores_with(site, a.retired[i]):
            a.retired[kept] = a.retired[i]
            kept += 1
        else:
            modelset_close(a.retired[i])
            free(a.retired[i])
    a.n_retired = kept


cdef void close_attachment(Attachment *a) noexcept nogil:
    cdef uint32_t i
    for i in range(a.n_retired):
        modelset_close(a.retired[i])
        free(a.retired[i])
    if a.slot.current != NULL:
        modelset_close(a.slot.current)
        free(a.slot.current)
    or_guard_drop(a.guard)
    arena_close(&a.arena)
    free(a)


cdef void sweep(Site *site) noexcept nogil:
    """Close what nobody uses any more."""
    cdef uint32_t i, kept = 0
    or_fence_full()
    for i in range(site.n_retired):
        if is_used(site, site.retired[i]):
            site.retired[kept] = site.retired[i]
            kept += 1
        else:
            close_attachment(site.retired[i])
    site.n_retired = kept


cdef void exchange(Site *site, Attachment *fresh) noexcept nogil:
    """fresh (NULL: none) is what threads take from now on. The caller has ensured that there is room among the
    retired."""
    cdef Attachment *old = site.current
    or_store64(<uint64_t *>&site.current, <uint64_t>fresh)
    if old != NULL:
        site.retired[site.n_retired] = old
        site.n_retired += 1


cdef void follow_models(Site *site, Attachment *a) noexcept nogil:
    """Open the models that the sidecar has published, where they aren't those in use. Whatever is wrong with them,
    those in use stay."""
    cdef char folder[3072]
    cdef char published[1024]
    cdef char err[1024]
    cdef char line[512]
    cdef uint64_t generation = or_load64(&a.arena.models.generation)
    cdef ModelSet *fresh
    cdef ModelSet *old = a.slot.current
    cdef size_t n = 0
    cdef int ok
    if a.n_retired:
        sweep_models(site, a)
    if a.models_wait:
        a.models_wait -= 1
        if a.models_wait == 0 and generation == a.models_tried:
            a.models_tried = 0
    if generation == 0 or generation == a.models_tried or a.n_retired == RETIRED_MAX:
        return
    memcpy(published, a.arena.models.path, MODEL_PATH_MAX)
    or_fence_acquire()
    if or_load64(&a.arena.models.generation) != generation or memchr(published, 0, MODEL_PATH_MAX) == NULL:
        return                                    # being written: at the next look
    a.models_tried = generation
    if published[0] != c'/':
        # as it is written down beside the arena: containers see the same volume under different names
        n = strlen(site.path)
        while n and site.path[n - 1] != c'/':
            n -= 1
        memcpy(folder, site.path, n)
    memcpy(folder + n, published, strlen(published) + 1)
    fresh = <ModelSet *>calloc(1, sizeof(ModelSet))
    if fresh == NULL:
        complain(site, OF_MODELS, OR_LOG_ERROR, "no memory for new models; going on with those in use")
        return
    ok = modelset_open(folder, a.arena.owner, fresh, err, sizeof(err))
    if ok == 0 and not models_fit(fresh):
        modelset_close(fresh)
        snprintf(err, sizeof(err), "%.700s: made for other behaviour rows than this plugin's; build the plugin anew",
                 folder)
        ok = -1
    if ok != 0:
        free(fresh)
        a.models_wait = MODELS_AGAIN
        snprintf(line, sizeof(line), "models refused, %s: %.380s",
                 <const char *>"going on with those in use" if old != NULL else
                 <const char *>"lists and detectors decide alone", err)
        complain(site, OF_MODELS, OR_LOG_ERROR, line)
        return
    a.models_wait = 0
    # A few 512-bit instructions per request slow down all that the proxy does in between: measured in Envoy, they cost
    # some 4 us a request, where the portable walk of the trees costs one. Worth it only in a process of our own.
    fresh.xgboost.packed.wide = fresh.forest.packed.wide = fresh.isolation.packed.wide = 0
    or_store64(<uint64_t *>&a.slot.current, <uint64_t>fresh)
    if old != NULL:
        a.retired[a.n_retired] = old
        a.n_retired += 1
    snprintf(line, sizeof(line), "models %016llx loaded", <unsigned long long>generation)
    say(site, OR_LOG_INFO, line)


cdef uint64_t flush_unjudged(Site *site, Attachment *a) noexcept nogil:
    """Count in the arena what followed the failure mode; returns how many."""
    cdef uint64_t missed = or_load64(&site.unjudged)
    while not or_cas64(&site.unjudged, missed, 0):
        missed = or_load64(&site.unjudged)
    if missed:
        or_add64(&a.arena.counters[0].value[COUNT_UNJUDGED_CLOSED if site.fail_closed else COUNT_UNJUDGED_OPEN],
                 missed)
    return missed


cdef void attach(Site *site) noexcept nogil:
    """Open what stands at the site's path and make it current, where it can be."""
    cdef char err[256]
    cdef char line[512]
    cdef Attachment *a
    cdef uint64_t missed
    if site.n_retired == RETIRED_MAX:
        return
    a = <Attachment *>calloc(1, sizeof(Attachment))
    if a == NULL:
        return
    a.guard = -1
    if arena_open(site.path, &a.arena, err, sizeof(err)) != 0:
        snprintf(line, sizeof(line), "arena %.200s: %.200s", site.path, err)
        complain(site, OF_ARENA, OR_LOG_ERROR, line)
        free(a)
        return
    if or_is_planted(site.path, a.arena.owner):
        snprintf(line, sizeof(line), "arena %.200s belongs to user %u, and anybody may put files into its folder: it "
                 "isn't used; give it a folder of the sidecar's own", site.path, <unsigned>a.arena.owner)
        complain(site, OF_ARENA, OR_LOG_ERROR, line)
        arena_close(&a.arena)
        free(a)
        return
    a.guard = or_guard_add(a.arena.base, a.arena.bytes)
    if a.guard < 0:
        complain(site, OF_ARENA, OR_LOG_ERROR, "too many arenas in this process: the arena is not used")
        arena_close(&a.arena)
        free(a)
        return
    if site.awaited_inode != a.arena.inode:
        site.awaited_inode = a.arena.inode
        site.awaited = 0
    if or_load64(&a.arena.head.policy_generation) == 0:
        close_attachment(a)                       # a sidecar is making it ready
        return
    follow_models(site, a)
    if (a.slot.current == NULL and site.current != NULL and site.current.slot.current != NULL
            and site.awaited < MODELS_AWAITED):
        # what is attached decides, with its models, until these are there
        site.awaited += 1
        close_attachment(a)
        return
    site.awaited = 0
    site.attachments += 1
    a.number = site.attachments
    exchange(site, a)
    missed = flush_unjudged(site, a)
    or_add64(&a.arena.counters[0].value[COUNT_ATTACHED], 1)
    site.said[<uint32_t>OF_ARENA] = site.said[<uint32_t>OF_MODELS] = 0
    snprintf(line, sizeof(line), "arena %.200s attached%s, %llu requests followed the failure mode before", site.path,
             <const char *>"" if a.slot.current != NULL else <const char *>" (without models yet)",
             <unsigned long long>missed)
    say(site, OR_LOG_INFO, line)


cdef void look_after(void *arg) noexcept nogil:
    """What the watcher does at each look: is the arena still there, is there a new one, are there new models?"""
    cdef Site *site = <Site *>arg
    cdef Attachment *a = site.current
    cdef char line[512]
    cdef uint64_t device = 0, inode = 0
    cdef int64_t n = 0
    cdef int there = or_path_is(site.path, &device, &inode, &n)
    cdef bint same = a != NULL and there == 0 and device == a.arena.device and inode == a.arena.inode
    if site.n_retired:
        sweep(site)
    if a != NULL and site.n_retired < RETIRED_MAX and (
            or_guard_lost(a.guard) or (same and n < <int64_t>a.arena.bytes)):
        snprintf(line, sizeof(line), "arena %.200s was cut short by somebody: let go; requests are %s until there is a "
                 "whole one", site.path,
                 <const char *>"refused" if site.fail_closed else <const char *>"passed unjudged")
        complain(site, OF_ARENA, OR_LOG_ERROR, line)
        exchange(site, NULL)
        a = NULL
        same = False
    if there != 0:
        if a == NULL:
            snprintf(line, sizeof(line), "arena %.200s isn't there: requests are %s until the sidecar makes it",
                     site.path, <const char *>"refused" if site.fail_closed else <const char *>"passed unjudged")
        else:
            snprintf(line, sizeof(line), "arena %.200s was removed: going on with what is known", site.path)
        complain(site, OF_ARENA, OR_LOG_WARNING, line)
    elif not same:
        attach(site)
    a = site.current
    if a != NULL:
        flush_unjudged(site, a)
        follow_models(site, a)


# ---- threads and requests --------------------------------------------------------------------------------------

cdef Thread *thread_of(Site *site) noexcept nogil:
    """This thread's, made when it first asks; NULL: no memory."""
    cdef Thread *t = <Thread *>or_thread_get(site.index)
    if t != NULL:
        return t
    t = <Thread *>calloc(1, sizeof(Thread))
    if t == NULL:
        return NULL
    t.worker = <Worker *>calloc(1, sizeof(Worker))
    if t.worker == NULL:
        free(t)
        return NULL
    t.site = site
    pool_init_states(&t.pool, REQUESTS_MAX, KEPT_BYTES_MAX)
    t.next = <Thread *>or_load64(<uint64_t *>&site.threads)
    while not or_cas64(<uint64_t *>&site.threads, <uint64_t>t.next, <uint64_t>t):
        t.next = <Thread *>or_load64(<uint64_t *>&site.threads)
    or_thread_set(site.index, t)
    return t


cdef bint enter(Thread *t) noexcept nogil:
    """Mark the current attachment as in use and make the worker its own. False: there is none with a policy."""
    cdef Attachment *a
    cdef int _tries
    for _tries in range(16):
        a = <Attachment *>or_load64(<uint64_t *>&t.site.current)
        if a == NULL:
            return False
        or_store64(<uint64_t *>&t.in_use, <uint64_t>a)
        or_fence_full()
        if <Attachment *>or_load64(<uint64_t *>&t.site.current) == a:
            break
    else:
        leave(t)
        return False
    if t.epoch != a.number:
        worker_init(t.worker, &a.arena, &a.slot)
        host_init(&t.host, t.worker)
        t.epoch = a.number
    if not worker_refresh(t.worker):
        leave(t)
        return False
    host_refresh(&t.host)
    return True


cdef inline void leave(Thread *t) noexcept nogil:
    or_store64(<uint64_t *>&t.in_use, 0)


cdef void note_unjudged(PluginRequest *r) noexcept nogil:
    r.unjudged = 1
    r.verdict = OR_REFUSE if r.site.fail_closed else OR_PASS
    or_add64(&r.site.unjudged, 1)


cdef or_verdict verdict_of(PluginRequest *r) noexcept nogil:
    """Of a request that was just decided. Where the policy vanished meanwhile, nobody has judged it."""
    if r.thread.worker.without_policy:
        note_unjudged(r)
        return <or_verdict>r.verdict
    r.verdict = OR_REFUSE if r.stream.phase == PHASE_REFUSED else OR_PASS
    return <or_verdict>r.verdict


cdef public or_request *or_open(or_site *opaque) noexcept nogil:
    cdef Site *site = <Site *>opaque
    cdef Thread *t = thread_of(site)
    cdef PluginRequest *r
    if t == NULL:
        return <or_request *>&site.spare
    r = t.free_request
    if r != NULL:
        t.free_request = r.next
    else:
        r = <PluginRequest *>calloc(1, sizeof(PluginRequest))
        if r == NULL:
            return <or_request *>&site.spare
    r.stream = stream_open(&t.pool)
    if r.stream == NULL:
        r.next = t.free_request
        t.free_request = r
        return <or_request *>&site.spare
    r.site = site
    r.thread = t
    r.epoch = 0
    r.verdict = OR_PASS
    r.unjudged = 0
    r.is_read = 0
    if enter(t):
        leave(t)                                  # so that address rules and trusted hops are this policy's
    return <or_request *>r


cdef public void or_header(or_request *opaque, const char *name, size_t name_n, const char *value,
                           size_t value_n) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Slice n, v
    if r.thread == NULL or name_n > 0x7fffffff or value_n > 0x7fffffff:
        return
    n.p = name
    n.n = <uint32_t>name_n
    v.p = value
    v.n = <uint32_t>value_n
    take_request_header(r.stream, &r.thread.host, n, v)


cdef public void or_peer(or_request *opaque, const char *address, size_t n, int appended) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Slice s
    if r.thread == NULL or n == 0 or n > 256:
        return
    s.p = address
    s.n = <uint32_t>n
    r.stream.attribute_address = s
    if not appended and (r.thread.host.address_header.n == 0
                         or slice_is_nocase(r.thread.host.address_header, "x-forwarded-for", 15)):
        # each proxy adds the address that it was called from; this one does so later than it asks us
        forwarded_add(&r.stream.forwarded, s)


cdef public or_verdict or_headers_done(or_request *opaque, int end) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Thread *t = r.thread
    cdef StreamState *s
    if t == NULL:
        # shared by threads: only the counter is written
        or_add64(&r.site.unjudged, 1)
        return OR_REFUSE if r.site.fail_closed else OR_PASS
    s = r.stream
    if s.request.method.n == 0 or not enter(t):
        note_unjudged(r)
        return <or_verdict>r.verdict
    r.epoch = t.epoch
    split_path(&s.request)
    s.request.headers = s.headers
    s.request.time_us = or_unix_us()
    find_client(s, &t.host)
    s.attribute_address.n = 0
    s.end_of_request = end != 0
    if not end and body_wanted(s, &t.host):
        if keep_headers(&t.pool, s):
            s.phase = PHASE_BODY
            r.is_read = s.plan_mode == BODY_MODE_STREAMED
            r.verdict = OR_READ if r.is_read else OR_HOLD
            leave(t)
            return <or_verdict>r.verdict
        s.request.body_state = BODY_PART
    decide(&t.pool, s, &t.host)
    leave(t)
    return verdict_of(r)


cdef public void or_framed(or_request *opaque) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    if r.thread != NULL:
        r.stream.upgrade |= UPGRADE_FRAMED


cdef public or_verdict or_body(or_request *opaque, const char *p, size_t n, int end) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Thread *t = r.thread
    cdef Slice chunk
    cdef bint is_decided
    if t == NULL:
        return OR_REFUSE if r.site.fail_closed else OR_PASS
    if r.stream.phase != PHASE_BODY:
        return <or_verdict>r.verdict
    if not enter(t):
        note_unjudged(r)
        r.stream.phase = PHASE_DECIDED
        return <or_verdict>r.verdict
    chunk.p = p
    chunk.n = <uint32_t>(n if n < 0x7fffffff else 0x7fffffff)
    r.stream.request.body_bytes += n
    r.stream.end_of_request = end != 0
    r.epoch = t.epoch
    is_decided = take_body(&t.pool, r.stream, &t.host, chunk, end != 0, False)
    leave(t)
    return verdict_of(r) if is_decided else <or_verdict>r.verdict


cdef public or_verdict or_body_end(or_request *opaque, int cut) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Thread *t = r.thread
    if t == NULL:
        return OR_REFUSE if r.site.fail_closed else OR_PASS
    if r.stream.phase != PHASE_BODY:
        return <or_verdict>r.verdict
    if not enter(t):
        note_unjudged(r)
        r.stream.phase = PHASE_DECIDED
        return <or_verdict>r.verdict
    r.epoch = t.epoch
    decide_on_kept(&t.pool, r.stream, &t.host, BODY_PART if cut else BODY_WHOLE)
    leave(t)
    return verdict_of(r)


cdef public int or_is_ours(const char *name, size_t n) noexcept nogil:
    cdef Slice s
    s.p = name
    s.n = <uint32_t>(n if n < 0x7fffffff else 0x7fffffff)
    return is_ours(s)


cdef public int or_has_ours(const or_request *opaque) noexcept nogil:
    cdef const PluginRequest *r = <const PluginRequest *>opaque
    # the spare one keeps nothing: look for yourself
    return r.thread == NULL or r.stream.has_foreign


cdef public size_t or_told(const or_request *opaque, const or_field **fields) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef StreamState *s
    if r.thread == NULL or not r.stream.decided or r.unjudged:
        return 0
    s = r.stream
    if not told(r.thread.host.tell_upstream, &s.decision):
        return 0
    score_text(s.decision.score, r.score_text)
    hex64(s.decision.id, r.id_text)
    r.fields[0].name = text_of("x-outrider-score")
    r.fields[0].value = text_part(r.score_text, 6)
    r.fields[1].name = text_of("x-outrider-action")
    r.fields[1].value = text_of(or_action_name(s.decision.enforced))
    r.fields[2].name = text_of("x-outrider-id")
    r.fields[2].value = text_part(r.id_text, 16)
    fields[0] = r.fields
    return 3


cdef inline void add_field(PluginRequest *r, or_text name, or_text value) noexcept nogil:
    r.fields[r.answer.n_fields].name = name
    r.fields[r.answer.n_fields].value = value
    r.answer.n_fields += 1


cdef public const or_answer *or_answer_of(or_request *opaque) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef StreamState *s = r.stream
    cdef Answer a
    cdef uint32_t wait_s
    if r.thread == NULL:
        return &or_unavailable
    memset(&r.answer, 0, sizeof(or_answer))
    r.answer.fields = r.fields
    if r.unjudged:
        memcpy(&r.answer, &or_unavailable, sizeof(or_answer))
        if s.is_grpc:
            r.answer.grpc_status = 14
            r.answer.body.n = 0
            r.answer.n_fields = 1                 # without the content type
        return &r.answer
    memset(&a, 0, sizeof(Answer))
    # the worker's copy of the policy, which is whole whatever has become of the arena
    r.thread.host.answer(r.thread.host.ctx, &s.decision, &a)
    r.answer.status = a.status
    if a.status < 400 or a.status > 599:
        r.answer.status = 429 if s.decision.enforced == ACTION_THROTTLE else 403
    r.answer.details = text_of(or_details(s.decision.enforced if s.decision.enforced <= ACTION_BLOCK else ACTION_BLOCK))
    add_field(r, text_of("cache-control"), text_of("no-store"))
    wait_s = a.retry_after_s if a.retry_after_s else s.decision.retry_after_s
    if wait_s:
        add_field(r, text_of("retry-after"), text_part(r.number, number_text(wait_s, r.number)))
    if s.is_grpc:
        # another content type or a body would break such a client. RESOURCE_EXHAUSTED or PERMISSION_DENIED
        r.answer.grpc_status = 8 if s.decision.enforced == ACTION_THROTTLE else 7
        return &r.answer
    r.answer.body = text_part(a.body.p, a.body.n)
    if a.content_type.n and printable(a.content_type):
        add_field(r, text_of("content-type"), text_part(a.content_type.p, a.content_type.n))
    return &r.answer


cdef extern from *:
    """
    static const or_field or_unavailable_fields[2] = {
        {{"cache-control", 13}, {"no-store", 8}}, {{"content-type", 12}, {"application/problem+json", 24}}};
    #define OR_UNAVAILABLE_BODY \\
        "{\\"type\\":\\"about:blank\\",\\"title\\":\\"Service unavailable\\",\\"status\\":503}\\n"
    static const or_answer or_unavailable = {503, 0, {OR_UNAVAILABLE_BODY, sizeof OR_UNAVAILABLE_BODY - 1},
        {"outrider_unavailable", 20}, 2, or_unavailable_fields};
    static const or_record or_no_record;
    """
    const or_answer or_unavailable
    const or_record or_no_record


cdef public const or_record *or_record_of(or_request *opaque) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef StreamState *s
    cdef Slice route
    cdef uint32_t i, n = 0
    cdef const char *name
    cdef or_record *out
    if r.thread == NULL or not r.stream.decided or r.unjudged:
        return &or_no_record
    s = r.stream
    out = &r.record
    memset(out, 0, sizeof(or_record))
    out.is_decided = 1
    out.tell = told(r.thread.host.tell_proxy, &s.decision)
    out.action = text_of(or_action_name(s.decision.action))
    out.enforced = text_of(or_action_name(s.decision.enforced))
    out.mode = text_of("enforce") if s.decision.mode else text_of("observe")
    hex64(s.decision.id, r.id_text)
    out.id = text_part(r.id_text, 16)
    out.score_number = bounded(s.decision.score)
    score_text(s.decision.score, r.score_text)
    out.score = text_part(r.score_text, 6)
    # of the policy that is current now: names outlive decisions, numbers may not
    route = r.thread.host.route_name(r.thread.host.ctx, &s.decision)
    out.route = text_part(route.p, route.n)
    out.place = text_part(r.place, escape_place(s.decision.place, s.decision.place_n if s.decision.place_n <= PLACE_MAX
                                                else PLACE_MAX, r.place))
    out.n_reasons = s.decision.n_reasons if s.decision.n_reasons <= REASONS_MAX else REASONS_MAX
    for i in range(<uint32_t>out.n_reasons):
        name = or_reason_name(s.decision.reason[i])
        out.reasons[i] = text_of(name)
        if n + out.reasons[i].n + 1 <= sizeof(r.list):
            if n:
                r.list[n] = c','
                n += 1
            memcpy(r.list + n, name, out.reasons[i].n)
            n += <uint32_t>out.reasons[i].n
    out.reasons_list = text_part(r.list, n)
    out.spent_us = s.decision.spent_ns / 1000.0
    return out


cdef public void or_response(or_request *opaque, int status) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Thread *t = r.thread
    cdef StreamState *s
    cdef bint late
    if t == NULL or r.unjudged or status < 100 or status > 999:
        return
    s = r.stream
    late = s.phase == PHASE_BODY
    if late:
        # answered before its body was here
        or_body_end(opaque, 1)
    if s.phase != PHASE_DECIDED or not enter(t):
        return
    if r.epoch == t.epoch:                        # else its tickets are another arena's
        t.host.respond(t.host.ctx, &s.decision, status, 0 if late else (or_now_ns() - s.decided_ns) // 1000)
    s.phase = PHASE_RESPONSE
    leave(t)


cdef public void or_close(or_request *opaque) noexcept nogil:
    cdef PluginRequest *r = <PluginRequest *>opaque
    cdef Thread *t = r.thread
    if t == NULL:
        return
    if r.stream.phase == PHASE_BODY:
        # so that the client's windows know of it
        or_body_end(opaque, 1)
    stream_free(&t.pool, r.stream)
    r.stream = NULL
    r.next = t.free_request
    t.free_request = r


# ---- sites -----------------------------------------------------------------------------------------------------

cdef public or_site *or_site_open(const char *arena, size_t n, int fail_closed, or_log_fn log, void *log_ctx, char *err,
                                  size_t err_n) noexcept nogil:
    global n_sites
    cdef Site *site
    cdef uint32_t i
    if n == 0 or n >= ARENA_PATH_MAX or arena[0] != c'/' or memchr(arena, 0, n) != NULL:
        snprintf(err, err_n, "the arena's path must begin with a slash and have less than %d bytes", ARENA_PATH_MAX)
        return NULL
    for i in range(n_sites):
        site = sites[i]
        if (strlen(site.path) == n and memcmp(site.path, arena, n) == 0
                and site.fail_closed == <uint32_t>(fail_closed != 0)):
            site.log = log
            site.log_ctx = log_ctx
            return <or_site *>site
    if n_sites == OR_SITES_MAX:
        snprintf(err, err_n, "more than %d different arenas in one process", OR_SITES_MAX)
        return NULL
    site = <Site *>calloc(1, sizeof(Site))
    if site == NULL:
        snprintf(err, err_n, "no memory")
        return NULL
    site.index = n_sites
    site.fail_closed = fail_closed != 0
    memcpy(site.path, arena, n)
    site.log = log
    site.log_ctx = log_ctx
    site.spare.site = site
    sites[n_sites] = site
    n_sites += 1
    return <or_site *>site


cdef public void or_site_start(or_site *opaque) noexcept nogil:
    cdef Site *site = <Site *>opaque
    if site.watcher.running:
        return
    look_after(site)
    if or_watcher_start(&site.watcher, look_after, site, WATCH_EVERY_MS) != 0:
        say(site, OR_LOG_ERROR, "can't start the watching thread: policies are followed, new arenas and models aren't")


cdef public void or_site_stop(or_site *opaque) noexcept nogil:
    or_watcher_stop(&(<Site *>opaque).watcher)
