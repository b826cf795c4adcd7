/* Envoy's side of the plugin: the hooks of its dynamic-module ABI (1.38 to 1.40), around native/plugins/outrider.h.
 *
 * Declared here by hand, since Envoy's header isn't part of what a machine that builds this has. A filter lives on one
 * worker thread from new to destroy; nothing here is shared but the sites.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../outrider.h"

#define HOOK __attribute__((visibility("default")))

typedef struct { const char *p; size_t n; } buffer;
typedef struct { const char *k; size_t kn; const char *v; size_t vn; } header;
typedef void *filter; /* Envoy's */

enum { REQUEST_HEADERS = 0, REQUEST_TRAILERS = 1, RESPONSE_HEADERS = 2, RESPONSE_TRAILERS = 3 };
enum { RECEIVED_REQUEST_BODY = 0 };
enum { ATTRIBUTE_SOURCE_ADDRESS = 24 };
enum { LEVEL_INFO = 2, LEVEL_WARNING = 3, LEVEL_ERROR = 4 };
enum { HEADERS_CONTINUE = 0, HEADERS_STOP = 1 };
enum { BODY_CONTINUE = 0, BODY_STOP_AND_BUFFER = 1, BODY_STOP = 3 };
enum { TRAILERS_CONTINUE = 0, TRAILERS_STOP = 1 };
enum { HEADERS_ON_STACK = 128, CHUNKS_ON_STACK = 64, CONFIG_BYTES_MAX = 4096 };

void envoy_dynamic_module_callback_log(int level, buffer text);
size_t envoy_dynamic_module_callback_http_get_headers_size(filter f, int type);
bool envoy_dynamic_module_callback_http_get_headers(filter f, int type, header *out);
bool envoy_dynamic_module_callback_http_get_header(filter f, int type, buffer key, buffer *out, size_t index,
                                                   size_t *count);
bool envoy_dynamic_module_callback_http_set_header(filter f, int type, buffer key, buffer value);
void envoy_dynamic_module_callback_http_send_response(filter f, uint32_t status, header *h, size_t n, buffer body,
                                                      buffer details);
size_t envoy_dynamic_module_callback_http_get_body_chunks_size(filter f, int type);
bool envoy_dynamic_module_callback_http_get_body_chunks(filter f, int type, buffer *out);
uint64_t envoy_dynamic_module_callback_http_get_buffer_limit(filter f);
bool envoy_dynamic_module_callback_http_filter_get_attribute_string(filter f, int attribute, buffer *out);
void envoy_dynamic_module_callback_http_set_dynamic_metadata_string(filter f, buffer space, buffer key, buffer value);
void envoy_dynamic_module_callback_http_set_dynamic_metadata_number(filter f, buffer space, buffer key, double value);
bool envoy_dynamic_module_callback_http_add_dynamic_metadata_list_string(filter f, buffer space, buffer key,
                                                                         buffer value);
/* came with 1.40, and with it the ABI's name: never called, only looked for */
extern bool envoy_dynamic_module_callback_http_get_timing_info(void) __attribute__((weak));

typedef struct {
    or_site *site;
    unsigned configs; /* that use it: its watching thread ends with the last */
    bool closed;
} site_use;

typedef struct {
    or_request *request;
    uint64_t held;    /* body bytes that Envoy buffers for us */
    or_verdict verdict;
    bool undecided, passed_on, answered;
    bool closed;      /* without memory for a request: refuse it? */
} stream;

#define TEXT(literal) ((buffer){literal, sizeof(literal) - 1})

static buffer as_buffer(or_text t) { return (buffer){t.p != NULL ? t.p : "", t.n}; }

/* ---- configuration ------------------------------------------------------------------------------------------- */

static site_use uses[32];
static pthread_mutex_t uses_lock = PTHREAD_MUTEX_INITIALIZER;

static void to_log(void *ctx, int level, const char *text, size_t n) {
    static const int levels[] = {LEVEL_INFO, LEVEL_WARNING, LEVEL_ERROR};
    char line[600];
    int k = snprintf(line, sizeof line, "outrider: %.*s", (int)(n < 560 ? n : 560), text);
    (void)ctx;
    envoy_dynamic_module_callback_log(levels[level < 0 || level > 2 ? 2 : level], (buffer){line, (size_t)k});
}

