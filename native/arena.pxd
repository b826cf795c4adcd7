"""The arena: one shared-memory file through which the planes talk.

Layout: a header page, then the regions at the offsets that the header states. All integers
are native-endian: the file never leaves the machine. Whoever opens it checks magic, layout
version, every region's size and the file's own size before touching anything else.
"""
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset, strerror

from native.base cimport (
    ACTION_BLOCK, ACTION_THROTTLE, Decision, or_add64, or_cas64, or_load64, or_now_ns, or_store64, or_unix_us)
from native.clients cimport BUCKET_WAYS, Bucket, ClientEntry
from native.policy cimport ROUTES_MAX, Policy
from native.ring cimport Ring
from native.shedding cimport RouteControl
from native.textdefs cimport CHUNK_BYTES

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <unistd.h>
    /* O_NONBLOCK: what stands there may be anything */
    static inline int or_open_rw(const char *path) {
        return open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); }
    /* A regular file that not everybody may write, what it is and how long: 0. -1 it isn't */
    static inline int or_file_is(int fd, uint64_t *device, uint64_t *inode, uint32_t *owner, int64_t *bytes) {
        struct stat s;
        if (fstat(fd, &s) || !S_ISREG(s.st_mode) || s.st_mode & S_IWOTH) return -1;
        *device = s.st_dev; *inode = s.st_ino; *owner = s.st_uid; *bytes = s.st_size;
        return 0; }
    static inline int or_read_head(int fd, void *to, uint64_t n) { return pread(fd, to, n, 0) == (ssize_t)n ? 0 : -1; }
    static inline void *or_map(int fd, uint64_t n) {
        void *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        return p == MAP_FAILED ? 0 : p; }
    static inline void or_unmap(void *p, uint64_t n) { munmap(p, n); }
    static inline void or_close_fd(int fd) { close(fd); }
    static inline void or_count32(uint32_t *p) { __atomic_fetch_add(p, 1, __ATOMIC_RELAXED); }
    """
    int or_open_rw(const char *path) noexcept nogil
    int or_file_is(int fd, uint64_t *device, uint64_t *inode, uint32_t *owner, int64_t *bytes) noexcept nogil
    int or_read_head(int fd, void *to, uint64_t n) noexcept nogil
    void *or_map(int fd, uint64_t n) noexcept nogil
    void or_unmap(void *p, uint64_t n) noexcept nogil
    void or_close_fd(int fd) noexcept nogil
    void or_count32(uint32_t *p) noexcept nogil

cdef enum:
    ARENA_VERSION = 4
    REGIONS = 11
    ARENA_HEADER_BYTES = 4096
    CLIENTS_LIMIT = 4194304
    EVENTS_LIMIT = 1048576
    ESCALATIONS_LIMIT = 4096     # some 11 KiB each
    BLOCKLIST_LIMIT = 4194304
    COUNTER_SLOTS_LIMIT = 256
    BLOCK_PROBES = 16            # a key stands within this many places of its hash
    TARGET_MAX = 1024            # bytes of an escalated request's path and query
    BODY_TYPE_MAX = 64
    HISTOGRAM_BUCKETS = 16       # of a stage
    LATENCY_BUCKETS = 82         # of a route's decisions
    MODEL_PATH_MAX = 1024

cdef extern from *:
    """
    #define OR_ARENA_MAGIC 0x524544495254554full  /* "OUTRIDER" */
    /* upper bounds of the latency buckets in ns; the last bucket has none */
    static const uint64_t or_bounds_ns[15] = {1000, 2000, 5000, 10000, 15000, 25000, 50000, 75000,
        100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000};
    /* the same, fine enough for percentiles (20 to a decade, each at most 1/4 above the one before) and holding
       all of the bounds above, so that the coarse counts follow exactly from the fine ones */
    static const uint64_t or_fine_bounds_ns[81] = {
        1000, 1100, 1250, 1500, 1750, 2000, 2250, 2500, 3000, 3500, 4000,
        4500, 5000, 5500, 6000, 6500, 7000, 7500, 8000, 9000, 10000, 11000,
        12500, 15000, 17500, 20000, 22500, 25000, 30000, 35000, 40000, 45000, 50000,
        55000, 60000, 65000, 70000, 75000, 80000, 90000, 100000, 110000, 125000, 150000,
        175000, 200000, 225000, 250000, 300000, 350000, 400000, 450000, 500000, 550000, 600000,
        650000, 700000, 750000, 800000, 900000, 1000000, 1100000, 1250000, 1500000, 1750000, 2000000,
        2250000, 2500000, 3000000, 3500000, 4000000, 4500000, 5000000, 5500000, 6000000, 6500000, 7000000,
        7500000, 8000000, 9000000, 10000000};
    /* bucket of the least number with this highest bit */
    static const uint8_t or_fine_start[25] = {
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 6, 11, 19, 24, 29, 36, 43, 48, 53, 61, 66, 71, 79, 81};
    static inline int or_fine_bucket(uint64_t ns) {
        int e = 63 - __builtin_clzll(ns | 1), i;
        if (ns > 10000000) return 81;
        i = or_fine_start[e];
        while (ns > or_fine_bounds_ns[i]) i++;
        return i;
    }
    """
    const uint64_t OR_ARENA_MAGIC
    const uint64_t *or_bounds_ns
    const uint64_t *or_fine_bounds_ns
    int or_fine_bucket(uint64_t ns) noexcept nogil

cdef enum:                       # Counter
    COUNT_REQUESTS = 0
    COUNT_RESPONSES = 1
    COUNT_ACTION = 2             # five in a row, as decided, by Action
    COUNT_ENFORCED = 7           # five in a row, as carried out
    COUNT_SKIPPED = 12           # six in a row, by Stage
    COUNT_OVERRUNS = 18          # decisions that took longer than their budget
    COUNT_EVENTS = 19
    COUNT_EVENTS_DROPPED = 20    # the ring was full
    COUNT_CLIENTS_CLAIMED = 21
    COUNT_CLIENTS_EVICTED = 22
    COUNT_CLIENTS_CONTENDED = 23     # an entry or bucket was held too long; the update was let go
    COUNT_BODY_PART = 24
    COUNT_TEXT_CUT = 25          # some limit of the text stage was hit
    COUNT_HEADERS_DROPPED = 26
    COUNT_NO_MODELS = 27         # decided without models loaded
    COUNT_LOCKS_STOLEN = 28      # from a holder that died or slept
    COUNT_HELD = 29              # from a client that an earlier detection still holds
    COUNT_SHED = 30              # stages left out because their route had shed them
    COUNT_TEXT_PART = 31         # texts read until the time was up
    COUNT_UNJUDGED_OPEN = 32     # passed by a proxy that had no arena or no policy to decide with
    COUNT_UNJUDGED_CLOSED = 33   # refused by one
    COUNT_ATTACHED = 34          # times that a proxy's process has opened the arena
    COUNT_ESCALATED = 35         # requests handed to the judge
    COUNT_ESCALATIONS_LIMITED = 36   # ... that weren't, over the client's or the service's rate
    COUNT_ESCALATIONS_DROPPED = 37   # ... that were lost because their ring was full
    COUNTERS = 40


cdef struct CounterSlot:
    uint64_t value[40]
    uint64_t stage[6][16]        # of routes that are no more, and their decisions: the others have their own
    uint64_t total[16]


cdef struct RouteCounters:
    # one per route and counter slot; a route keeps its place (RoutePolicy.slot) as long as its name is there
    uint64_t latency[82]         # whole decisions, by or_fine_bounds_ns
    uint64_t stage[6][16]        # by or_bounds_ns
    uint64_t action[5]           # as decided
    uint64_t skipped[6]          # by Stage, for whatever reason, a text read in part among them
    uint64_t shed[6]             # those that the route had shed
    uint64_t text_part           # texts read until the time was up
    uint64_t overruns
    uint64_t spent_ns            # sum over all decisions
    uint64_t pad[2]              # whole cache lines


cdef struct RegionHead:
    uint64_t offset
    uint64_t bytes


cdef struct ArenaHeader:
    uint64_t magic
    uint32_t version
    uint32_t header_bytes
    uint64_t total_bytes
    uint64_t key[2]              # of this arena's keyed hashes; the file is readable by its owner only
    int64_t created_us
    uint32_t clients             # entries; buckets = clients / BUCKET_WAYS
    uint32_t buckets             # a power of two
    uint32_t events              # a power of two
    uint32_t blocklist           # a power of two
    uint32_t counter_slots
    uint32_t event_bytes
    uint32_t policy_bytes
    uint32_t entry_bytes
    uint32_t escalations         # a power of two
    uint32_t escalation_bytes
    # policy, models, buckets, entries, blocklist, events, counters, routes' means, routes' counters, routes' control,
    # escalations
    RegionHead region[11]
    # live fields, each on its own cache line
    uint64_t pad0[8]
    uint64_t policy_generation
    uint64_t pad1[7]
    uint64_t next_id
    uint64_t pad2[7]
    uint64_t next_slot
    uint64_t pad3[7]
    uint64_t event_head          # next to be claimed by a writer
    uint64_t pad4[7]
    uint64_t event_tail          # next to be read; moved by the reader only
    uint64_t pad5[7]
    uint64_t blocked_keys        # 0: no client is blocked, the list need not be looked at
    uint64_t pad6[7]
    uint64_t blocked_payloads    # 0: no payload is, none need be hashed
    uint64_t pad7[7]
    uint64_t escalation_head
    uint64_t pad8[7]
    uint64_t escalation_tail
    uint64_t pad9[7]
    uint32_t escalated_us        # when the service has all of its escalations left (native/escalate.pxd)
    uint32_t spare
    uint64_t pad10[7]


cdef struct ModelsRegion:
    uint64_t generation          # of the model set (first bytes of the bundle's hash), 0: none, or being written
    char path[1024]              # of the runtime folder, NUL-terminated


cdef enum:                       # BlockKind
    BLOCK_CLIENT = 0             # the key of an address or a principal
    BLOCK_PAYLOAD = 1            # the key of a text (native/escalate.pxd)


cdef struct BlockEntry:
    uint64_t key                 # 0: free; written last, cleared first
    int64_t expires_us
    uint8_t action
    uint8_t kind                 # BlockKind
    uint16_t reason
    uint32_t hits


cdef struct RouteStats:
    # exponentially weighted mean and variance over the route's requests; updates may be lost
    float rate_mean              # of the callers' requests per minute, log1p
    float rate_var
    float size_mean              # of the payload's size, log1p of bytes
    float size_var
    float response_mean          # of the response time, log1p of ms
    float response_var
    uint64_t requests


cdef struct Event:
    uint64_t sequence            # of the ring; comes first
    Decision decision
    uint8_t address[16]
    uint8_t has_address
    uint8_t method_n
    uint16_t path_n
    uint16_t agent_n
    uint16_t authority_n
    uint8_t route_n
    char method[16]
    char path[256]
    char agent[128]
    char authority[64]
    char route[64]               # its name when this was decided


cdef struct Escalation:
    # a request for the judge: what its event would say, and its text. Lengths are the writer's word
    uint64_t sequence            # of the ring; comes first
    Event event
    uint64_t payload_key         # 0: none
    float unusual                # the Isolation Forest's score, calibrated; NaN where it wasn't run
    float behaviour[32]          # the row that it was given
    uint8_t why                  # Escalated
    uint8_t has_behaviour
    uint8_t as_sent              # 0: the text was unescaped out of a document
    uint8_t secret               # the value's place names a secret: its text was left out
    uint16_t type_n
    uint16_t target_n
    uint16_t path_n              # of the target, what comes before '?'
    uint16_t text_n
    char type[64]                # content type
    char target[1024]            # path and query as sent
    char text[8192]              # CHUNK_BYTES: the piece of the worst value in which the worst window lies


cdef struct Arena:
    # Counts and key are copies, checked when the file was opened: whatever is written into the file, or whatever
    # becomes of it, no index is ever bounded by what stands there now.
    char *base
    uint64_t bytes
    uint32_t n_clients
    uint32_t n_buckets
    uint32_t n_blocklist
    uint32_t n_slots             # of counters
    uint64_t key[2]
    uint64_t device              # the file's identity
    uint64_t inode
    uint32_t owner               # its user id
    ArenaHeader *head
    Policy *policy               # two
    ModelsRegion *models
    Bucket *buckets
    ClientEntry *entries
    BlockEntry *blocklist
    Ring events                  # of Event
    Ring escalations             # of Escalation
    CounterSlot *counters
    RouteStats *routes           # by RoutePolicy.slot, as the next two
    RouteCounters *route_counters    # counter_slots times ROUTES_MAX
    RouteControl *control


cdef inline void ring_point(Ring *r, char *slots, uint32_t n, uint32_t bytes, uint64_t *head,
                            uint64_t *tail) noexcept nogil:
    r.slots = slots
    r.n = n
    r.bytes = bytes
    r.head = head
    r.tail = tail


cdef inline void arena_point(Arena *a, char *base, const ArenaHeader *h) noexcept nogil:
    """h: the header as it was checked, not the one in the file."""
    a.base = base
    a.head = <ArenaHeader *>base
    a.bytes = h.total_bytes
    a.n_clients = h.clients
    a.n_buckets = h.buckets
    a.n_blocklist = h.blocklist
    a.n_slots = h.counter_slots
    a.key[0] = h.key[0]
    a.key[1] = h.key[1]
    a.policy = <Policy *>(base + h.region[0].offset)
    a.models = <ModelsRegion *>(base + h.region[1].offset)
    a.buckets = <Bucket *>(base + h.region[2].offset)
    a.entries = <ClientEntry *>(base + h.region[3].offset)
    a.blocklist = <BlockEntry *>(base + h.region[4].offset)
    ring_point(&a.events, base + h.region[5].offset, h.events, sizeof(Event), &a.head.event_head, &a.head.event_tail)
    a.counters = <CounterSlot *>(base + h.region[6].offset)
    a.routes = <RouteStats *>(base + h.region[7].offset)
    a.route_counters = <RouteCounters *>(base + h.region[8].offset)
    a.control = <RouteControl *>(base + h.region[9].offset)
    ring_point(&a.escalations, base + h.region[10].offset, h.escalations, sizeof(Escalation),
               &a.head.escalation_head, &a.head.escalation_tail)


cdef inline uint64_t arena_lay_out(ArenaHeader *h) noexcept nogil:
    """Fill in sizes and offsets from the five counts; returns the file's size in bytes."""
    cdef uint64_t size[11]
    cdef uint64_t at = ARENA_HEADER_BYTES
    cdef int i
    h.magic = OR_ARENA_MAGIC
    h.version = ARENA_VERSION
    h.header_bytes = ARENA_HEADER_BYTES
    h.policy_bytes = sizeof(Policy)
    h.event_bytes = sizeof(Event)
    h.escalation_bytes = sizeof(Escalation)
    h.entry_bytes = sizeof(ClientEntry)
    size[0] = 2 * sizeof(Policy)
    size[1] = sizeof(ModelsRegion)
    size[2] = <uint64_t>h.buckets * sizeof(Bucket)
    size[3] = <uint64_t>h.buckets * BUCKET_WAYS * sizeof(ClientEntry)
    size[4] = <uint64_t>h.blocklist * sizeof(BlockEntry)
    size[5] = <uint64_t>h.events * sizeof(Event)
    size[6] = <uint64_t>h.counter_slots * sizeof(CounterSlot)
    size[7] = ROUTES_MAX * sizeof(RouteStats)
    size[8] = <uint64_t>h.counter_slots * ROUTES_MAX * sizeof(RouteCounters)
    size[9] = ROUTES_MAX * sizeof(RouteControl)
    size[10] = <uint64_t>h.escalations * sizeof(Escalation)
    for i in range(REGIONS):
        h.region[i].offset = at
        h.region[i].bytes = size[i]
        at += (size[i] + 4095) & ~<uint64_t>4095
    h.total_bytes = at
    return at


