"""Sliding windows of a client and the features read off them.

A window is two spans, the running one and the one before; its value is the running span plus
the part of the span before that still lies inside. Distinct counts are linear counting
(Whang et al. 1990) over 256 bits, saturating near 1,400. Means and variances are exponentially
weighted. Everything is updated in constant time and constant memory.
"""
from libc.math cimport fabsf, log1pf, logf, sqrtf
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from native.arena cimport RouteStats
from native.base cimport Request, Slice, lower, mix64, or_popcount64, or_read64
from native.clients cimport *
from native.policy cimport METHOD_GET, METHOD_HEAD, METHOD_OPTIONS, METHOD_POST, method_bit

cdef extern from *:
    """
    static const int64_t or_window_us[5] = {1000000, 10000000, 60000000, 600000000, 3600000000LL};
    """
    const int64_t *or_window_us

cdef enum:
    BEHAVIOUR_FEATURES = 32
    BEHAVIOUR_SCHEMA = 1

# what the request alone says, before any client is looked at
cdef struct Shape:
    uint32_t path_hash
    uint32_t template_hash       # 0: the request names no object
    uint32_t agent_hash
    uint64_t object_hash
    uint64_t object_number       # the id as a number, where it is one
    uint8_t is_write
    uint8_t is_login             # an attempt to log in, or to get a token
    uint8_t is_strict_login      # ... by the plain words
    float size                   # ln(1 + payload bytes)
    float kilobytes


cdef inline uint64_t hash_more(uint64_t h, const char *p, uint32_t n) noexcept nogil:
    """A quick hash for sketches: 8 bytes a step. Not keyed: a collision only blurs a count."""
    cdef uint32_t i = 0
    while i + 8 <= n:
        h = (h ^ or_read64(p + i)) * <uint64_t>0x9e3779b97f4a7c15u
        h ^= h >> 29
        i += 8
    while i < n:
        h = (h ^ <uint8_t>p[i]) * <uint64_t>0x100000001b3u
        i += 1
    return h ^ (h >> 32)


cdef inline int id_like(const char *p, uint32_t n, uint64_t *number) noexcept nogil:
    """Does this segment name an object? Digits; a UUID; 12 or more hex digits with a digit among
    them; letters, then at least three digits ("INV-00017"). number: its digits, if it ends so."""
    cdef uint32_t i, digits = 0, hexes = 0, dashes = 0, tail = 0
    cdef uint64_t value = 0
    cdef uint8_t c
    number[0] = 0
    if n == 0 or n > 64:
        return 0
    for i in range(n):
        c = lower(<uint8_t>p[i])
        if 48 <= c <= 57:
            digits += 1
            hexes += 1
            tail += 1
            value = value * 10 + (c - 48) if tail <= 18 else value
        else:
            tail = 0
            value = 0
            if 97 <= c <= 102:
                hexes += 1
            elif c == 45 or c == 95:
                dashes += 1
            elif c == 46:
                return 0                          # a file name
    if digits == 0:
        return 0
    if tail == n:
        number[0] = value
        return 1
    if hexes + dashes == n and hexes >= 12:
        return 1
    if tail >= 3:
        number[0] = value
        return 1
    return 0


cdef inline bint contains_nocase(const char *p, uint32_t n, const char *word, uint32_t m) noexcept nogil:
    cdef uint32_t i, j
    if m > n:
        return False
    for i in range(n - m + 1):
        j = 0
        while j < m and lower(<uint8_t>p[i + j]) == <uint8_t>word[j]:
            j += 1
        if j == m:
            return True
    return False


cdef inline bint id_key(const char *p, uint32_t n) noexcept nogil:
    """Does a query key with this name carry an object's id: "id", "user_id", "orderId", "uid", ..."""
    if n < 2 or n > 40:
        return False
    if lower(<uint8_t>p[n - 2]) == c'i' and lower(<uint8_t>p[n - 1]) == c'd':
        return True
    return ((n == 4 and memcmp(p, b"user", 4) == 0) or (n == 5 and memcmp(p, b"order", 5) == 0)
            or (n == 7 and (memcmp(p, b"account", 7) == 0 or memcmp(p, b"invoice", 7) == 0))
            or (n == 8 and memcmp(p, b"customer", 8) == 0))