static const void *refuse_config(const char *why, buffer what) {
    char line[400], shown[120];
    size_t i, n = what.n < sizeof shown ? what.n : sizeof shown;
    int k;
    for (i = 0; i < n; i++) shown[i] = what.p[i] >= 32 && what.p[i] < 127 ? what.p[i] : '?';
    k = snprintf(line, sizeof line, "filter_config: %s: \"%.*s\". It is a StringValue like \"arena=/run/outrider/arena "
                 "failure=open\"; failure is open (requests pass) or closed (they are answered 503) while there is no "
                 "arena to decide with", why, (int)n, shown);
    to_log(NULL, OR_LOG_ERROR, line, (size_t)(k < (int)sizeof line ? k : (int)sizeof line - 1));
    return NULL;
}

static bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

HOOK const char *envoy_dynamic_module_on_program_init(void) {
    return envoy_dynamic_module_callback_http_get_timing_info != NULL ? "v0.2.0" : "v0.1.0";
}

/* "key=value" words, parted by blanks. NULL refuses the configuration. */
HOOK const void *envoy_dynamic_module_on_http_filter_config_new(const void *envoy, buffer name, buffer config) {
    buffer arena = {NULL, 0}, failure = {NULL, 0};
    char err[200];
    or_site *site;
    size_t i = 0, k;
    (void)envoy;
    (void)name;
    if (config.n > CONFIG_BYTES_MAX) return refuse_config("longer than 4096 bytes", config);
    while (i < config.n) {
        buffer word, key, value;
        while (i < config.n && is_blank(config.p[i])) i++;
        if (i == config.n) break;
        word.p = config.p + i;
        while (i < config.n && !is_blank(config.p[i])) i++;
        word.n = (size_t)(config.p + i - word.p);
        for (k = 0; k < word.n && word.p[k] != '='; k++) { }
        if (k == word.n) return refuse_config("not of the form key=value", word);
        key = (buffer){word.p, k};
        value = (buffer){word.p + k + 1, word.n - k - 1};
        if (key.n == 5 && !memcmp(key.p, "arena", 5) && arena.p == NULL) arena = value;
        else if (key.n == 7 && !memcmp(key.p, "failure", 7) && failure.p == NULL) failure = value;
        else return refuse_config("an unknown key, or one given twice (there are arena and failure)", word);
    }
    if (arena.n == 0) return refuse_config("arena is missing (the file at arena.path of outrider.yaml)", config);
    if (!(failure.n == 4 && !memcmp(failure.p, "open", 4)) && !(failure.n == 6 && !memcmp(failure.p, "closed", 6)))
        return refuse_config("failure must be open or closed", config);
    site = or_site_open(arena.p, arena.n, failure.n == 6, to_log, NULL, err, sizeof err);
    if (site == NULL) return refuse_config(err, arena);
    pthread_mutex_lock(&uses_lock);
    for (k = 0; k < sizeof uses / sizeof *uses; k++)
        if (uses[k].site == site || uses[k].site == NULL) {
            uses[k].site = site;
            uses[k].closed = failure.n == 6;
            if (uses[k].configs++ == 0) or_site_start(site);
            pthread_mutex_unlock(&uses_lock);
            return &uses[k];
        }
    pthread_mutex_unlock(&uses_lock);
    return refuse_config("too many different arenas in one process", arena);
}

HOOK void envoy_dynamic_module_on_http_filter_config_destroy(const void *config) {
    site_use *use = (site_use *)config;
    /* a listener that drains may drop the last one on a worker's thread */
    pthread_mutex_lock(&uses_lock);
    if (--use->configs == 0) or_site_stop(use->site);
    pthread_mutex_unlock(&uses_lock);
}

