"""One request as every proxy's host sees it, whatever carried it here: headers, then a body in parts, then a decision.

Shared by the ext_proc machine (native/extproc.pxd) and the plugins (native/plugins/): who the client is, whether a body
is wanted, what of it is kept, and that the host is asked exactly once. Header and body slices point to the caller's
memory; they are copied into pooled buffers only when the decision has to wait for (more of) the body.
"""
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from native.address cimport forwarded_add, forwarded_address, parse_address, trimmed
from native.base cimport (ACTION_ALLOW, ACTION_THROTTLE, BODY_NONE, BODY_PART, BODY_WHOLE, HEADERS_MAX, Decision,
                          Header, Request, Slice, lower, or_now_ns, slice_is, slice_is_nocase)
from native.extproc_pool cimport (BODY_MODE_BUFFERED, BODY_MODE_BUFFERED_PARTIAL, BODY_MODE_NONE, BODY_MODE_STREAMED,
                                  NO_LENGTH, PHASE_DECIDED, PHASE_REFUSED, STREAM_BODY_BYTES_MAX,
                                  STREAM_HEADER_BYTES_MAX, TELL_ALL, TELL_FLAGGED, UPGRADE_ASKED, UPGRADE_FRAMED,
                                  UPGRADE_NAMED, BodyPlan, ExtProcHost, StreamPool, StreamState, buffer_give,
                                  buffer_size, buffer_take, stream_release_buffers)
from native.wording cimport is_ours


# ---- headers ----------------------------------------------------------------------------------------

cdef inline bint has_token(Slice v, const char *token, uint32_t n) noexcept nogil:
    """Is it one of the words of this comma-separated list?"""
    cdef uint32_t i = 0, start
    cdef Slice word
    while i < v.n:
        start = i
        while i < v.n and v.p[i] != c',':
            i += 1
        word.p = v.p + start
        word.n = i - start
        if slice_is_nocase(trimmed(word), token, n):
            return True
        i += 1
    return False


cdef inline bint take_pseudo(StreamState *s, Slice value, Slice *field, uint8_t *seen) noexcept nogil:
    cdef uint32_t room = STREAM_HEADER_BYTES_MAX - s.header_bytes
    if seen[0]:
        return False
    seen[0] = 1
    if value.n > room:
        value.n = room
        s.request.headers_dropped += 1
    s.header_bytes += value.n
    field[0] = value
    return True


cdef inline uint64_t read_length(Slice v) noexcept nogil:
    """Up to nine digits; NO_LENGTH otherwise, which is more than any limit too."""
    cdef uint64_t n = 0
    cdef uint32_t i
    if v.n == 0 or v.n > 9:
        return NO_LENGTH
    for i in range(v.n):
        if not 48 <= v.p[i] <= 57:
            return NO_LENGTH
        n = n * 10 + <uint64_t>(v.p[i] - 48)
    return n


cdef inline bint take_request_header(StreamState *s, const ExtProcHost *host, Slice name,
                                     Slice value) noexcept nogil:
    """One header into the request; False for a pseudo header that was there already."""
    cdef Header *h
    if name.n == 0:
        s.request.headers_dropped += 1
        return True
    if name.p[0] == 58:
        if slice_is(name, ":method", 7):
            return take_pseudo(s, value, &s.request.method, &s.has_method)
        if slice_is(name, ":path", 5):
            return take_pseudo(s, value, &s.request.path, &s.has_path)
        if slice_is(name, ":authority", 10):
            return take_pseudo(s, value, &s.request.authority, &s.has_authority)
        if slice_is(name, ":scheme", 7):
            return take_pseudo(s, value, &s.request.scheme, &s.has_scheme)
        return True
    # what follows must not depend on room: padding would switch it off
    if is_ours(name):
        s.has_foreign = 1
    if host.address_header.n == 0:
        if slice_is_nocase(name, "x-forwarded-for", 15):
            forwarded_add(&s.forwarded, value)
    elif same_name(name, host.address_header):
        forwarded_add(&s.forwarded, value)
    if (name.n == 12 and slice_is_nocase(name, "content-type", 12) and value.n >= 16
            and starts_nocase(value, "application/grpc", 16)
            and (value.n == 16 or value.p[16] == c'+' or value.p[16] == c';' or value.p[16] == c' ')):
        s.is_grpc = 1
    if name.n == 14 and slice_is_nocase(name, "content-length", 14):
        s.content_length = read_length(value)
        s.upgrade |= UPGRADE_FRAMED
    elif name.n == 17 and slice_is_nocase(name, "transfer-encoding", 17):
        s.upgrade |= UPGRADE_FRAMED
    elif name.n == 7 and slice_is_nocase(name, "upgrade", 7) and value.n:
        s.upgrade |= UPGRADE_NAMED
    elif name.n == 10 and slice_is_nocase(name, "connection", 10) and has_token(value, "upgrade", 7):
        s.upgrade |= UPGRADE_ASKED
    if (s.request.n_headers >= HEADERS_MAX or name.n > STREAM_HEADER_BYTES_MAX
            or value.n > STREAM_HEADER_BYTES_MAX
            or s.header_bytes + name.n + value.n > STREAM_HEADER_BYTES_MAX):
        s.request.headers_dropped += 1
        return True
    h = &s.headers[s.request.n_headers]
    h.name = name
    h.value = value
    s.header_bytes += name.n + value.n
    s.request.n_headers += 1
    return True