cdef inline bint power_of_two(uint64_t n) noexcept nogil:
    return n != 0 and (n & (n - 1)) == 0


cdef inline int arena_check(const ArenaHeader *h, int64_t file_bytes, char *err, size_t err_n) noexcept nogil:
    """0 if this header describes an arena of this build in a file of that size, else -1 with the
    reason in err."""
    cdef ArenaHeader want
    cdef int i
    if file_bytes < ARENA_HEADER_BYTES:
        snprintf(err, err_n, "the file has %lld bytes, too short for an arena's header", <long long>file_bytes)
        return -1
    if h.magic != OR_ARENA_MAGIC:
        snprintf(err, err_n, "wrong magic number: this is not an Outrider arena")
        return -1
    if h.version != ARENA_VERSION:
        snprintf(err, err_n, "layout version %u, this build reads version %u", h.version, <unsigned>ARENA_VERSION)
        return -1
    if (h.header_bytes != ARENA_HEADER_BYTES or h.clients != h.buckets * BUCKET_WAYS
            or h.buckets == 0 or h.buckets > CLIENTS_LIMIT or not power_of_two(h.buckets)
            or h.events > EVENTS_LIMIT or not power_of_two(h.events)
            or h.escalations > ESCALATIONS_LIMIT or not power_of_two(h.escalations)
            or h.blocklist > BLOCKLIST_LIMIT or not power_of_two(h.blocklist)
            or h.counter_slots == 0 or h.counter_slots > COUNTER_SLOTS_LIMIT):
        snprintf(err, err_n, "a count in the header is out of range")
        return -1
    memset(&want, 0, sizeof(want))
    want.buckets = h.buckets
    want.events = h.events
    want.escalations = h.escalations
    want.blocklist = h.blocklist
    want.counter_slots = h.counter_slots
    arena_lay_out(&want)
    if (want.policy_bytes != h.policy_bytes or want.event_bytes != h.event_bytes
            or want.entry_bytes != h.entry_bytes or want.escalation_bytes != h.escalation_bytes):
        snprintf(err, err_n, "record sizes differ from this build's (policy %u/%u, event %u/%u, client %u/%u, "
                 "escalation %u/%u bytes)", h.policy_bytes, want.policy_bytes, h.event_bytes, want.event_bytes,
                 h.entry_bytes, want.entry_bytes, h.escalation_bytes, want.escalation_bytes)
        return -1
    for i in range(REGIONS):
        if want.region[i].offset != h.region[i].offset or want.region[i].bytes != h.region[i].bytes:
            snprintf(err, err_n, "region %d is not where its counts say", i)
            return -1
    if want.total_bytes != h.total_bytes or <uint64_t>file_bytes != h.total_bytes:
        snprintf(err, err_n, "size mismatch: the file has %lld bytes, its header says %llu",
                 <long long>file_bytes, <unsigned long long>h.total_bytes)
        return -1
    return 0