HOOK const void *envoy_dynamic_module_on_http_filter_new(const void *config, filter f) {
    static stream none[2] = {{.closed = false}, {.closed = true}}; /* shared: nothing is written to them */
    stream *s = calloc(1, sizeof *s);
    (void)f;
    if (s == NULL) return &none[((const site_use *)config)->closed];
    s->request = or_open(((const site_use *)config)->site);
    return s;
}

HOOK void envoy_dynamic_module_on_http_filter_destroy(const void *module) {
    stream *s = (stream *)module;
    if (s->request == NULL) return;
    or_close(s->request);
    free(s);
}

/* ---- carrying out -------------------------------------------------------------------------------------------- */

static void tell_log(filter f, stream *s) {
    static const buffer space = {"outrider", 8};
    const or_record *record = or_record_of(s->request);
    size_t i;
    if (!record->tell) return;
#define SET(key, text) envoy_dynamic_module_callback_http_set_dynamic_metadata_string(f, space, TEXT(key), as_buffer(text))
    SET("action", record->action);
    SET("enforced", record->enforced);
    SET("mode", record->mode);
    SET("id", record->id);
    if (record->route.n) SET("route", record->route);
    if (record->place.n) SET("place", record->place);
#undef SET
    envoy_dynamic_module_callback_http_set_dynamic_metadata_number(f, space, TEXT("score"), record->score_number);
    for (i = 0; i < record->n_reasons; i++)
        envoy_dynamic_module_callback_http_add_dynamic_metadata_list_string(f, space, TEXT("reasons"),
                                                                            as_buffer(record->reasons[i]));
}

static void answer(filter f, stream *s) {
    const or_answer *a;
    header fields[8];
    char grpc[4];
    size_t i, n = 0;
    s->answered = true;
    tell_log(f, s);
    a = or_answer_of(s->request);
    for (i = 0; i < a->n_fields && n < 6; i++)
        fields[n++] = (header){a->fields[i].name.p, a->fields[i].name.n, a->fields[i].value.p, a->fields[i].value.n};
    if (a->grpc_status > 0) {
        /* Envoy turns a local reply to a gRPC request into one without a body; the status it would choose is another */
        int k = snprintf(grpc, sizeof grpc, "%d", a->grpc_status);
        fields[n++] = (header){"grpc-status", 11, grpc, (size_t)k};
    }
    envoy_dynamic_module_callback_http_send_response(f, a->status, fields, n, as_buffer(a->body),
                                                     as_buffer(a->details));
}

/* Take every x-outrider-* out of the headers. Each removal changes the list, which is then read anew; whatever happens, no
 * more often than there were headers. False: no memory, some may be left. */
static bool remove_ours(filter f, int type) {
    size_t left = envoy_dynamic_module_callback_http_get_headers_size(f, type);
    header some[HEADERS_ON_STACK];
    for (;;) {
        header *all = some;
        char *name = NULL;
        bool found = false;
        size_t i, name_n = 0, n = envoy_dynamic_module_callback_http_get_headers_size(f, type);
        if (n > HEADERS_ON_STACK && (all = malloc(n * sizeof *all)) == NULL) return false;
        if (n && envoy_dynamic_module_callback_http_get_headers(f, type, all))
            for (i = 0; i < n && name == NULL; i++)
                if (all[i].kn >= 11 && or_is_ours(all[i].k, all[i].kn)) {
                    /* a copy: removing frees the name */
                    found = true;
                    if ((name = malloc(all[i].kn)) == NULL) break;
                    memcpy(name, all[i].k, name_n = all[i].kn);
                }
        if (all != some) free(all);
        if (name == NULL) return !found;
        envoy_dynamic_module_callback_http_set_header(f, type, (buffer){name, name_n}, (buffer){NULL, 0});
        free(name);
        if (left-- == 0) return false;
    }
}

/* The request is decided. True: go on; false: it was answered. */
static bool settle(filter f, stream *s, or_verdict verdict) {
    const or_field *fields;
    size_t i, n;
    s->undecided = false;
    if (verdict == OR_REFUSE) {
        answer(f, s);
        return false;
    }
    tell_log(f, s);
    if (s->passed_on) return true; /* its headers have gone */
    for (i = 0, n = or_told(s->request, &fields); i < n; i++)
        envoy_dynamic_module_callback_http_set_header(f, REQUEST_HEADERS, as_buffer(fields[i].name),
                                                      as_buffer(fields[i].value));
    return true;
}

