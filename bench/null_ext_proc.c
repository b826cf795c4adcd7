/* The floor: an ext_proc server that decides nothing, as fast as libnghttp2 allows.
 *
 *   null_ext_proc SOCKET [THREADS]
 *
 * Every message is answered at once with "continue", and nothing of it is read but which kind it is; where the
 * request has a body, the body is asked for (mode_override, buffered, with trailers) exactly as Outrider asks for it,
 * so that Envoy does the same work for both. gRPC health checks are answered SERVING. What an ext_proc server that
 * really scores costs beyond this is the scoring; what this costs beyond a bare proxy is the protocol.
 *
 * One epoll loop per thread on the shared listening socket. Bounds: BODY_MAX bytes per message, CONNECTIONS_MAX per
 * thread. A measuring aid for a trusted peer on the same machine, not a server to deploy: a connection that breaks
 * the protocol or runs out of memory is closed, that's all.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <nghttp2/nghttp2.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    READ_BYTES = 64 << 10,
    WRITE_BYTES = 64 << 10,
    PENDING_BYTES = 128, /* answers to one stream not yet framed; each is at most 15 bytes */
    BODY_MAX = 4 << 20,
    CONNECTIONS_MAX = 256,
    STREAMS_MAX = 1024,
    THREADS_MAX = 64,
    EVENTS = 64
};

/* One request. A connection keeps its streams until it ends, those that aren't in use in its free list. */
typedef struct stream {
    struct stream *next_free, *next_made;
    uint8_t pending[PENDING_BYTES]; /* gRPC messages waiting to be framed */
    uint32_t pending_bytes;
    uint32_t prefix_bytes;  /* of the current message's 5-byte prefix */
    uint8_t prefix[5];
    uint32_t message_left;  /* bytes of the message still to come */
    uint32_t kept;          /* bytes of its start kept in head */
    uint32_t message_bytes;
    uint8_t head[16];
    uint8_t tail[2];        /* the last bytes of its part: request_headers end with end_of_stream */
    uint8_t responded, deferred, half_closed, health;
} stream;

typedef struct {
    int fd;
    uint32_t interest; /* what epoll watches */
    nghttp2_session *session;
    stream *free_streams, *made_streams;
    uint32_t out_bytes, out_sent;
    uint8_t out[WRITE_BYTES];
    const uint8_t *framed; /* what nghttp2 handed out and didn't fit any more */
    size_t framed_bytes;
} connection;

typedef struct {
    int listener;
} worker;

static nghttp2_session_callbacks *callbacks;
static nghttp2_option *option;

