/* Stands in for Envoy's filter manager where the real one can't be: under AddressSanitizer, whose allocator and Envoy's
 * exclude each other. Loads the module, drives its hooks as Envoy 1.40 does with requests drawn from a seed, from two
 * threads, each piece of memory of its exact size and gone after the call, so that reading too far or too late is
 * noticed. The real Envoy is in tests/contract.
 *
 *   envoy_driver MODULE CONFIG REQUESTS SEED [ARENA TRUNCATE_AT]
 *
 * prints counts; exits 0, or with the sanitizer's status. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { const char *p; size_t n; } buffer;
typedef struct { const char *k; size_t kn; const char *v; size_t vn; } header;

enum { FIELDS_MAX = 300, CHUNKS_MAX = 90 };

/* One stream, as Envoy keeps it; the hooks' first argument. */
typedef struct {
    header fields[2][FIELDS_MAX]; /* request, response */
    size_t n[2];
    buffer chunks[CHUNKS_MAX];
    size_t n_chunks;
    uint64_t limit;
    int answered;
    uint64_t rng;
} stream;

static uint64_t passed, refused, dropped;
static const char *(*program_init)(void);
static const void *(*config_new)(const void *, buffer, buffer);
static void (*config_destroy)(const void *);
static const void *(*filter_new)(const void *, void *);
static void (*filter_destroy)(const void *);
static int (*on_headers)(void *, const void *, bool), (*on_body)(void *, const void *, bool);
static int (*on_trailers)(void *, const void *), (*on_response)(void *, const void *, bool);
static void (*on_complete)(void *, const void *);

static uint64_t draw(stream *s, uint64_t below) {
    s->rng ^= s->rng << 13, s->rng ^= s->rng >> 7, s->rng ^= s->rng << 17;
    return below ? s->rng % below : 0;
}

static char *copy(const char *p, size_t n) {
    char *out = malloc(n ? n : 1); /* of exactly that size */
    memcpy(out, p, n);
    return out;
}

/* ---- what the module calls --------------------------------------------------------------------------------- */

void envoy_dynamic_module_callback_log(int level, buffer text) {
    if (level >= 4) fprintf(stderr, "%.*s\n", (int)text.n, text.p);
}
static int side(int type) { return type >= 2; }
size_t envoy_dynamic_module_callback_http_get_headers_size(stream *s, int type) { return s->n[side(type)]; }
bool envoy_dynamic_module_callback_http_get_headers(stream *s, int type, header *out) {
    memcpy(out, s->fields[side(type)], s->n[side(type)] * sizeof *out);
    return true;
}
bool envoy_dynamic_module_callback_http_get_header(stream *s, int type, buffer key, buffer *out, size_t at, size_t *n) {
    size_t i;
    (void)at, (void)n;
    for (i = 0; i < s->n[side(type)]; i++) {
        header *h = &s->fields[side(type)][i];
        if (h->kn == key.n && !memcmp(h->k, key.p, key.n)) return *out = (buffer){h->v, h->vn}, true;
    }
    return false;
}
static void remove_field(stream *s, int type, size_t i) {
    header *h = s->fields[side(type)];
    free((char *)h[i].k), free((char *)h[i].v);
    memmove(h + i, h + i + 1, (--s->n[side(type)] - i) * sizeof *h);
}
bool envoy_dynamic_module_callback_http_set_header(stream *s, int type, buffer key, buffer value) {
    char *name = copy(key.p, key.n);
    size_t i;
    for (i = s->n[side(type)]; i-- > 0;) {
        header *h = &s->fields[side(type)][i];
        if (h->kn == key.n && !memcmp(h->k, name, key.n)) remove_field(s, type, i);
    }
    if (value.p == NULL || s->n[side(type)] == FIELDS_MAX) return free(name), true;
    s->fields[side(type)][s->n[side(type)]++] = (header){name, key.n, copy(value.p, value.n), value.n};
    return true;
}
void envoy_dynamic_module_callback_http_send_response(stream *s, uint32_t status, header *h, size_t n, buffer body,
                                                      buffer details) {
    size_t i;
    volatile char sink = 0;
    for (i = 0; i < n; i++) sink ^= h[i].k[h[i].kn - 1] ^ (h[i].vn ? h[i].v[h[i].vn - 1] : 0);
    if (body.n) sink ^= body.p[body.n - 1];
    sink ^= details.p[details.n - 1];
    if (status < 400 || status > 599 || s->answered) abort();
    s->answered = 1;
    __atomic_fetch_add(&refused, 1, __ATOMIC_RELAXED);
}
size_t envoy_dynamic_module_callback_http_get_body_chunks_size(stream *s, int type) { return (void)type, s->n_chunks; }
bool envoy_dynamic_module_callback_http_get_body_chunks(stream *s, int type, buffer *out) {
    (void)type;
    memcpy(out, s->chunks, s->n_chunks * sizeof *out);
    return true;
}
uint64_t envoy_dynamic_module_callback_http_get_buffer_limit(stream *s) { return s->limit; }
bool envoy_dynamic_module_callback_http_filter_get_attribute_string(stream *s, int which, buffer *out) {
    static const char *const peers[] = {"192.0.2.1:80", "[2001:db8::7]:1", "", "nonsense", "203.0.113.9:1"};
    const char *p = peers[draw(s, 5)];
    (void)which;
    return *out = (buffer){p, strlen(p)}, true;
}
static void touch(buffer b) { volatile char sink = b.n ? b.p[0] ^ b.p[b.n - 1] : 0; (void)sink; }
void envoy_dynamic_module_callback_http_set_dynamic_metadata_string(stream *s, buffer n, buffer k, buffer v) {
    (void)s, touch(n), touch(k), touch(v);
}
void envoy_dynamic_module_callback_http_set_dynamic_metadata_number(stream *s, buffer n, buffer k, double v) {
    (void)s, touch(n), touch(k);
    if (!(v >= 0 && v <= 1)) abort();
}
bool envoy_dynamic_module_callback_http_add_dynamic_metadata_list_string(stream *s, buffer n, buffer k, buffer v) {
    return (void)s, touch(n), touch(k), touch(v), true;
}