/* ---- a request ----------------------------------------------------------------------------------------------- */

HOOK int envoy_dynamic_module_on_http_filter_request_headers(filter f, const void *module, bool end) {
    stream *s = (stream *)module;
    header some[HEADERS_ON_STACK], *all = some;
    buffer address = {NULL, 0};
    or_verdict verdict;
    size_t i, n = envoy_dynamic_module_callback_http_get_headers_size(f, REQUEST_HEADERS);
    if (s->request == NULL) {
        if (!s->closed) return HEADERS_CONTINUE;
        envoy_dynamic_module_callback_http_send_response(f, 503, NULL, 0, TEXT(""), TEXT("outrider_unavailable"));
        return HEADERS_STOP;
    }
    if (n > HEADERS_ON_STACK && (all = malloc(n * sizeof *all)) == NULL) n = 0;
    if (n && envoy_dynamic_module_callback_http_get_headers(f, REQUEST_HEADERS, all))
        for (i = 0; i < n; i++) or_header(s->request, all[i].k, all[i].kn, all[i].v, all[i].vn);
    if (envoy_dynamic_module_callback_http_filter_get_attribute_string(f, ATTRIBUTE_SOURCE_ADDRESS, &address))
        or_peer(s->request, address.p, address.n, true);
    verdict = or_headers_done(s->request, end);
    if (all != some) free(all);
    if (or_has_ours(s->request) && !remove_ours(f, REQUEST_HEADERS)) {
        /* the service would believe what the client says of itself */
        s->answered = true;
        envoy_dynamic_module_callback_http_send_response(f, 500, NULL, 0, TEXT(""), TEXT("outrider_no_memory"));
        return HEADERS_STOP;
    }
    if (verdict == OR_PASS || verdict == OR_REFUSE)
        return settle(f, s, verdict) ? HEADERS_CONTINUE : HEADERS_STOP;
    s->undecided = true;
    s->passed_on = verdict == OR_READ;
    return s->passed_on ? HEADERS_CONTINUE : HEADERS_STOP;
}

HOOK int envoy_dynamic_module_on_http_filter_request_body(filter f, const void *module, bool end) {
    stream *s = (stream *)module;
    buffer some[CHUNKS_ON_STACK], *chunks = some;
    or_verdict verdict = OR_HOLD;
    uint64_t limit, bytes = 0;
    size_t i, n;
    if (s->answered) return BODY_STOP;
    if (!s->undecided) return BODY_CONTINUE;
    n = envoy_dynamic_module_callback_http_get_body_chunks_size(f, RECEIVED_REQUEST_BODY);
    if (n > CHUNKS_ON_STACK && (chunks = malloc(n * sizeof *chunks)) == NULL) {
        verdict = or_body_end(s->request, true);
        return settle(f, s, verdict) ? BODY_CONTINUE : BODY_STOP;
    }
    if (n && !envoy_dynamic_module_callback_http_get_body_chunks(f, RECEIVED_REQUEST_BODY, chunks)) n = 0;
    for (i = 0; i < n; i++) {
        bytes += chunks[i].n;
        verdict = or_body(s->request, chunks[i].p, chunks[i].n, end && i + 1 == n);
        if (verdict != OR_HOLD && verdict != OR_READ) break;
    }
    if (chunks != some) free(chunks);
    if (n == 0) verdict = end ? or_body_end(s->request, false) : s->passed_on ? OR_READ : OR_HOLD;
    if (verdict == OR_HOLD) {
        /* beyond its limit Envoy would refuse the request by itself: what is there has to do */
        s->held += bytes;
        limit = envoy_dynamic_module_callback_http_get_buffer_limit(f);
        if (limit && s->held >= limit) verdict = or_body_end(s->request, true);
    }
    if (verdict == OR_HOLD) return BODY_STOP_AND_BUFFER;
    if (verdict == OR_READ) return BODY_CONTINUE;
    return settle(f, s, verdict) ? BODY_CONTINUE : BODY_STOP;
}