cdef inline int arena_open(const char *path, Arena *a, char *err, size_t err_n) noexcept nogil:
    """Map an existing arena. 0, or -1 with the reason in err."""
    cdef int fd = or_open_rw(path)
    cdef int64_t n
    cdef void *page
    cdef ArenaHeader head
    if fd < 0:
        snprintf(err, err_n, "cannot open: %s", strerror(errno))
        return -1
    if or_file_is(fd, &a.device, &a.inode, &a.owner, &n) != 0:
        snprintf(err, err_n, "not a regular file, or one that everybody may write")
        or_close_fd(fd)
        return -1
    if n < ARENA_HEADER_BYTES:
        snprintf(err, err_n, "the file has %lld bytes, too short for an arena's header", <long long>n)
        or_close_fd(fd)
        return -1
    # read, not mapped: the file may shrink while it is looked at
    if or_read_head(fd, &head, sizeof(head)) != 0:
        snprintf(err, err_n, "cannot read: %s", strerror(errno))
        or_close_fd(fd)
        return -1
    if arena_check(&head, n, err, err_n) != 0:
        or_close_fd(fd)
        return -1
    page = or_map(fd, <uint64_t>n)
    or_close_fd(fd)
    if page == NULL:
        snprintf(err, err_n, "cannot map %lld bytes: %s", <long long>n, strerror(errno))
        return -1
    arena_point(a, <char *>page, &head)
    return 0