/* ---- requests ---------------------------------------------------------------------------------------------- */

static void add(stream *s, int type, const char *k, const char *v, size_t vn) {
    if (s->n[type] < FIELDS_MAX) s->fields[type][s->n[type]++] = (header){copy(k, strlen(k)), strlen(k), copy(v, vn), vn};
}

static size_t text(stream *s, char *out, size_t room) {
    static const char *const words[] = {"' union select 1,2 from users--", "<script>alert(1)</script>", "chair", "a=1&b=",
        "{\"a\":[{\"b\":\"", "\"}]}", "%2e%2e%2f", "\\u0027", "; cat /etc/passwd", "//", "/../", "?", "\0\0\0\0\5", "--b\r\n"};
    size_t n = 0, k, limit = draw(s, room);
    while (n < limit) {
        if (draw(s, 4) == 0) {
            out[n++] = (char)draw(s, 256);
        } else {
            const char *w = words[draw(s, sizeof words / sizeof *words)];
            for (k = strlen(w); k && n < limit; k--) out[n++] = *w++;
        }
    }
    return n;
}

static void *work(void *arg) {
    static const char *const methods[] = {"GET", "POST", "PUT", "CONNECT", "", "PROPFIND"};
    static const char *const names[] = {"user-agent", "cookie", "x-note", "content-type", "x-outrider-score", "upgrade",
        "connection", "x_outrider_x", "x-outrider-a-very-long-name-that-goes-on", "authorization", "x-forwarded-for", "content-length", "x-outrider-id", "te"};
    static const char *const types[] = {"application/json", "application/grpc", "text/xml", "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b"};
    const void *config = ((void **)arg)[0];
    uint64_t requests = (uint64_t)((void **)arg)[1], seed = (uint64_t)((void **)arg)[2], number;
    stream *s = calloc(1, sizeof *s);
    char *scratch = malloc(70000);
    s->rng = seed * 2654435761u + 88172645463325252u;
    for (number = 0; number < requests; number++) {
        const void *module;
        size_t i, n, parts;
        int rc, held = 0;
        s->n[0] = s->n[1] = s->n_chunks = 0;
        s->answered = 0;
        s->limit = draw(s, 3) ? 131072 : draw(s, 4000);
        module = filter_new(config, s);
        if (draw(s, 50)) {
            const char *m = methods[draw(s, draw(s, 4) ? 3 : 6)];
            add(s, 0, ":method", m, strlen(m));
            scratch[0] = '/';
            n = 1 + text(s, scratch + 1, draw(s, 30) ? 200 : 66000);
            add(s, 0, ":path", scratch, n);
            add(s, 0, ":authority", "shop", 4);
            add(s, 0, ":scheme", "http", 4);
        }
        for (i = draw(s, draw(s, 20) ? 10 : 280); i; i--) {
            const char *k = names[draw(s, sizeof names / sizeof *names)];
            if (!strcmp(k, "content-type")) {
                const char *t = types[draw(s, 5)];
                add(s, 0, k, t, strlen(t));
            } else {
                n = text(s, scratch, 120);
                add(s, 0, k, scratch, n);
            }
        }
        parts = draw(s, 3) ? 0 : draw(s, 12);
        rc = on_headers(s, module, parts == 0);
        held = rc == 1;
        while (parts-- > 0 && !s->answered && draw(s, 40)) {
            s->n_chunks = draw(s, 20) ? draw(s, 3) : draw(s, CHUNKS_MAX);
            for (i = 0; i < s->n_chunks; i++) {
                n = text(s, scratch, draw(s, 10) ? 300 : 60000);
                s->chunks[i] = (buffer){copy(scratch, n), n};
            }
            rc = on_body(s, module, parts == 0 && number % 2);
            for (i = 0; i < s->n_chunks; i++) free((char *)s->chunks[i].p);
            if (parts == 0 && !(number % 2) && !s->answered && draw(s, 3)) on_trailers(s, module);
        }
        (void)held;
        if (!s->answered && draw(s, 10)) {
            static const char *const statuses[] = {"200", "404", "401", "503", "2", "abcd", ""};
            const char *st = statuses[draw(s, 7)];
            add(s, 1, ":status", st, strlen(st));
            if (!draw(s, 4)) add(s, 1, "x-outrider-leak", "1", 1), add(s, 1, "server", "a", 1), add(s, 1, "X-Outrider-B", "", 0);
            on_response(s, module, true);
            for (i = 0; i < s->n[1] && !s->answered; i++)
                if (s->fields[1][i].kn >= 11 && !strncasecmp(s->fields[1][i].k, "x-outrider-", 11)) abort();
            __atomic_fetch_add(&passed, 1, __ATOMIC_RELAXED);
        } else {
            __atomic_fetch_add(&dropped, 1, __ATOMIC_RELAXED);
        }
        if (draw(s, 2)) on_complete(s, module);
        filter_destroy(module);
        while (s->n[0]) remove_field(s, 0, s->n[0] - 1);
        while (s->n[1]) remove_field(s, 2, s->n[1] - 1);
    }
    free(scratch);
    free(s);
    return NULL;
}