#define HEADER(name, value)                                                                                    \
    {(uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1,                               \
     NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}

static ssize_t read_pending(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *flags,
                            nghttp2_data_source *source, void *user) {
    stream *s = source->ptr;
    uint32_t n = s->pending_bytes < room ? s->pending_bytes : (uint32_t)room;
    (void)user;
    if (n == 0 && !s->half_closed) {
        s->deferred = 1;
        return NGHTTP2_ERR_DEFERRED;
    }
    memcpy(buffer, s->pending, n);
    s->pending_bytes -= n;
    memmove(s->pending, s->pending + n, s->pending_bytes);
    if (s->half_closed && s->pending_bytes == 0) {
        const nghttp2_nv trailer[] = {HEADER("grpc-status", "0")};
        *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
        if (nghttp2_submit_trailer(session, id, trailer, 1) != 0)
            return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    return n;
}

/* Makes what is pending, or the end of the stream, go out. */
static int send_pending(nghttp2_session *session, int32_t id, stream *s) {
    if (!s->responded) {
        const nghttp2_nv headers[] = {HEADER(":status", "200"), HEADER("content-type", "application/grpc")};
        const nghttp2_data_provider provider = {.source = {.ptr = s}, .read_callback = read_pending};
        s->responded = 1;
        return nghttp2_submit_response(session, id, headers, 2, &provider);
    }
    if (s->deferred) {
        s->deferred = 0;
        return nghttp2_session_resume_data(session, id);
    }
    return 0;
}

static void put(stream *s, const uint8_t *message, uint8_t n) {
    if (s->pending_bytes + 5u + n > PENDING_BYTES)
        return; /* a peer that asks and doesn't read: it is owed nothing */
    uint8_t *to = s->pending + s->pending_bytes;
    memset(to, 0, 4);
    to[4] = n;
    memcpy(to + 5, message, n);
    s->pending_bytes += 5u + n;
}

/* A whole ProcessingRequest has arrived; ended: its headers say that no body follows.
 *
 * Envoy writes fields in the order of their numbers, so a message starts with its part (2..7) and goes on with
 * attributes and the protocol configuration; and end_of_stream, field 3 of HttpHeaders, comes last in that part. */
static void answer(stream *s, int ended) {
    static const uint8_t serving[] = {0x08, 1}; /* HealthCheckResponse{status: SERVING} */
    static const uint8_t kinds[8] = {0, 0, 1, 2, 3, 4, 5, 6}; /* ProcessingRequest's part -> ProcessingResponse's */
    /* mode_override: response headers SEND, body BUFFERED, request trailers SEND */
    static const uint8_t with_body[] = {0x0a, 0, 0x4a, 6, 0x10, 1, 0x18, 2, 0x28, 1};
    if (s->health) {
        put(s, serving, sizeof serving);
        return;
    }
    uint8_t part = s->kept ? s->head[0] >> 3 : 0;
    if (part < 2 || part > 7 || (s->head[0] & 7) != 2)
        return;
    if (part == 2 && !ended) {
        put(s, with_body, sizeof with_body);
        return;
    }
    const uint8_t plain[] = {(uint8_t)(kinds[part] << 3 | 2), 0};
    put(s, plain, sizeof plain);
}

/* The part's length, from the start of the message; 0 while it isn't there. *start: where the part begins. */
static uint32_t part_length(const stream *s, uint32_t *start) {
    uint32_t length = 0, shift = 0;
    for (uint32_t i = 1; i < s->kept && i < 6; i++) {
        length |= (uint32_t)(s->head[i] & 127) << shift;
        shift += 7;
        if (!(s->head[i] & 128)) {
            *start = i + 1;
            return length;
        }
    }
    return 0;
}

/* Follows the message as it comes in pieces; keeps the bytes that are looked at and nothing else. */
static int take_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t n, void *user) {
    stream *s = nghttp2_session_get_stream_user_data(session, id);
    (void)flags, (void)user;
    if (!s)
        return 0;
    while (n) {
        if (s->prefix_bytes < 5) {
            s->prefix[s->prefix_bytes++] = *data++;
            n--;
            if (s->prefix_bytes < 5)
                continue;
            s->message_bytes = (uint32_t)s->prefix[1] << 24 | (uint32_t)s->prefix[2] << 16 |
                               (uint32_t)s->prefix[3] << 8 | s->prefix[4];
            if (s->message_bytes > BODY_MAX)
                return NGHTTP2_ERR_CALLBACK_FAILURE;
            s->message_left = s->message_bytes;
            s->kept = 0;
            memset(s->tail, 0, sizeof s->tail);
        }
        uint32_t take = n < s->message_left ? (uint32_t)n : s->message_left;
        uint32_t at = s->message_bytes - s->message_left;
        for (uint32_t i = 0; s->kept < sizeof s->head && i < take; i++)
            s->head[s->kept++] = data[i];
        uint32_t start = 0, length = part_length(s, &start);
        /* the last two bytes of the part are 0x18 1 where end_of_stream is set */
        for (uint32_t k = 0; k < 2 && length >= 2; k++) {
            uint32_t place = start + length - 2 + k;
            if (place >= at && place < at + take)
                s->tail[k] = data[place - at];
        }
        data += take;
        n -= take;
        s->message_left -= take;
        if (s->message_left == 0) {
            answer(s, s->tail[0] == 0x18 && s->tail[1] == 1);
            s->prefix_bytes = 0;
        }
    }
    return s->pending_bytes && send_pending(session, id, s) ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

static int begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    connection *c = user;
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    stream *s = c->free_streams;
    if (s)
        c->free_streams = s->next_free;
    else {
        if (!(s = malloc(sizeof *s)))
            return NGHTTP2_ERR_CALLBACK_FAILURE;
        s->next_made = c->made_streams;
        c->made_streams = s;
    }
    s->pending_bytes = s->prefix_bytes = s->message_left = s->kept = 0;
    s->responded = s->deferred = s->half_closed = s->health = 0;
    return nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, s);
}

static int take_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_bytes,
                       const uint8_t *value, size_t value_bytes, uint8_t flags, void *user) {
    static const char check[] = "/grpc.health.v1.Health/Check";
    (void)flags, (void)user;
    if (name_bytes == 5 && !memcmp(name, ":path", 5) && value_bytes == sizeof check - 1 &&
        !memcmp(value, check, sizeof check - 1)) {
        stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
        if (s)
            s->health = 1;
    }
    return 0;
}