/* Of a body that trailers follow, the body hook never sees the end. */
HOOK int envoy_dynamic_module_on_http_filter_request_trailers(filter f, const void *module) {
    stream *s = (stream *)module;
    if (s->answered) return TRAILERS_STOP;
    if (s->request != NULL) remove_ours(f, REQUEST_TRAILERS);
    if (!s->undecided) return TRAILERS_CONTINUE;
    return settle(f, s, or_body_end(s->request, false)) ? TRAILERS_CONTINUE : TRAILERS_STOP;
}

/* The service's response, or one of another filter's; our own doesn't come this way. */
HOOK int envoy_dynamic_module_on_http_filter_response_headers(filter f, const void *module, bool end) {
    stream *s = (stream *)module;
    buffer status = {NULL, 0};
    (void)end;
    if (s->request == NULL || s->answered) return HEADERS_CONTINUE;
    /* answered before all of the body was here: it is judged by what came */
    if (s->undecided && !settle(f, s, or_body_end(s->request, true))) return HEADERS_STOP;
    if (envoy_dynamic_module_callback_http_get_header(f, RESPONSE_HEADERS, TEXT(":status"), &status, 0, NULL)
        && status.n == 3)
        or_response(s->request, (status.p[0] - '0') * 100 + (status.p[1] - '0') * 10 + (status.p[2] - '0'));
    remove_ours(f, RESPONSE_HEADERS);
    return HEADERS_CONTINUE;
}

HOOK int envoy_dynamic_module_on_http_filter_response_body(filter f, const void *module, bool end) {
    (void)f, (void)module, (void)end;
    return BODY_CONTINUE;
}

HOOK int envoy_dynamic_module_on_http_filter_response_trailers(filter f, const void *module) {
    if (((const stream *)module)->request != NULL) remove_ours(f, RESPONSE_TRAILERS);
    return TRAILERS_CONTINUE;
}

HOOK void envoy_dynamic_module_on_http_filter_stream_complete(filter f, const void *module) {
    (void)f, (void)module;
}

/* What Envoy insists on and this module has no use for. */
HOOK void envoy_dynamic_module_on_http_filter_http_callout_done(filter f, const void *m, uint64_t id, int result, header *h,
                                                                size_t n, buffer *body, size_t chunks) {
    (void)f, (void)m, (void)id, (void)result, (void)h, (void)n, (void)body, (void)chunks;
}
HOOK void envoy_dynamic_module_on_http_filter_http_stream_headers(filter f, const void *m, uint64_t id, header *h, size_t n,
                                                                  bool end) {
    (void)f, (void)m, (void)id, (void)h, (void)n, (void)end;
}
HOOK void envoy_dynamic_module_on_http_filter_http_stream_data(filter f, const void *m, uint64_t id, const buffer *body,
                                                               size_t chunks, bool end) {
    (void)f, (void)m, (void)id, (void)body, (void)chunks, (void)end;
}
HOOK void envoy_dynamic_module_on_http_filter_http_stream_trailers(filter f, const void *m, uint64_t id, header *h,
                                                                   size_t n) {
    (void)f, (void)m, (void)id, (void)h, (void)n;
}
HOOK void envoy_dynamic_module_on_http_filter_http_stream_complete(filter f, const void *m, uint64_t id) {
    (void)f, (void)m, (void)id;
}
HOOK void envoy_dynamic_module_on_http_filter_http_stream_reset(filter f, const void *m, uint64_t id, int reason) {
    (void)f, (void)m, (void)id, (void)reason;
}
HOOK void envoy_dynamic_module_on_http_filter_scheduled(filter f, const void *m, uint64_t event) {
    (void)f, (void)m, (void)event;
}
HOOK void envoy_dynamic_module_on_http_filter_downstream_above_write_buffer_high_watermark(filter f, const void *m) {
    (void)f, (void)m;
}
HOOK void envoy_dynamic_module_on_http_filter_downstream_below_write_buffer_low_watermark(filter f, const void *m) {
    (void)f, (void)m;
}