cdef inline void shape_of(const Request *r, Slice path, bint login_route, Shape *s) noexcept nogil:
    """path: the request's, in its normal form."""
    cdef uint64_t h = <uint64_t>0xcbf29ce484222325u, ids = 0, number
    cdef uint32_t i = 0, start, eq
    cdef uint32_t bit = method_bit(r.method)
    cdef const char *p = path.p
    cdef uint32_t n = path.n
    memset(s, 0, sizeof(Shape))
    if n > 2048:
        n = 2048
    s.path_hash = <uint32_t>mix64(hash_more(h, p, n)) | 1
    while i < n:
        if p[i] == c'/':
            i += 1
            continue
        start = i
        while i < n and p[i] != c'/':
            i += 1
        if id_like(p + start, i - start, &number):
            h = (h ^ 42) * <uint64_t>0x100000001b3u
            ids = hash_more(ids + 1, p + start, i - start)
            s.object_number = number
            s.template_hash = 1
        else:
            h = hash_more(h + 7, p + start, i - start)
    p = r.query.p
    n = r.query.n if r.query.n < 2048 else 2048
    i = 0
    while i < n:
        start = i
        while i < n and p[i] != c'=' and p[i] != c'&':
            i += 1
        if i < n and p[i] == c'=':
            eq = i
            i += 1
            while i < n and p[i] != c'&':
                i += 1
            if id_key(p + start, eq - start) and id_like(p + eq + 1, i - eq - 1, &number):
                h = hash_more(h + 11, p + start, eq - start)
                ids = hash_more(ids + 1, p + eq + 1, i - eq - 1)
                s.object_number = number
                s.template_hash = 1
        i += 1
    if s.template_hash:
        s.template_hash = <uint32_t>mix64(h + bit) | 1
        s.object_hash = mix64(h ^ ids) | 1
    s.is_write = 0 if bit & (METHOD_GET | METHOD_HEAD | METHOD_OPTIONS) else 1
    n = path.n if path.n < 256 else 256
    if login_route:
        s.is_login = s.is_strict_login = 1
    elif bit == METHOD_POST and n:
        p = path.p
        if (contains_nocase(p, n, b"login", 5) or contains_nocase(p, n, b"logon", 5)
                or contains_nocase(p, n, b"signin", 6) or contains_nocase(p, n, b"sign-in", 7)
                or contains_nocase(p, n, b"sign_in", 7) or contains_nocase(p, n, b"xmlrpc", 6)):
            s.is_login = s.is_strict_login = 1
        elif (contains_nocase(p, n, b"auth", 4) or contains_nocase(p, n, b"session", 7)
              or contains_nocase(p, n, b"token", 5) or contains_nocase(p, n, b"passw", 5)):
            s.is_login = 1
    for i in range(r.n_headers):
        if r.headers[i].name.n == 10 and memcmp(r.headers[i].name.p, b"user-agent", 10) == 0:
            s.agent_hash = <uint32_t>mix64(hash_more(1, r.headers[i].value.p, r.headers[i].value.n)) | 1
            break
    s.size = log1pf(<float>r.body_bytes)
    s.kilobytes = <float>r.body_bytes / 1024.0


# -- windows -----------------------------------------------------------------------------------

cdef inline void window_roll(Window *w, int64_t epoch) noexcept nogil:
    if epoch <= w.epoch:
        return                                    # the same span, or a clock that went back
    if epoch == w.epoch + 1:
        memcpy(w.before, w.now, sizeof(w.now))
    else:
        memset(w.before, 0, sizeof(w.before))
    memset(w.now, 0, sizeof(w.now))
    w.epoch = epoch


cdef inline float window_value(const Window *w, int i, int q, int64_t time_us) noexcept nogil:
    """Quantity q in the last or_window_us[i] before time_us; the window must have been rolled."""
    cdef float inside = 1.0 - <float>(time_us - w.epoch * or_window_us[i]) / <float>or_window_us[i]
    if inside < 0:
        inside = 0
    elif inside > 1:
        inside = 1
    return w.now[q] + w.before[q] * inside


cdef inline void sketch_add(Sketch *s, uint64_t h) noexcept nogil:
    h = mix64(h)
    s.now[(h >> 6) & 3] |= <uint64_t>1 << (h & 63)