static int frame_received(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    (void)user;
    if ((frame->hd.type == NGHTTP2_DATA || frame->hd.type == NGHTTP2_HEADERS) &&
        frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
        stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
        if (s) {
            s->half_closed = 1;
            if (send_pending(session, frame->hd.stream_id, s))
                return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
    }
    return 0;
}

static int stream_closed(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
    connection *c = user;
    stream *s = nghttp2_session_get_stream_user_data(session, id);
    (void)error;
    if (s) {
        nghttp2_session_set_stream_user_data(session, id, NULL);
        s->next_free = c->free_streams;
        c->free_streams = s;
    }
    return 0;
}

/* Writes until the socket is full or nothing is left. -1: the connection is finished. */
static int flush(connection *c) {
    for (;;) {
        while (c->out_bytes < WRITE_BYTES) {
            if (!c->framed_bytes) {
                ssize_t n = nghttp2_session_mem_send(c->session, &c->framed);
                if (n < 0)
                    return -1;
                if (n == 0)
                    break;
                c->framed_bytes = (size_t)n;
            }
            size_t room = WRITE_BYTES - c->out_bytes, n = c->framed_bytes < room ? c->framed_bytes : room;
            memcpy(c->out + c->out_bytes, c->framed, n);
            c->out_bytes += (uint32_t)n;
            c->framed += n;
            c->framed_bytes -= n;
        }
        if (c->out_sent == c->out_bytes)
            return 0;
        ssize_t sent = send(c->fd, c->out + c->out_sent, c->out_bytes - c->out_sent, MSG_NOSIGNAL);
        if (sent < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -1;
        c->out_sent += (uint32_t)sent;
        if (c->out_sent == c->out_bytes)
            c->out_sent = c->out_bytes = 0;
        else if (c->out_bytes == WRITE_BYTES) { /* make room behind what waits */
            memmove(c->out, c->out + c->out_sent, c->out_bytes - c->out_sent);
            c->out_bytes -= c->out_sent;
            c->out_sent = 0;
        }
    }
}

static void close_connection(connection *c) {
    nghttp2_session_del(c->session);
    while (c->made_streams) {
        stream *s = c->made_streams;
        c->made_streams = s->next_made;
        free(s);
    }
    close(c->fd);
    free(c);
}

static connection *accept_connection(int listener, int epoll) {
    const nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, STREAMS_MAX},
                                               {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 20}};
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return NULL; /* another thread was quicker */
    connection *c = calloc(1, sizeof *c);
    if (!c || nghttp2_session_server_new2(&c->session, callbacks, c, option) != 0) {
        free(c);
        close(fd);
        return NULL;
    }
    c->fd = fd;
    c->interest = EPOLLIN;
    nghttp2_submit_settings(c->session, NGHTTP2_FLAG_NONE, settings, 2);
    nghttp2_session_set_local_window_size(c->session, NGHTTP2_FLAG_NONE, 0, 16 << 20);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (flush(c) < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) {
        close_connection(c);
        return NULL;
    }
    return c;
}

static int serve(connection *c, int epoll, uint32_t events, uint8_t *buffer) {
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        ssize_t n = recv(c->fd, buffer, READ_BYTES, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return -1;
        if (n > 0 && nghttp2_session_mem_recv(c->session, buffer, (size_t)n) < 0)
            return -1;
    }
    if (flush(c) < 0 || (!nghttp2_session_want_read(c->session) && !nghttp2_session_want_write(c->session)))
        return -1;
    uint32_t interest = EPOLLIN | (c->out_bytes ? EPOLLOUT : 0u);
    if (interest != c->interest) {
        struct epoll_event event = {.events = interest, .data.ptr = c};
        c->interest = interest;
        return epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
    }
    return 0;
}

static void *run(void *given) {
    const worker *w = given;
    uint8_t *buffer = malloc(READ_BYTES);
    int epoll = epoll_create1(EPOLL_CLOEXEC), connections = 0;
    struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.ptr = NULL}, events[EVENTS];
    if (!buffer || epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, w->listener, &event) < 0) {
        perror("null_ext_proc: epoll");
        exit(1);
    }
    for (;;) {
        int n = epoll_wait(epoll, events, EVENTS, -1);
        if (n < 0 && errno != EINTR) {
            perror("null_ext_proc: epoll_wait");
            exit(1);
        }
        for (int i = 0; i < n; i++) {
            connection *c = events[i].data.ptr;
            if (!c) {
                if (connections < CONNECTIONS_MAX && accept_connection(w->listener, epoll))
                    connections++;
            } else if (serve(c, epoll, events[i].events, buffer) < 0) {
                close_connection(c);
                connections--;
            }
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int threads = argc > 2 ? atoi(argv[2]) : 1;
    if (argc < 2 || argc > 3 || strlen(argv[1]) >= sizeof address.sun_path || threads < 1 || threads > THREADS_MAX) {
        fprintf(stderr, "usage: null_ext_proc SOCKET [THREADS, 1 to %d]\n", THREADS_MAX);
        return 2;
    }
    memcpy(address.sun_path, argv[1], strlen(argv[1]));
    unlink(argv[1]);
    worker w = {.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
    if (w.listener < 0 || bind(w.listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(w.listener, 1024) < 0) {
        perror("null_ext_proc: listen");
        return 1;
    }
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, take_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, take_data);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, frame_received);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, stream_closed);
    nghttp2_option_new(&option);
    /* Envoy ends every ext_proc stream with RST_STREAM; the guard against rapid resets would hang up on it */
    nghttp2_option_set_stream_reset_rate_limit(option, UINT32_MAX, UINT32_MAX);
    pthread_t thread;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&thread, NULL, run, &w) != 0) {
            fprintf(stderr, "null_ext_proc: can't start a thread\n");
            return 1;
        }
    run(&w);
    return 0;
}
