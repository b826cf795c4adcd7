"""The policy region: what the operator wrote down, as the data plane reads it.

Plain structs of fixed size, written by the control plane (sidecar/policy.py through
native.engine) into one of two slots and published by a generation number; each worker
copies the active slot into its own memory when the generation moves, so a request never
sees half a policy.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp

from native.base cimport Slice, lower
from native.paths cimport normal_path
from native.text cimport TEXT_HEADERS_MAX, TextPolicy

cdef enum:
    ROUTES_MAX = 256             # the service's default (index 0) and 255 of the operator's
    ROUTE_PATH_MAX = 128
    RANGES_MAX = 4096            # disjoint address intervals, allow and block together
    PRINCIPALS_MAX = 8
    NAME_MAX = 64
    DETECTORS = 6

cdef enum:                       # RouteBody, in Envoy's numbers of its body modes
    ROUTE_BODY_NONE = 0
    ROUTE_BODY_BUFFERED = 1      # held back; the part up to the proxy's limit where no length is announced
    ROUTE_BODY_STREAMED = 2

cdef enum:                       # PathKind
    PATH_ANY = 0
    PATH_EXACT = 1
    PATH_PATTERN = 2             # '*' one segment, trailing '**' any rest

cdef enum:                       # PrincipalKind
    PRINCIPAL_HEADER = 1         # the whole value
    PRINCIPAL_COOKIE = 2
    PRINCIPAL_JWT = 3            # a claim of the bearer token (not verified: an identity, not a permission)
    PRINCIPAL_BASIC = 4          # the user name of Basic credentials

cdef enum:                       # DetectorKind
    DETECT_BRUTE_FORCE = 0
    DETECT_CREDENTIAL_STUFFING = 1
    DETECT_ENUMERATION = 2
    DETECT_SCANNING = 3
    DETECT_FLOOD = 4
    DETECT_UNUSUAL = 5           # Isolation Forest; count and share unused


cdef struct Detector:
    uint8_t enabled
    uint8_t action               # the most that this detector may ask for
    uint8_t window               # index into windows.pxd's WINDOWS
    uint8_t spare
    float count                  # events in the window from which it speaks
    float share                  # and their share of the client's requests of that kind


cdef struct RoutePolicy:
    uint8_t kind
    uint8_t mode
    uint8_t exempt
    uint8_t login
    uint8_t body_mode
    uint8_t name_n
    uint16_t path_n
    uint16_t slot                # of its figures in the arena: stays with the name when routes change places
    uint16_t spare
    uint32_t methods             # bit per Method, 0: all
    uint32_t body_limit
    uint32_t budget_us           # 0: none
    float threshold[5]           # by Action; a value above 1 means never
    float escalate_from          # scores in [from, to) are uncertain: for the judge
    float escalate_to
    float escalate_novel         # and a behaviour as unusual as this
    float escalate_sample        # and this share of all requests, 0..1
    float payload_floor          # score of a text below which it has no payload key
    char path[128]
    char name[64]


cdef struct Range:
    uint8_t low[16]
    uint8_t high[16]
    uint8_t action               # ACTION_ALLOW (exempt from refusal) or ACTION_BLOCK
    uint8_t spare[7]


cdef struct PrincipalSource:
    uint8_t kind
    uint8_t name_n
    uint8_t claim_n
    uint8_t spare
    char name[64]                # header or cookie, lower case for headers
    char claim[64]


cdef struct Policy:
    uint64_t generation
    int64_t written_us
    uint32_t n_routes
    uint32_t n_ranges
    uint32_t n_principals
    uint8_t n_skip
    uint8_t skip[6]              # Stage numbers in the order in which they give way
    uint8_t shed                 # a route whose p99 exceeds its budget gives stages up until it recovers
    uint8_t trusted_hops
    uint8_t address_header_n
    uint8_t fail_closed          # what a host does when there is no decision to be had
    uint16_t block_status
    uint16_t throttle_status
    uint8_t tell_upstream        # Tell: of which decisions the upstream hears in headers
    uint8_t tell_proxy           # ... and the proxy in metadata
    uint16_t retry_after_s
    int64_t hold_us              # how long a detection keeps refusing the client
    uint32_t shed_hold_ms        # before the first trial to take a shed stage back
    float allow_sample           # share of allowed decisions that become events, 0..1
    uint32_t escalate_client_ms  # least time between a client's escalations once its burst is spent
    uint32_t escalate_all_us     # and between all of the service's
    uint32_t escalate_text       # bytes of text that are shown to a judge
    char address_header[64]
    char block_type[64]          # content type of a refusal, and its bodies
    char block_body[1024]
    char throttle_body[1024]
    uint16_t block_type_n
    uint16_t block_body_n
    uint16_t throttle_body_n
    PrincipalSource principal[8]
    Detector detector[6]
    TextPolicy text
    RoutePolicy route[256]
    Range range[4096]


cdef enum:                       # Method
    METHOD_GET = 1
    METHOD_HEAD = 2
    METHOD_POST = 4
    METHOD_PUT = 8
    METHOD_PATCH = 16
    METHOD_DELETE = 32
    METHOD_OPTIONS = 64
    METHOD_OTHER = 128


cdef inline uint32_t method_bit(Slice m) noexcept nogil:
    if m.n == 3:
        if memcmp(m.p, b"GET", 3) == 0:
            return METHOD_GET
        if memcmp(m.p, b"PUT", 3) == 0:
            return METHOD_PUT
    elif m.n == 4:
        if memcmp(m.p, b"POST", 4) == 0:
            return METHOD_POST
        if memcmp(m.p, b"HEAD", 4) == 0:
            return METHOD_HEAD
    elif m.n == 5 and memcmp(m.p, b"PATCH", 5) == 0:
        return METHOD_PATCH
    elif m.n == 6 and memcmp(m.p, b"DELETE", 6) == 0:
        return METHOD_DELETE
    elif m.n == 7 and memcmp(m.p, b"OPTIONS", 7) == 0:
        return METHOD_OPTIONS
    return METHOD_OTHER


cdef inline void policy_bound(Policy *p) noexcept nogil:
    """Every count and length within its array, whatever stood in the file."""
    cdef uint32_t i, j
    p.n_routes = min(p.n_routes, <uint32_t>ROUTES_MAX)
    p.n_ranges = min(p.n_ranges, <uint32_t>RANGES_MAX)
    p.n_principals = min(p.n_principals, <uint32_t>PRINCIPALS_MAX)
    p.n_skip = min(p.n_skip, <uint8_t>6)
    p.address_header_n = min(p.address_header_n, <uint8_t>NAME_MAX)
    p.block_type_n = min(p.block_type_n, <uint16_t>sizeof(p.block_type))
    p.block_body_n = min(p.block_body_n, <uint16_t>sizeof(p.block_body))
    p.text.n_headers = min(p.text.n_headers, <uint32_t>TEXT_HEADERS_MAX)
    for i in range(PRINCIPALS_MAX):
        p.principal[i].name_n = min(p.principal[i].name_n, <uint8_t>NAME_MAX)
        p.principal[i].claim_n = min(p.principal[i].claim_n, <uint8_t>NAME_MAX)
    for i in range(DETECTORS):
        p.detector[i].window = min(p.detector[i].window, <uint8_t>4)
        p.detector[i].action = min(p.detector[i].action, <uint8_t>4)
    for i in range(ROUTES_MAX):
        p.route[i].path_n = min(p.route[i].path_n, <uint16_t>ROUTE_PATH_MAX)
        p.route[i].name_n = min(p.route[i].name_n, <uint8_t>NAME_MAX)
        p.route[i].slot = min(p.route[i].slot, <uint16_t>(ROUTES_MAX - 1))
    for j in range(p.n_ranges):
        p.range[j].action = min(p.range[j].action, <uint8_t>4)


cdef inline bint path_matches(const RoutePolicy *r, Slice path) noexcept nogil:
    """Exact, or a pattern by segments."""
    cdef uint32_t i = 0, j = 0, n = r.path_n
    if r.kind == PATH_ANY:
        return True
    if r.kind == PATH_EXACT:
        return path.n == n and memcmp(path.p, r.path, n) == 0
    while i < n:
        if r.path[i] == c'*':
            if i + 1 < n and r.path[i + 1] == c'*':
                return True                       # the control plane allows '**' at the end only
            while j < path.n and path.p[j] != c'/':
                j += 1
            i += 1
            continue
        if j >= path.n:
            # "/api/**" is also "/api"
            return n - i == 3 and r.path[i] == c'/' and r.path[i + 1] == c'*' and r.path[i + 2] == c'*'
        if r.path[i] != path.p[j]:
            return False
        i += 1
        j += 1
    return j == path.n


cdef inline uint16_t find_route(const Policy *p, Slice method, Slice path) noexcept nogil:
    """Index of the first route that matches; 0, the service's default, where none does. path: as normal_path() of
    native/paths.pxd makes it."""
    cdef uint32_t i, bit = method_bit(method)
    for i in range(1, p.n_routes):
        if (p.route[i].methods == 0 or p.route[i].methods & bit) and path_matches(&p.route[i], path):
            return <uint16_t>i
    return 0


cdef inline bint is_weaker(const RoutePolicy *route, const RoutePolicy *default) noexcept nogil:
    """Does this route look at less, or let more pass, than the service's default?"""
    return (route.exempt or route.mode < default.mode or route.body_limit < default.body_limit
            or (route.body_mode == ROUTE_BODY_NONE and default.body_mode != ROUTE_BODY_NONE)
            or route.threshold[4] > default.threshold[4])


cdef inline uint16_t pick_route(const Policy *p, Slice method, Slice sent, char *scratch, uint32_t room,
                                Slice *path) noexcept nogil:
    """The route of a path as sent, whose normal form is put into path. Services differ in how they read other
    spellings: one such may not buy a client a weaker route than the default, as the service may serve another."""
    cdef uint16_t at
    path[0] = normal_path(sent, scratch, room)
    at = find_route(p, method, path[0])
    if at and path.p != sent.p and is_weaker(&p.route[at], &p.route[0]) and (
            path.n != sent.n or memcmp(path.p, sent.p, sent.n) != 0):
        return 0
    return at


cdef inline int find_range(const Policy *p, const uint8_t *address) noexcept nogil:
    """Index of the interval that holds the address, or -1. Intervals are sorted and disjoint."""
    cdef int low = 0, high = <int>p.n_ranges - 1, mid
    while low <= high:
        mid = (low + high) >> 1
        if memcmp(address, p.range[mid].low, 16) < 0:
            high = mid - 1
        elif memcmp(address, p.range[mid].high, 16) > 0:
            low = mid + 1
        else:
            return mid
    return -1