cdef inline bint same_name(Slice a, Slice b) noexcept nogil:
    cdef uint32_t i
    if a.n != b.n:
        return False
    for i in range(a.n):
        if lower(<uint8_t>a.p[i]) != lower(<uint8_t>b.p[i]):
            return False
    return True


cdef inline bint starts_nocase(Slice s, const char *lit, uint32_t n) noexcept nogil:
    s.n = n if s.n > n else s.n
    return slice_is_nocase(s, lit, n)


cdef inline void find_client(StreamState *s, const ExtProcHost *host) noexcept nogil:
    """The client's address: a header that the operator named, or hops to count, come first; with
    neither the proxy's own idea (attribute source.address) does, then X-Forwarded-For."""
    cdef bint named = host.address_header.n > 0 or host.trusted_hops > 0
    if host.trusted_hops == 0 and slice_is_nocase(host.address_header, "x-forwarded-for", 15):
        named = False
    if not named and s.attribute_address.n and parse_address(s.attribute_address, s.request.address):
        s.request.has_address = 1
    elif forwarded_address(&s.forwarded, host.trusted_hops, s.request.address):
        s.request.has_address = 1
    elif named and s.attribute_address.n and parse_address(s.attribute_address, s.request.address):
        s.request.has_address = 1
    else:
        memset(s.request.address, 0, 16)


cdef inline void move_slice(Slice *s, char **to) noexcept nogil:
    if s.n:
        memcpy(to[0], s.p, s.n)
    s.p = to[0]
    to[0] += s.n


cdef inline bint keep_headers(StreamPool *pool, StreamState *s) noexcept nogil:
    """Copies what the request's slices point to out of the message; False: no buffer left."""
    cdef Request *r = &s.request
    cdef uint32_t i
    cdef char *to
    # the query is part of path as counted, one byte ('?') less
    s.block = buffer_take(pool, s.header_bytes, &s.block_class)
    if s.block == NULL:
        pool.counts.no_buffer += 1
        return False
    to = s.block
    move_slice(&r.method, &to)
    move_slice(&r.path, &to)
    move_slice(&r.query, &to)
    move_slice(&r.authority, &to)
    move_slice(&r.scheme, &to)
    for i in range(r.n_headers):
        move_slice(&s.headers[i].name, &to)
        move_slice(&s.headers[i].value, &to)
    return True


cdef inline bint keep_body(StreamPool *pool, StreamState *s, Slice chunk) noexcept nogil:
    """Appends the chunk as far as the limit goes; False: the limit is passed, or no buffer left.

    The buffer doubles, so that a body in tiny chunks is copied twice at most on average.
    """
    cdef char *larger
    cdef int8_t larger_class
    cdef uint32_t n = chunk.n
    cdef bint fits = True
    if n > s.body_limit - s.body_n:
        n = s.body_limit - s.body_n
        fits = False
    if n == 0:
        return fits
    if s.body == NULL or s.body_n + n > buffer_size(s.body_class):
        larger = buffer_take(pool, s.body_n + n, &larger_class)
        if larger == NULL:
            pool.counts.no_buffer += 1
            # what fits into the buffer at hand is still read
            n = <uint32_t>buffer_size(s.body_class) - s.body_n if s.body != NULL else 0
            fits = False
        else:
            if s.body != NULL:
                memcpy(larger, s.body, s.body_n)
                buffer_give(pool, s.body, s.body_class)
            s.body = larger
            s.body_class = larger_class
    if n:
        memcpy(s.body + s.body_n, chunk.p, n)
        s.body_n += n
    return fits


cdef inline void decide(StreamPool *pool, StreamState *s, const ExtProcHost *host) noexcept nogil:
    """Asks the host, once; the request's slices are gone afterwards."""
    s.request.headers = s.headers
    if s.request.body_state == BODY_PART:
        pool.counts.bodies_cut += 1
    host.decide(host.ctx, &s.request, &s.decision)
    s.decided_ns = or_now_ns()
    s.decided = 1
    pool.counts.decisions += 1
    s.phase = PHASE_REFUSED if s.decision.enforced >= ACTION_THROTTLE and not s.observing else PHASE_DECIDED
    stream_release_buffers(pool, s)