cdef inline float sketch_count(const Sketch *s) noexcept nogil:
    cdef int i, ones = 0
    for i in range(4):
        ones += or_popcount64(s.now[i] | s.before[i])
    if ones >= 255:
        return 1420.0
    return 256.0 * (5.545177444 - logf(<float>(256 - ones)))


cdef inline float templates_count(const ClientEntry *e) noexcept nogil:
    cdef int ones = or_popcount64(e.templates[0] | e.templates[1])
    if ones >= 63:
        return 266.0
    return 64.0 * (4.158883083 - logf(<float>(64 - ones)))


cdef inline void ewma(float *mean, float *var, float x, float alpha) noexcept nogil:
    cdef float d = x - mean[0]
    mean[0] += alpha * d
    var[0] = (1 - alpha) * (var[0] + alpha * d * d)


cdef inline void entry_roll(ClientEntry *e, int64_t t) noexcept nogil:
    """Bring windows and sketches to time t (us); fold full minutes into the client's history. Where the clock
    was set back, begin anew: windows of a time to come would only ever fill."""
    cdef int i, _i, k
    cdef int64_t epoch, minutes, passed
    if t < e.last_us - CLOCK_BACK_US:
        entry_reset(e, t)
    minutes = t // or_window_us[WINDOW_60S]
    passed = minutes - e.window[WINDOW_60S].epoch
    if passed > 0 and e.requests:
        ewma(&e.history_mean, &e.history_var, log1pf(e.window[WINDOW_60S].now[Q_REQUESTS]), 0.1)
        k = <int>(passed - 1 if passed < 30 else 30)
        for _i in range(k):
            ewma(&e.history_mean, &e.history_var, 0.0, 0.1)
    for i in range(WINDOWS):
        window_roll(&e.window[i], t // or_window_us[i])
    epoch = t // or_window_us[WINDOW_600S]
    if epoch > e.sketch_epoch:
        for i in range(SKETCHES):
            if epoch == e.sketch_epoch + 1:
                memcpy(e.sketch[i].before, e.sketch[i].now, sizeof(e.sketch[i].now))
            else:
                memset(e.sketch[i].before, 0, sizeof(e.sketch[i].before))
            memset(e.sketch[i].now, 0, sizeof(e.sketch[i].now))
        e.templates[1] = e.templates[0] if epoch == e.sketch_epoch + 1 else 0
        e.templates[0] = 0
        e.attacked[1] = e.attacked[0] if epoch == e.sketch_epoch + 1 else 0
        e.attacked[0] = 0
        e.sketch_epoch = epoch
        for i in range(PARTIES):
            e.party[i].logins >>= 1
            e.party[i].faults >>= 1
            e.party[i].walked >>= 1
            e.party[i].objects >>= 1


cdef inline Party *party_of(ClientEntry *e, uint64_t address_key) noexcept nogil:
    """The place of an address among those that bear this principal, or NULL."""
    cdef uint32_t tag = <uint32_t>(address_key >> 32) | 1
    cdef int i
    for i in range(PARTIES):
        if e.party[i].address == tag:
            return &e.party[i]
    return NULL


cdef inline Party *party_take(ClientEntry *e, uint64_t address_key) noexcept nogil:
    """The same, given one where it has none: the least of the others gives way."""
    cdef Party *p = party_of(e, address_key)
    cdef uint32_t weight, least = 0
    cdef int i
    if p != NULL:
        return p
    for i in range(PARTIES):
        weight = (e.party[i].objects + 16 * (<uint32_t>e.party[i].logins + e.party[i].faults + e.party[i].walked)
                  if e.party[i].address else 0)
        if p == NULL or weight < least:
            p = &e.party[i]
            least = weight
    memset(p, 0, sizeof(Party))
    p.address = <uint32_t>(address_key >> 32) | 1
    return p


cdef inline void party_object(ClientEntry *e, uint64_t address_key) noexcept nogil:
    """The principal's entry has just counted a request that names an object: note who sent it."""
    cdef Party *p = party_take(e, address_key)
    if p.objects < 255:
        p.objects += 1
    if e.step_run and p.walked < 250:
        # a long walk that goes on from ever new addresses: this very request is part of it
        p.walked += 2 if e.step_run > 8 else 1


cdef inline void party_answer(ClientEntry *e, uint64_t address_key, int status, bint login) noexcept nogil:
    """Note a failure, as the detectors count them."""
    cdef Party *p
    cdef bint refused = status == 401 or status == 403
    if login and (refused or status == 400 or status == 422 or status == 423 or status == 429):
        p = party_take(e, address_key)
        if p.logins < 255:
            p.logins += 1
    elif refused or status == 404 or status == 410:
        p = party_take(e, address_key)
        if p.faults < 255:
            p.faults += 1


cdef inline void entry_add(ClientEntry *e, int q, float x) noexcept nogil:
    cdef int i
    for i in range(WINDOWS):
        e.window[i].now[q] += x


cdef inline void entry_request(ClientEntry *e, const Shape *s, int64_t t, uint64_t identity) noexcept nogil:
    """The request half. The entry is locked by the caller."""
    cdef float gap
    cdef int64_t step
    entry_roll(e, t)
    if e.requests:
        gap = logf(<float>(t - e.last_us) * 0.001 + 1.0) if t > e.last_us else 0.0
        if e.requests == 1:
            e.gap_mean = gap
        else:
            ewma(&e.gap_mean, &e.gap_var, gap, 0.1)
        ewma(&e.size_mean, &e.size_var, s.size, 0.05)
    else:
        e.size_mean = s.size
    if t > e.last_us:
        e.last_us = t
    e.requests += 1
    entry_touch(e, t)
    entry_add(e, Q_REQUESTS, 1)
    if s.is_write:
        entry_add(e, Q_WRITES, 1)
    if s.is_strict_login:
        entry_add(e, Q_LOGINS, 1)
    if s.kilobytes > 0:
        entry_add(e, Q_KILOBYTES, s.kilobytes)
    sketch_add(&e.sketch[SKETCH_PATHS], s.path_hash)
    if s.template_hash:
        entry_add(e, Q_OBJECTS, 1)
        sketch_add(&e.sketch[SKETCH_OBJECTS], s.object_hash)
        e.templates[0] |= <uint64_t>1 << (mix64(s.template_hash) & 63)
        if s.template_hash == e.last_template and s.object_number:
            step = <int64_t>s.object_number - <int64_t>e.last_object
            if step != 0:
                if step == e.step and -64 <= step <= 64:
                    if e.step_run < 65535:
                        e.step_run += 1
                else:
                    e.step_run = 0
                e.step = step
        else:
            e.step_run = 0
            e.step = 0
        e.last_template = s.template_hash
        e.last_object = s.object_number
    elif not s.is_write:
        # a listing, perhaps: ids that a client was just told, page by page, are not guessed ones
        e.step_run = 0
    if identity:
        sketch_add(&e.sketch[SKETCH_IDENTITIES], identity)
    if s.agent_hash:
        sketch_add(&e.sketch[SKETCH_AGENTS], s.agent_hash)
        if e.last_agent and e.last_agent != s.agent_hash and e.agent_changes < 65535:
            e.agent_changes += 1
        e.last_agent = s.agent_hash


cdef inline void entry_response(ClientEntry *e, int64_t t, int status, bint login, bint object_named,
                                float response_ms) noexcept nogil:
    """The response half. The entry is locked by the caller. response_ms < 0: not known."""
    cdef float unused = 0
    cdef bint refused = status == 401 or status == 403
    cdef bint missing = status == 404 or status == 410
    entry_roll(e, t)
    if login and (refused or status == 400 or status == 422 or status == 423 or status == 429):
        entry_add(e, Q_LOGIN_FAILURES, 1)
        if e.fail_streak < 65535:
            e.fail_streak += 1
    elif login and 200 <= status < 400:
        e.fail_streak = 0
    elif refused:
        entry_add(e, Q_DENIED, 1)
    elif missing:
        entry_add(e, Q_MISSING, 1)
    elif status >= 500:
        entry_add(e, Q_ERRORS, 1)
    if object_named and (refused or missing):
        entry_add(e, Q_OBJECTS_REFUSED, 1)
    if response_ms >= 0:
        ewma(&e.response_mean, &unused, log1pf(response_ms), 0.1)


cdef inline void entry_attack(ClientEntry *e, int64_t t, uint32_t path_hash) noexcept nogil:
    """The request was refused for its text. The entry is locked by the caller."""
    entry_roll(e, t)
    entry_add(e, Q_ATTACKS, 1)
    e.attacked[0] |= <uint64_t>1 << (mix64(path_hash) & 63)


cdef inline float ratio(float a, float b) noexcept nogil:
    return a / b if b > 0 else 0.0


cdef inline float clean(float x) noexcept nogil:
    """Finite, whatever two writers did to the entry."""
    if x != x or x > 1e9:
        return 1e9
    return x if x > -1e9 else -1e9


cdef inline float deviation(float x, float mean, float var) noexcept nogil:
    """How many standard deviations above the mean; the floor keeps a constant history from
    making every change infinite."""
    return (x - mean) / sqrtf(var + 0.09)


cdef inline void entry_features(const ClientEntry *e, const RouteStats *route, const Shape *s, int64_t t,
                                float *x) noexcept nogil:
    """x[BEHAVIOUR_FEATURES], in the order of native.arenafile.BEHAVIOUR_FEATURE_NAMES. Counts enter
    as ln(1 + n): trees don't care, people reading plots do."""
    cdef float r1 = window_value(&e.window[0], 0, Q_REQUESTS, t)
    cdef float r10 = window_value(&e.window[1], 1, Q_REQUESTS, t)
    cdef float r60 = window_value(&e.window[2], 2, Q_REQUESTS, t)
    cdef float r600 = window_value(&e.window[3], 3, Q_REQUESTS, t)
    cdef float r3600 = window_value(&e.window[4], 4, Q_REQUESTS, t)
    cdef float logins = window_value(&e.window[3], 3, Q_LOGINS, t)
    cdef float failures = window_value(&e.window[3], 3, Q_LOGIN_FAILURES, t)
    cdef float objects = window_value(&e.window[3], 3, Q_OBJECTS, t)
    cdef float paths = sketch_count(&e.sketch[SKETCH_PATHS])
    cdef float distinct = sketch_count(&e.sketch[SKETCH_OBJECTS])
    cdef float minute = log1pf(r60)
    cdef int i
    x[0] = log1pf(r1)
    x[1] = log1pf(r10)
    x[2] = minute
    x[3] = log1pf(r600)
    x[4] = log1pf(r3600)
    x[5] = ratio(r10 * 6, r60 + 1)                # burstiness: ten seconds against the minute
    x[6] = ratio(r60 * 10, r600 + 1)
    x[7] = deviation(minute, e.history_mean, e.history_var)
    x[8] = deviation(minute, route.rate_mean, route.rate_var)
    x[9] = e.gap_mean
    x[10] = sqrtf(e.gap_var)                      # near 0: a machine's regularity
    x[11] = ratio(window_value(&e.window[2], 2, Q_MISSING, t), r60)
    x[12] = ratio(window_value(&e.window[3], 3, Q_MISSING, t), r600)
    x[13] = ratio(window_value(&e.window[3], 3, Q_DENIED, t), r600)
    x[14] = ratio(window_value(&e.window[3], 3, Q_ERRORS, t), r600)
    x[15] = log1pf(logins)
    x[16] = log1pf(failures)
    x[17] = ratio(failures, logins)
    x[18] = ratio(logins, r600)
    x[19] = ratio(window_value(&e.window[3], 3, Q_WRITES, t), r600)
    x[20] = log1pf(paths)
    x[21] = ratio(paths, r600 + 1)
    x[22] = log1pf(distinct)
    x[23] = ratio(objects, r600)
    x[24] = log1pf(<float>e.step_run)
    x[25] = log1pf(sketch_count(&e.sketch[SKETCH_IDENTITIES]))
    x[26] = log1pf(sketch_count(&e.sketch[SKETCH_AGENTS]))
    x[27] = log1pf(<float>e.agent_changes)
    x[28] = e.size_mean
    x[29] = deviation(s.size, route.size_mean, route.size_var)
    x[30] = e.response_mean
    x[31] = log1pf(<float>(t - e.first_us) * 1e-6) if t > e.first_us else 0.0
    for i in range(BEHAVIOUR_FEATURES):
        x[i] = clean(x[i])
