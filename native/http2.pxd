"""Connections and the loop of one thread: sockets in and out of native/rpc.pxd's streams.

One thread, one epoll. A connection belongs to the thread that it was dealt to for all its life.
Reading stops while a write is held up, so that what is kept for a peer stays bounded: at most
GATHER_BYTES unsent bytes per connection, and what Limits allow per stream and thread.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from native.base cimport or_add64, or_load64, or_now_ns
from native.extproc_pool cimport ExtProcHost, pool_close, pool_init
from native.nghttp2 cimport *
from native.rpc cimport *
from native.rpc_read cimport (begin_headers, close_stream, expire, health_now, sent_frame, take_data, take_frame,
                              take_header, tell_health)

cdef extern from *:
    """
    #define _GNU_SOURCE 1
    #include <fcntl.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <stdint.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <unistd.h>
    static inline int or_epoll_open(void) { return epoll_create1(EPOLL_CLOEXEC); }
    static inline int or_epoll_set(int epoll, int op, int fd, uint32_t events, void *ptr) {
        struct epoll_event e;
        e.events = events;
        e.data.ptr = ptr;
        return epoll_ctl(epoll, op, fd, &e);
    }
    static inline void or_socket_set(int fd) {
        int one = 1;
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        /* answers are small and awaited; fails on a UNIX socket, which has no such delay */
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    static inline int or_accept(int fd) { return accept(fd, 0, 0); }
    static inline ssize_t or_receive(int fd, void *p, size_t n) { return recv(fd, p, n, MSG_DONTWAIT); }
    static inline ssize_t or_send(int fd, const void *p, size_t n) {
        return send(fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL); }
    """
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_wait(int epoll, epoll_event *events, int n, int timeout_ms) nogil
    int or_epoll_open() noexcept nogil
    int or_epoll_set(int epoll, int op, int fd, uint32_t events, void *ptr) noexcept nogil
    void or_socket_set(int fd) noexcept nogil
    int or_accept(int fd) noexcept nogil
    ssize_t or_receive(int fd, void *p, size_t n) noexcept nogil
    ssize_t or_send(int fd, const void *p, size_t n) noexcept nogil
    int or_close_fd "close" (int fd) noexcept nogil
    ssize_t or_read_fd "read" (int fd, void *p, size_t n) noexcept nogil
    ssize_t or_write_fd "write" (int fd, const void *p, size_t n) noexcept nogil

cdef enum:
    READ_BYTES = 65536           # at a time
    GATHER_BYTES = 65536         # written at a time, and one frame more
    FRAME_BYTES_MAX = 32768      # of what the library gives us at once; it makes frames of 16 KiB
    READS_MAX = 4                # before the other connections of this round have their turn
    EVENTS_MAX = 64
    INBOX_MAX = 64               # dealt sockets taken at a time
    TICK_MS = 100
    STREAMS_SHARE_MIN = 256
    STREAM_WINDOW_BYTES = 1048576
    CONNECTION_WINDOW_BYTES = 16777216


cdef struct Loop:
    Thread thread
    nghttp2_session_callbacks *callbacks
    nghttp2_option *option
    Conn *conns
    uint64_t live                # connections; read by the thread that deals
    Loop *loops                  # of all threads: the first one deals
    uint32_t n_loops
    int epoll
    int listener                 # -1: this thread doesn't accept
    int wake_in                  # one byte for "look again", five for a socket
    int wake_out
    uint64_t told_serving
    uint64_t saw_phase
    uint64_t closing_since_ns
    uint64_t ticked_ns
    uint64_t full_until_ns       # no descriptors left: don't spin on accept()
    uint8_t exact                # tests: read into a block of the exact size, so that a sanitizer sees
    char *read_buffer
    char *gather


# ---- one connection ----------------------------------------------------------------------------------

cdef inline void arm(Loop *l, Conn *c, bint writing) noexcept nogil:
    if c.armed != writing:
        c.armed = writing
        or_epoll_set(l.epoll, EPOLL_CTL_MOD, c.fd, EPOLLOUT if writing else 0 if c.at_end else EPOLLIN, c)


cdef inline void conn_close(Loop *l, Conn *c) noexcept nogil:
    while c.rpcs != NULL:
        rpc_free(c.rpcs)
    nghttp2_session_del(c.session)
    or_epoll_set(l.epoll, EPOLL_CTL_DEL, c.fd, 0, NULL)
    or_close_fd(c.fd)
    free(c.out)
    if c.prev != NULL:
        c.prev.next = c.next
    else:
        l.conns = c.next
    if c.next != NULL:
        c.next.prev = c.prev
    or_add64(&l.live, <uint64_t>-1)
    or_add64(&l.thread.shared.connections, <uint64_t>-1)
    free(c)


cdef inline uint32_t streams_per_connection(const Limits *limits) noexcept nogil:
    """No peer takes all there are. A proxy that needs more opens another connection by itself."""
    cdef uint32_t share = limits.streams // 4
    if share < STREAMS_SHARE_MIN:
        share = STREAMS_SHARE_MIN
    return share if share < limits.streams else limits.streams


cdef inline bint conn_open(Loop *l, int fd) noexcept nogil:
    """Takes the socket over, in any case. False: closed again, no memory."""
    cdef nghttp2_settings_entry settings[4]
    cdef Conn *c = <Conn *>calloc(1, sizeof(Conn))
    if c == NULL:
        or_add64(&l.live, <uint64_t>-1)
        or_add64(&l.thread.shared.connections, <uint64_t>-1)
        or_close_fd(fd)
        return False
    or_socket_set(fd)
    c.fd = fd
    c.thread = &l.thread
    c.heard_ns = c.wrote_ns = l.thread.now_ns
    c.next = l.conns
    if l.conns != NULL:
        l.conns.prev = c
    l.conns = c
    if (nghttp2_session_server_new2(&c.session, l.callbacks, c, l.option) != 0
            or or_epoll_set(l.epoll, EPOLL_CTL_ADD, fd, EPOLLIN, c) != 0):
        conn_close(l, c)
        return False
    settings[0].settings_id = NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS
    settings[0].value = streams_per_connection(&l.thread.limits) + WATCHERS_MAX
    settings[1].settings_id = NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE
    settings[1].value = STREAM_WINDOW_BYTES
    settings[2].settings_id = NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE
    settings[2].value = l.thread.limits.header_bytes
    settings[3].settings_id = 9                   # NO_RFC7540_PRIORITIES: streams are served as they come
    settings[3].value = 1
    nghttp2_submit_settings(c.session, NGHTTP2_FLAG_NONE, settings, 4)
    nghttp2_session_set_local_window_size(c.session, NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW_BYTES)
    if l.saw_phase >= PHASE_CLOSING:
        # dealt to us while the server was told to stop: it missed the notice
        c.closing = 1
        nghttp2_submit_shutdown_notice(c.session)
    l.thread.counts.connections_opened += 1
    return True


cdef inline bint write_out(Loop *l, Conn *c) noexcept nogil:
    """What a write left over. False: the peer is gone."""
    cdef ssize_t n
    while c.out_at < c.out_n:
        n = or_send(c.fd, c.out + c.out_at, c.out_n - c.out_at)
        if n < 0:
            if errno == EINTR:
                continue
            return errno == EAGAIN
        c.out_at += <uint32_t>n
        c.wrote_ns = l.thread.now_ns
    free(c.out)
    c.out = NULL
    c.out_n = c.out_at = 0
    return True


cdef inline bint flush(Loop *l, Conn *c) noexcept nogil:
    """Sends what the streams have, as far as the socket takes it. False: close the connection."""
    cdef const uint8_t *frame
    cdef uint32_t n, at
    cdef ssize_t k = 1
    if c.out_n and not write_out(l, c):
        return False
    while c.out_n == 0 and k > 0:
        n = 0
        while n < GATHER_BYTES:
            k = nghttp2_session_mem_send(c.session, &frame)
            if k < 0 or k > FRAME_BYTES_MAX:
                return False
            if k == 0:
                break
            memcpy(l.gather + n, frame, <size_t>k)
            n += <uint32_t>k
        at = 0
        while at < n:
            k = or_send(c.fd, l.gather + at, n - at)
            if k < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    return False
                c.out = <char *>malloc(n - at)
                if c.out == NULL:
                    return False
                memcpy(c.out, l.gather + at, n - at)
                c.out_n = n - at
                c.out_at = 0
                break
            at += <uint32_t>k
        if n:
            c.wrote_ns = l.thread.now_ns
        if n < GATHER_BYTES:
            break
    arm(l, c, c.out_n > 0)
    if c.out_n:
        return True
    # all is said: does anything remain to be done?
    if c.broken or c.at_end:
        return False
    if c.closing == 2 and c.rpcs == NULL:
        return False
    return nghttp2_session_want_read(c.session) or nghttp2_session_want_write(c.session)


cdef inline void receive(Loop *l, Conn *c) noexcept nogil:
    cdef int _i
    cdef ssize_t n, took
    cdef char *exact
    for _i in range(READS_MAX):
        n = or_receive(c.fd, l.read_buffer, READ_BYTES)
        if n < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                c.at_end = 1
            return
        if n == 0:
            c.at_end = 1
            return
        if l.exact:
            exact = <char *>malloc(n)
            memcpy(exact, l.read_buffer, n)
            took = nghttp2_session_mem_recv(c.session, <uint8_t *>exact, n)
            free(exact)
        else:
            took = nghttp2_session_mem_recv(c.session, <uint8_t *>l.read_buffer, n)
        if took < 0:
            # not HTTP/2, or a flood; its GOAWAY, if there is one, is still sent
            c.broken = 1
            l.thread.counts.connections_dropped += 1
            return
        if n < READ_BYTES:
            return


cdef inline void conn_ready(Loop *l, Conn *c, uint32_t events) noexcept nogil:
    if c.armed and not events & EPOLLOUT:
        conn_close(l, c)                          # hung up while we waited for it to read
        return
    if not c.armed:
        receive(l, c)
    if not flush(l, c):
        conn_close(l, c)


# ---- the loop ----------------------------------------------------------------------------------------

cdef inline void deal(Loop *l, int fd) noexcept nogil:
    """To the thread with the fewest connections."""
    cdef uint32_t i, best = 0
    cdef char parcel[5]
    if or_load64(&l.thread.shared.phase) != PHASE_RUNNING:
        or_close_fd(fd)
        return
    if or_add64(&l.thread.shared.connections, 1) >= l.thread.limits.connections:
        or_add64(&l.thread.shared.connections, <uint64_t>-1)
        l.thread.counts.connections_refused += 1
        or_close_fd(fd)
        return
    for i in range(1, l.n_loops):
        if or_load64(&l.loops[i].live) < or_load64(&l.loops[best].live):
            best = i
    or_add64(&l.loops[best].live, 1)
    if &l.loops[best] == l:
        conn_open(l, fd)
        return
    memcpy(parcel, &fd, 4)
    parcel[4] = 1
    # five bytes into a pipe go whole or not at all
    if or_write_fd(l.loops[best].wake_out, parcel, 5) != 5:
        or_add64(&l.loops[best].live, <uint64_t>-1)
        or_add64(&l.live, 1)
        conn_open(l, fd)


cdef inline void accept_all(Loop *l) noexcept nogil:
    cdef int _i, fd
    for _i in range(EVENTS_MAX):
        fd = or_accept(l.listener)
        if fd < 0:
            if errno != EAGAIN and errno != EINTR:
                # out of descriptors or memory: the listener stays ready, so look away for a moment
                l.full_until_ns = l.thread.now_ns + 100_000_000
                or_epoll_set(l.epoll, EPOLL_CTL_MOD, l.listener, 0, &l.listener)
            return
        deal(l, fd)


cdef inline void take_parcels(Loop *l) noexcept nogil:
    cdef char box[320]
    cdef ssize_t n
    cdef ssize_t at = 0
    cdef int fd
    # only whole parcels are written, so only whole parcels are read
    n = or_read_fd(l.wake_in, box, INBOX_MAX * 5)
    while at + 5 <= n:
        if box[at + 4]:
            memcpy(&fd, &box[at], 4)
            conn_open(l, fd)
        at += 5


cdef inline void look_after(Loop *l, Conn *c) noexcept nogil:
    """Now and then: is the connection alive, does it read, has it begun to speak?"""
    cdef uint64_t now = l.thread.now_ns
    cdef const Limits *limits = &l.thread.limits
    cdef bint dead = False
    if c.armed:
        dead = now - c.wrote_ns > limits.keepalive_timeout_ns
    elif not c.settled:
        dead = now - c.heard_ns > limits.keepalive_timeout_ns
    elif now - c.heard_ns > limits.keepalive_ns:
        if not c.pinged:
            c.pinged = 1
            nghttp2_submit_ping(c.session, NGHTTP2_FLAG_NONE, NULL)
        dead = now - c.heard_ns > limits.keepalive_ns + limits.keepalive_timeout_ns
    if dead:
        l.thread.counts.connections_dropped += 1
        conn_close(l, c)
    elif not c.armed and not flush(l, c):
        conn_close(l, c)


cdef inline void expire_idle(Loop *l) noexcept nogil:
    """Streams not heard for too long, oldest first."""
    cdef Thread *t = &l.thread
    cdef Rpc *r = t.oldest
    while r != NULL and t.now_ns - r.heard_ns > t.limits.idle_ns:
        if not r.watching:
            t.counts.streams_idle_closed += 1
            expire(r)
        hear(t, r)
        r = t.oldest


cdef inline void follow_orders(Loop *l) noexcept nogil:
    """What the thread that steers the server has asked for since."""
    cdef Shared *shared = l.thread.shared
    cdef uint64_t phase = or_load64(&shared.phase)
    cdef uint64_t serving = or_load64(&shared.serving)
    cdef Conn *c = l.conns
    cdef Rpc *r
    cdef bint notice = phase >= PHASE_CLOSING and l.saw_phase < PHASE_CLOSING
    cdef bint last = phase >= PHASE_EXPIRING and l.saw_phase < PHASE_EXPIRING
    if notice and l.listener >= 0:
        or_epoll_set(l.epoll, EPOLL_CTL_DEL, l.listener, 0, NULL)
    if notice:
        l.closing_since_ns = l.thread.now_ns
    while c != NULL:
        r = c.rpcs
        while r != NULL:
            if r.watching and serving != l.told_serving:
                tell_health(r, health_now(&l.thread))
            if (notice and r.watching) or (last and not r.ended):
                expire(r)
            r = r.next
        if notice:
            c.closing = 1
            nghttp2_submit_shutdown_notice(c.session)
        c = c.next
    l.saw_phase = phase
    l.told_serving = serving


cdef inline void close_softly(Loop *l, Conn *c) noexcept nogil:
    """Some time after the notice: streams that crossed it are here by now, no further ones are taken."""
    if c.closing == 1:
        c.closing = 2
        nghttp2_submit_goaway(c.session, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(c.session),
                              NGHTTP2_NO_ERROR, NULL, 0)


cdef inline void tick(Loop *l) noexcept nogil:
    cdef Thread *t = &l.thread
    cdef Conn *c
    cdef Conn *next
    l.ticked_ns = t.now_ns
    expire_idle(l)
    if l.full_until_ns and t.now_ns > l.full_until_ns and l.saw_phase == PHASE_RUNNING:
        l.full_until_ns = 0
        or_epoll_set(l.epoll, EPOLL_CTL_MOD, l.listener, EPOLLIN, &l.listener)
    c = l.conns
    while c != NULL:
        next = c.next
        if l.saw_phase >= PHASE_CLOSING and t.now_ns - l.closing_since_ns > 50_000_000:
            close_softly(l, c)
        look_after(l, c)
        c = next


cdef inline bint loop_step(Loop *l, int timeout_ms) noexcept nogil:
    """One round: wait, serve what is ready, look after the rest when it is time. False: all is over."""
    cdef epoll_event events[EVENTS_MAX]
    cdef Thread *t = &l.thread
    cdef int i, n
    cdef uint64_t every
    n = epoll_wait(l.epoll, events, EVENTS_MAX, timeout_ms)
    t.now_ns = or_now_ns()
    for i in range(n):
        if events[i].data.ptr == &l.listener:
            accept_all(l)
        elif events[i].data.ptr == &l.wake_in:
            take_parcels(l)
        else:
            conn_ready(l, <Conn *>events[i].data.ptr, events[i].events)
    if (or_load64(&t.shared.phase) != l.saw_phase or or_load64(&t.shared.serving) != l.told_serving):
        follow_orders(l)
        tick(l)
    every = <uint64_t>TICK_MS * 1_000_000
    if t.limits.idle_ns < 4 * every:
        every = t.limits.idle_ns // 4
    if t.now_ns - l.ticked_ns >= every:
        tick(l)
    if l.saw_phase == PHASE_DEAD:
        while l.conns != NULL:
            conn_close(l, l.conns)
        return False
    return l.saw_phase == PHASE_RUNNING or l.conns != NULL


cdef inline void loop_run(Loop *l) noexcept nogil:
    cdef int wait_ms = TICK_MS
    if l.thread.limits.idle_ns < <uint64_t>4 * TICK_MS * 1_000_000:
        wait_ms = <int>(l.thread.limits.idle_ns // 4_000_000) + 1
    # alone and idle it may sleep long; but not where accept() is to be tried again soon
    while loop_step(l, 1000 if l.conns == NULL and l.full_until_ns == 0
                    else wait_ms if l.saw_phase == PHASE_RUNNING else 20):
        pass


cdef inline bint loop_open(Loop *l, ExtProcHost *host, Shared *shared, const Limits *limits, int listener,
                           int wake_in, int wake_out, uint64_t pool_bytes) noexcept nogil:
    """False: no memory or descriptors; loop_close() in any case."""
    memset(l, 0, sizeof(Loop))
    l.listener = listener
    l.wake_in = wake_in
    l.wake_out = wake_out
    l.thread.host = host
    l.thread.shared = shared
    l.thread.limits = limits[0]
    l.thread.now_ns = l.ticked_ns = or_now_ns()
    l.told_serving = 1
    l.epoll = or_epoll_open()
    l.read_buffer = <char *>malloc(READ_BYTES)
    l.gather = <char *>malloc(GATHER_BYTES + FRAME_BYTES_MAX)
    if (not pool_init(&l.thread.pool, limits.streams, pool_bytes) or l.epoll < 0 or l.read_buffer == NULL
            or l.gather == NULL or nghttp2_session_callbacks_new(&l.callbacks) != 0
            or nghttp2_option_new(&l.option) != 0):
        return False
    nghttp2_session_callbacks_set_on_begin_headers_callback(l.callbacks, begin_headers)
    nghttp2_session_callbacks_set_on_header_callback(l.callbacks, take_header)
    nghttp2_session_callbacks_set_on_frame_recv_callback(l.callbacks, take_frame)
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(l.callbacks, take_data)
    nghttp2_session_callbacks_set_on_frame_send_callback(l.callbacks, sent_frame)
    nghttp2_session_callbacks_set_on_stream_close_callback(l.callbacks, close_stream)
    nghttp2_option_set_no_closed_streams(l.option, 1)
    or_allow_resets(l.option)
    if wake_in >= 0:
        or_epoll_set(l.epoll, EPOLL_CTL_ADD, wake_in, EPOLLIN, &l.wake_in)
    if listener >= 0:
        or_epoll_set(l.epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &l.listener)
    return True


cdef inline void loop_close(Loop *l) noexcept nogil:
    cdef Rpc *r
    while l.conns != NULL:
        conn_close(l, l.conns)
    while l.thread.free_rpc != NULL:
        r = l.thread.free_rpc
        l.thread.free_rpc = r.next
        free(r)
    pool_close(&l.thread.pool)
    if l.callbacks != NULL:
        nghttp2_session_callbacks_del(l.callbacks)
    if l.option != NULL:
        nghttp2_option_del(l.option)
    if l.epoll >= 0:
        or_close_fd(l.epoll)
    free(l.read_buffer)
    free(l.gather)
    l.callbacks = NULL
    l.option = NULL
    l.epoll = -1
    l.read_buffer = l.gather = NULL