cdef inline void decide_on_kept(StreamPool *pool, StreamState *s, const ExtProcHost *host,
                                uint8_t body_state) noexcept nogil:
    s.request.body.p = s.body
    s.request.body.n = s.body_n
    s.request.body_state = body_state if s.request.body_bytes or body_state == BODY_PART else BODY_NONE
    decide(pool, s, host)


cdef inline bint holds_message(const char *p, uint32_t n) noexcept nogil:
    """Does a gRPC body hold a whole message with something in it: flags (0 or 1), four bytes of length, so many bytes?
    Empty ones before it say nothing."""
    cdef uint32_t at = 0, length
    while n - at >= 5 and <uint8_t>p[at] <= 1:
        length = (<uint32_t><uint8_t>p[at + 1] << 24 | <uint32_t><uint8_t>p[at + 2] << 16
                  | <uint32_t><uint8_t>p[at + 3] << 8 | <uint32_t><uint8_t>p[at + 4])
        if length:
            return n - at - 5 >= length
        at += 5
    return False


cdef inline bint take_body(StreamPool *pool, StreamState *s, const ExtProcHost *host, Slice chunk, bint end,
                           bint single) noexcept nogil:
    """A part of an awaited body. True: that was enough and the request is decided. single: no other will come, what is
    there is to be decided on."""
    cdef bint whole = end or (single and s.plan_mode == BODY_MODE_BUFFERED)
    cdef bint fits
    if s.body_n == 0 and s.by_message and holds_message(chunk.p, chunk.n):
        whole = True
    if s.body_n == 0 and (whole or single or chunk.n > s.body_limit):
        # nothing kept so far: no need to copy
        fits = chunk.n <= s.body_limit
        s.request.body.p = chunk.p
        s.request.body.n = chunk.n if fits else s.body_limit
        s.request.body_state = (BODY_PART if not (whole and fits) else BODY_WHOLE if chunk.n else BODY_NONE)
        decide(pool, s, host)
        return True
    fits = keep_body(pool, s, chunk)
    if end or not fits or (s.by_message and holds_message(s.body, s.body_n)):
        decide_on_kept(pool, s, host, BODY_WHOLE if fits else BODY_PART)
        return True
    return False


cdef inline bint told(uint8_t level, const Decision *d) noexcept nogil:
    """Is this decision worth telling? Each header and each field of metadata costs the proxy about a microsecond."""
    return level == TELL_ALL or (level == TELL_FLAGGED and d.action != ACTION_ALLOW)


cdef inline void split_path(Request *r) noexcept nogil:
    cdef const char *mark = NULL
    if r.path.n:
        mark = <const char *>memchr(r.path.p, 63, r.path.n)
    if mark != NULL:
        r.query.p = mark + 1
        r.query.n = <uint32_t>(r.path.p + r.path.n - mark - 1)
        r.path.n = <uint32_t>(mark - r.path.p)


cdef inline bint is_tunnel(const StreamState *s) noexcept nogil:
    """A WebSocket or the like: what follows the headers is no body and never ends. Whoever announces a body does not
    get around having it read by calling it so."""
    if slice_is(s.request.method, "CONNECT", 7):
        return True
    return s.upgrade == UPGRADE_NAMED | UPGRADE_ASKED and slice_is(s.request.method, "GET", 3)


cdef inline bint body_wanted(StreamState *s, const ExtProcHost *host) noexcept nogil:
    cdef BodyPlan plan
    if is_tunnel(s):
        return False
    memset(&plan, 0, sizeof(BodyPlan))
    host.plan(host.ctx, &s.request, &plan)
    if plan.mode == BODY_MODE_NONE or plan.mode > BODY_MODE_BUFFERED_PARTIAL:
        return False
    if plan.limit_bytes == 0 or plan.decide_now:
        return False
    # an observing stream cannot ask: only a body that comes anyway can be waited for
    if s.observing and s.announced_body == 0:
        return False
    s.plan_mode = plan.mode
    s.body_limit = plan.limit_bytes if plan.limit_bytes < STREAM_BODY_BYTES_MAX else STREAM_BODY_BYTES_MAX
    if s.is_grpc and slice_is(s.request.method, "POST", 4):
        # A stream of messages may never end, and its service may speak first: nothing is held back but the part
        # that completes the first message, which is what is judged.
        s.plan_mode = BODY_MODE_STREAMED
        s.by_message = 1
    # A proxy that buffers a body longer than its own buffer refuses it (413) or, where it came too
    # fast, waits for ever. Only one that is known to be short may be asked for as a whole.
    if s.plan_mode == BODY_MODE_BUFFERED and s.content_length > s.body_limit:
        s.plan_mode = BODY_MODE_BUFFERED_PARTIAL
    return True