cdef inline void arena_close(Arena *a) noexcept nogil:
    if a.base != NULL:
        or_unmap(a.base, a.bytes)
        a.base = NULL


cdef inline int bucket_of_ns(uint64_t ns) noexcept nogil:
    cdef int i = 0
    while i < HISTOGRAM_BUCKETS - 1 and ns > or_bounds_ns[i]:
        i += 1
    return i


# -- blocklist: exact keys -------------------------------------------------------------------

cdef inline uint64_t *block_count(Arena *a, uint8_t kind) noexcept nogil:
    """Entries of this kind, expired ones among them until their place is needed or they are swept."""
    return &a.head.blocked_payloads if kind == BLOCK_PAYLOAD else &a.head.blocked_keys


cdef inline const BlockEntry *block_hit(Arena *a, uint64_t key, uint8_t kind, int64_t now_us) noexcept nogil:
    """The entry of this key that has not expired, with the hit counted, or NULL."""
    cdef uint64_t mask = a.n_blocklist - 1
    cdef uint64_t at = (key >> 32) & mask   # the lowest bit of a key is always set
    cdef int i
    cdef BlockEntry *e
    for i in range(BLOCK_PROBES):
        e = &a.blocklist[(at + i) & mask]
        if or_load64(&e.key) == key and e.kind == kind:
            if e.expires_us <= now_us:
                return NULL
            or_count32(&e.hits)
            return e
    return NULL