static void *hook(void *library, const char *name) {
    char full[120];
    void *found;
    snprintf(full, sizeof full, "envoy_dynamic_module_on_%s", name);
    found = dlsym(library, full);
    if (found == NULL) fprintf(stderr, "no %s\n", full), exit(2);
    return found;
}

int main(int argc, char **argv) {
    pthread_t threads[2];
    void *library, *args[2][3];
    const void *config;
    int i;
    if (argc < 5) return 2;
    library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return fprintf(stderr, "%s\n", dlerror()), 2;
    *(void **)&program_init = hook(library, "program_init");
    *(void **)&config_new = hook(library, "http_filter_config_new");
    *(void **)&config_destroy = hook(library, "http_filter_config_destroy");
    *(void **)&filter_new = hook(library, "http_filter_new");
    *(void **)&filter_destroy = hook(library, "http_filter_destroy");
    *(void **)&on_headers = hook(library, "http_filter_request_headers");
    *(void **)&on_body = hook(library, "http_filter_request_body");
    *(void **)&on_trailers = hook(library, "http_filter_request_trailers");
    *(void **)&on_response = hook(library, "http_filter_response_headers");
    *(void **)&on_complete = hook(library, "http_filter_stream_complete");
    if (strcmp(program_init(), "v0.1.0") && strcmp(program_init(), "v0.2.0")) return 2;
    config = config_new(NULL, (buffer){"outrider", 8}, (buffer){argv[2], strlen(argv[2])});
    if (config == NULL) return 3;
    for (i = 0; i < 2; i++) {
        args[i][0] = (void *)config;
        args[i][1] = (void *)(uintptr_t)strtoull(argv[3], NULL, 10);
        args[i][2] = (void *)(uintptr_t)(strtoull(argv[4], NULL, 10) + (uint64_t)i * 7919);
        pthread_create(&threads[i], NULL, work, args[i]);
    }
    if (argc > 6) {
        usleep(300000);
        if (truncate(argv[5], atol(argv[6]))) return 2;
    }
    for (i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    config_destroy(config);
    printf("passed %lu refused %lu dropped %lu\n", (unsigned long)passed, (unsigned long)refused, (unsigned long)dropped);
    return 0;
}