cdef inline uint8_t block_action(const BlockEntry *e) noexcept nogil:
    """What an entry asks for; it never grants anything."""
    return e.action if ACTION_THROTTLE <= e.action <= ACTION_BLOCK else <uint8_t>ACTION_BLOCK


cdef inline void block_clear(Arena *a, BlockEntry *e) noexcept nogil:
    """Whoever dies in here leaves a count too high, never one too low: that costs time, not an entry."""
    or_store64(&e.key, 0)
    or_add64(block_count(a, e.kind), <uint64_t>-1)


cdef inline int block_put(Arena *a, uint64_t key, uint8_t kind, int64_t expires_us, uint8_t action, uint16_t reason,
                          int64_t now_us) noexcept nogil:
    """Add or renew (control plane only: one writer). 0, or -1 where all places are taken by
    entries that have not expired. A key never has two entries: all its places are gone through first."""
    cdef uint64_t mask = a.n_blocklist - 1
    cdef uint64_t at = (key >> 32) & mask   # the lowest bit of a key is always set
    cdef int i
    cdef BlockEntry *e
    cdef BlockEntry *free_ = NULL
    for i in range(BLOCK_PROBES):
        e = &a.blocklist[(at + i) & mask]
        if e.key == key and e.kind == kind:
            e.action = action
            e.reason = reason
            if e.expires_us <= now_us:
                e.hits = 0
            e.expires_us = expires_us
            return 0
        if free_ == NULL and (e.key == 0 or e.expires_us <= now_us):
            free_ = e
    if free_ == NULL:
        return -1
    if free_.key:
        block_clear(a, free_)
    free_.expires_us = expires_us
    free_.kind = kind
    free_.action = action
    free_.reason = reason
    free_.hits = 0
    or_add64(block_count(a, kind), 1)
    or_store64(&free_.key, key)
    return 0


cdef inline bint block_drop(Arena *a, uint64_t key) noexcept nogil:
    cdef uint64_t mask = a.n_blocklist - 1
    cdef uint64_t at = (key >> 32) & mask   # the lowest bit of a key is always set
    cdef int i
    cdef bint dropped = False
    for i in range(BLOCK_PROBES):
        if a.blocklist[(at + i) & mask].key == key:
            block_clear(a, &a.blocklist[(at + i) & mask])
            dropped = True
    return dropped


cdef inline uint32_t block_sweep(Arena *a, int64_t now_us) noexcept nogil:
    """Drop what has expired (control plane only), so that an empty list costs nothing again. Returns how many."""
    cdef uint32_t i, n = 0
    for i in range(a.n_blocklist):
        if a.blocklist[i].key and a.blocklist[i].expires_us <= now_us:
            block_clear(a, &a.blocklist[i])
            n += 1
    return n
