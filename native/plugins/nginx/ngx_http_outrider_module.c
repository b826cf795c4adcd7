/* Outrider in NGINX: a thin shim over the core (outrider.h).
 *
 * The request's way: `on_request` (preaccess phase) hands over the headers; `on_request_body` (request body filter)
 * the body, as whoever reads it does so; `settle` carries out the verdict. A refusal is a status that NGINX makes a
 * response of; `on_response_headers` and `on_response_body` then put Outrider's answer in its place, unless the operator
 * has an error_page for the status. The context lives as long as the request: internal redirects forget the pointer
 * to it (r->ctx), so `context_of` finds it again among the pool's cleanups, and no request is decided twice.
 *
 * Subrequests are left alone: they are the operator's, not the client's.
 */
#include <ngx_config.h>
#include <ngx_core.h>
#include <ngx_http.h>

#include "outrider.h"

enum { ERROR_BYTES = 512 };

typedef enum {
    HOLDING, /* undecided: nothing goes on before the body has been judged */
    READING, /* undecided: the body is judged while it goes on */
    PASSED,
    REFUSED
} state_t;

typedef struct {
    or_request *request;
    state_t state;
    ngx_str_t body;             /* of the answer, while it takes a response's place */
    unsigned is_cut:1;          /* refused before the body's end */
    unsigned is_replaced:1;     /* the response is our answer... */
    unsigned is_sent:1;         /* ... and has been handed on */
    unsigned is_response_told:1;
} context_t;

typedef struct {
    ngx_str_t arena;
    ngx_uint_t failure;         /* one of failure_modes */
    or_site *site;
    ngx_str_t file;             /* where the first `outrider on` stands */
    ngx_uint_t line;            /* 0: nowhere */
} main_conf_t;

typedef struct {
    ngx_flag_t enabled;
} loc_conf_t;

enum { FAILURE_OPEN, FAILURE_CLOSED };

static char *set_enabled(ngx_conf_t *cf, ngx_command_t *command, void *conf);
static ngx_int_t add_variables(ngx_conf_t *cf);
static ngx_int_t install(ngx_conf_t *cf);
static void *create_main_conf(ngx_conf_t *cf);
static void *create_loc_conf(ngx_conf_t *cf);
static char *merge_loc_conf(ngx_conf_t *cf, void *parent, void *child);
static ngx_int_t start_process(ngx_cycle_t *cycle);
static void end_process(ngx_cycle_t *cycle);

static ngx_conf_enum_t failure_modes[] = {
    {ngx_string("open"), FAILURE_OPEN},
    {ngx_string("closed"), FAILURE_CLOSED},
    {ngx_null_string, 0},
};

static ngx_command_t commands[] = {
    {ngx_string("outrider"), NGX_HTTP_MAIN_CONF | NGX_HTTP_SRV_CONF | NGX_HTTP_LOC_CONF | NGX_CONF_FLAG, set_enabled,
     NGX_HTTP_LOC_CONF_OFFSET, offsetof(loc_conf_t, enabled), NULL},
    {ngx_string("outrider_arena"), NGX_HTTP_MAIN_CONF | NGX_CONF_TAKE1, ngx_conf_set_str_slot,
     NGX_HTTP_MAIN_CONF_OFFSET, offsetof(main_conf_t, arena), NULL},
    {ngx_string("outrider_failure"), NGX_HTTP_MAIN_CONF | NGX_CONF_TAKE1, ngx_conf_set_enum_slot,
     NGX_HTTP_MAIN_CONF_OFFSET, offsetof(main_conf_t, failure), failure_modes},
    ngx_null_command,
};

static ngx_http_module_t hooks = {
    add_variables, install, create_main_conf, NULL, NULL, NULL, create_loc_conf, merge_loc_conf,
};

ngx_module_t ngx_http_outrider_module = {
    NGX_MODULE_V1,
    &hooks,
    commands,
    NGX_HTTP_MODULE,
    NULL,
    NULL,
    start_process,
    NULL,
    NULL,
    end_process,
    NULL,
    NGX_MODULE_V1_PADDING,
};

static ngx_http_request_body_filter_pt next_request_body_filter;
static ngx_http_output_header_filter_pt next_header_filter;
static ngx_http_output_body_filter_pt next_body_filter;

/* ---- the context -------------------------------------------------------------------------------------------- */

static int is_undecided(const context_t *ctx) {
    return ctx->state == HOLDING || ctx->state == READING;
}

/* With the request's pool: after its log phase. */
static void forget(void *data) {
    context_t *ctx = data;
    if (is_undecided(ctx)) {
        or_body_end(ctx->request, 1);
    }
    or_close(ctx->request);
}

/* NULL for requests that Outrider wasn't asked about. */
static context_t *context_of(ngx_http_request_t *r) {
    context_t *ctx = ngx_http_get_module_ctx(r, ngx_http_outrider_module);
    if (ctx == NULL && (r->internal || r->filter_finalize)) {
        for (ngx_pool_cleanup_t *c = r->pool->cleanup; c; c = c->next) {
            if (c->handler == forget) {
                return c->data;
            }
        }
    }
    return ctx;
}

static context_t *make_context(ngx_http_request_t *r, or_site *site) {
    ngx_pool_cleanup_t *cleanup = ngx_pool_cleanup_add(r->pool, sizeof(context_t));
    if (cleanup == NULL) {
        return NULL;
    }
    context_t *ctx = cleanup->data;
    ngx_memzero(ctx, sizeof(*ctx));
    ctx->request = or_open(site);
    cleanup->handler = forget;
    ngx_http_set_ctx(r, ctx, ngx_http_outrider_module);
    return ctx;
}

static ngx_int_t copy_text(ngx_pool_t *pool, ngx_str_t *to, or_text from) {
    to->len = from.n;
    to->data = NULL;
    if (from.n == 0) {
        return NGX_OK;
    }
    to->data = ngx_pnalloc(pool, from.n);
    if (to->data == NULL) {
        return NGX_ERROR;
    }
    ngx_memcpy(to->data, from.p, from.n);
    return NGX_OK;
}

/* ---- the request's headers ---------------------------------------------------------------------------------- */

static void hand_over(or_request *request, const char *name, size_t name_n, const ngx_str_t *value) {
    or_header(request, name, name_n, (const char *)value->data, value->len);
}

/* The host by which NGINX chose the server, with its port where the Host header has one; in a request line with a
 * scheme the client may have named another there. */
static ngx_str_t authority(ngx_http_request_t *r) {
    const ngx_str_t server = r->headers_in.server;
    if (r->headers_in.host) {
        const ngx_str_t host = r->headers_in.host->value;
        if (host.len >= server.len && ngx_strncasecmp(host.data, server.data, server.len) == 0 &&
            (host.len == server.len || host.data[server.len] == ':' || host.data[server.len] == '.')) {
            return host;
        }
    }
    return server;
}

static ngx_int_t hand_over_headers(ngx_http_request_t *r, or_request *request) {
    ngx_str_t path = r->unparsed_uri, host = authority(r), scheme = ngx_string("http");
#if (NGX_HTTP_SSL)
    if (r->connection->ssl) {
        ngx_str_set(&scheme, "https");
    }
#endif
    if (path.len == 0 || path.data[0] != '/') { /* as in GET http://host?query */
        path.data = ngx_pnalloc(r->pool, path.len + 1);
        if (path.data == NULL) {
            return NGX_ERROR;
        }
        path.data[0] = '/';
        ngx_memcpy(path.data + 1, r->unparsed_uri.data, path.len);
        path.len++;
    }
    hand_over(request, ":method", 7, &r->method_name);
    hand_over(request, ":path", 5, &path);
    hand_over(request, ":authority", 10, &host);
    hand_over(request, ":scheme", 7, &scheme);
    for (ngx_list_part_t *part = &r->headers_in.headers.part; part; part = part->next) {
        ngx_table_elt_t *h = part->elts;
        for (ngx_uint_t i = 0; i < part->nelts; i++) {
            or_header(request, (const char *)h[i].lowcase_key, h[i].key.len, (const char *)h[i].value.data,
                      h[i].value.len);
        }
    }
    const ngx_str_t peer = r->connection->addr_text; /* the client's where the realip module trusts the peer */
    if (peer.len && ngx_strncmp(peer.data, "unix:", ngx_min(peer.len, 5)) != 0) {
        or_peer(request, (const char *)peer.data, peer.len, 0);
    }
    return NGX_OK;
}

/* Leave those out of a list of headers that or_is_ours. What stays keeps its place in memory, since others point to
 * it: the list is cut into runs. None of them may be empty but the only one, as everyone who goes through such a list
 * relies on that. */
static ngx_int_t remove_ours(ngx_list_t *list) {
    ngx_list_part_t *last = NULL;
    void *elements = list->part.elts;
    for (ngx_list_part_t *part = &list->part, *next; part; part = next) {
        next = part->next;
        ngx_table_elt_t *h = part->elts;
        const ngx_uint_t n = part->nelts;
        ngx_uint_t begin = 0;
        for (ngx_uint_t i = 0; i <= n; i++) {
            if (i < n && !or_is_ours((const char *)h[i].lowcase_key, h[i].key.len)) {
                continue;
            }
            if (i > begin) {
                /* the list's own part and then each part for its first run; what has been read of it may go */
                ngx_list_part_t *run = last == NULL ? &list->part : begin == 0 ? part : NULL;
                if (run == NULL) {
                    run = ngx_palloc(list->pool, sizeof(ngx_list_part_t));
                    if (run == NULL) {
                        return NGX_ERROR;
                    }
                }
                run->elts = h + begin;
                run->nelts = i - begin;
                if (last) {
                    last->next = run;
                }
                last = run;
            }
            begin = i + 1;
        }
    }
    if (last == NULL) {
        list->part.elts = elements;
        list->part.nelts = 0;
        last = &list->part;
    } else {
        list->nalloc = last->nelts; /* full: whoever adds one begins a new part, and none is written over */
    }
    last->next = NULL;
    list->last = last;
    return NGX_OK;
}

static ngx_int_t tell_service(ngx_http_request_t *r, context_t *ctx) {
    const or_field *told;
    const size_t n = or_told(ctx->request, &told);
    for (size_t i = 0; i < n; i++) {
        ngx_table_elt_t *h = ngx_list_push(&r->headers_in.headers);
        if (h == NULL) {
            return NGX_ERROR;
        }
        ngx_memzero(h, sizeof(*h));
        if (copy_text(r->pool, &h->key, told[i].name) != NGX_OK ||
            copy_text(r->pool, &h->value, told[i].value) != NGX_OK) {
            return NGX_ERROR;
        }
        h->lowcase_key = h->key.data;
        h->hash = ngx_hash_key(h->key.data, h->key.len);
    }
    return NGX_OK;
}

/* ---- verdicts ----------------------------------------------------------------------------------------------- */

static ngx_int_t settle(ngx_http_request_t *r, context_t *ctx, or_verdict verdict) {
    switch (verdict) {
    case OR_PASS:
        ctx->state = PASSED;
        return tell_service(r, ctx);
    case OR_REFUSE:
        ctx->state = REFUSED;
        return NGX_OK;
    case OR_HOLD:
        ctx->state = HOLDING;
        return NGX_OK;
    default:
        ctx->state = READING;
        return NGX_OK;
    }
}

static ngx_int_t refusal_status(context_t *ctx) {
    const ngx_int_t status = or_answer_of(ctx->request)->status;
    return status >= NGX_HTTP_BAD_REQUEST && status < 600 ? status : NGX_HTTP_FORBIDDEN;
}

/* The body has been read: go on where on_request left. */
static void on_body_read(ngx_http_request_t *r) {
    context_t *ctx = ngx_http_get_module_ctx(r, ngx_http_outrider_module);
    if (is_undecided(ctx) && (settle(r, ctx, or_body_end(ctx->request, 0)) != NGX_OK || is_undecided(ctx))) {
        ngx_http_finalize_request(r, NGX_HTTP_INTERNAL_SERVER_ERROR);
        return;
    }
    r->write_event_handler = ngx_http_core_run_phases;
    ngx_http_core_run_phases(r);
}

static ngx_int_t on_request(ngx_http_request_t *r) {
    const loc_conf_t *conf = ngx_http_get_module_loc_conf(r, ngx_http_outrider_module);
    if (!conf->enabled || r != r->main) {
        return NGX_DECLINED;
    }
    context_t *ctx = ngx_http_get_module_ctx(r, ngx_http_outrider_module);
    if (ctx) {
        return ctx->state == REFUSED ? refusal_status(ctx) : ctx->state == HOLDING ? NGX_DONE : NGX_DECLINED;
    }
    ctx = context_of(r);
    if (ctx) { /* redirected; a refused request is here for the operator's error_page */
        if (ctx->state != REFUSED) {
            ngx_http_set_ctx(r, ctx, ngx_http_outrider_module);
        }
        return NGX_DECLINED;
    }
    if (r->headers_in.headers.last == NULL) {
        return NGX_DECLINED; /* an error_page for what wasn't even a request */
    }
    const main_conf_t *main_conf = ngx_http_get_module_main_conf(r, ngx_http_outrider_module);
    ctx = make_context(r, main_conf->site);
    if (ctx == NULL || hand_over_headers(r, ctx->request) != NGX_OK) {
        return NGX_HTTP_INTERNAL_SERVER_ERROR;
    }
    /* HTTP/2 without a length counts as chunked unless the stream has ended */
    const int end = r->headers_in.content_length_n <= 0 && !r->headers_in.chunked;
    const or_verdict verdict = or_headers_done(ctx->request, end);
    if (or_has_ours(ctx->request) && remove_ours(&r->headers_in.headers) != NGX_OK) {
        return NGX_HTTP_INTERNAL_SERVER_ERROR;
    }
    if (settle(r, ctx, verdict) != NGX_OK) {
        return NGX_HTTP_INTERNAL_SERVER_ERROR;
    }
    if (ctx->state == REFUSED) {
        return refusal_status(ctx);
    }
    if (ctx->state != HOLDING) {
        return NGX_DECLINED;
    }
    const ngx_int_t rc = ngx_http_read_client_request_body(r, on_body_read);
    if (rc >= NGX_HTTP_SPECIAL_RESPONSE) {
        return rc;
    }
    ngx_http_finalize_request(r, NGX_DONE); /* the reference that reading took */
    return NGX_DONE;
}

/* Request body filter: parts are in memory here, before they go to a file or to the service. */
static ngx_int_t on_request_body(ngx_http_request_t *r, ngx_chain_t *in) {
    context_t *ctx = r == r->main ? context_of(r) : NULL;
    if (ctx == NULL || ctx->state == PASSED) {
        return next_request_body_filter(r, in);
    }
    if (is_undecided(ctx)) {
        const state_t before = ctx->state;
        int at_end = 0;
        for (ngx_chain_t *cl = in; cl && is_undecided(ctx); cl = cl->next) {
            const ngx_buf_t *b = cl->buf;
            const size_t n = ngx_buf_in_memory(b) ? (size_t)(b->last - b->pos) : 0;
            at_end = b->last_buf;
            if (n == 0 && !at_end) {
                continue;
            }
            if (settle(r, ctx, or_body(ctx->request, (const char *)b->pos, n, at_end)) != NGX_OK) {
                return NGX_HTTP_INTERNAL_SERVER_ERROR;
            }
            if (is_undecided(ctx)) {
                ctx->state = before; /* what is held stays so until the end, what goes on can't be held any more */
            }
        }
        /* Held and refused at its end: on_request says so when the body is in, and the connection is kept. */
        ctx->is_cut = ctx->state == REFUSED && !(before == HOLDING && at_end);
    }
    if (!ctx->is_cut) {
        return next_request_body_filter(r, in);
    }
    /* What is left of the body must not be taken for the connection's next request. */
    r->keepalive = 0;
    r->lingering_close = 1;
#if (NGX_HTTP_V2)
    if (r->stream) {
        r->stream->skip_data = 1;
    }
#endif
    return refusal_status(ctx);
}

/* ---- the response ------------------------------------------------------------------------------------------- */

static ngx_int_t add_response_header(ngx_http_request_t *r, or_text name, or_text value) {
    ngx_str_t copy;
    if (copy_text(r->pool, &copy, value) != NGX_OK) {
        return NGX_ERROR;
    }
    if (name.n == 12 && ngx_strncmp(name.p, "content-type", 12) == 0) {
        r->headers_out.content_type = copy;
        r->headers_out.content_type_len = copy.len;
        r->headers_out.content_type_lowcase = NULL;
        return NGX_OK;
    }
    ngx_table_elt_t *h = ngx_list_push(&r->headers_out.headers);
    if (h == NULL) {
        return NGX_ERROR;
    }
    ngx_memzero(h, sizeof(*h));
    if (copy_text(r->pool, &h->key, name) != NGX_OK) {
        return NGX_ERROR;
    }
    h->value = copy;
    h->hash = 1;
    return NGX_OK;
}

/* Put our answer in the place of the response whose headers are about to be sent. */
static ngx_int_t replace_response(ngx_http_request_t *r, context_t *ctx) {
    const or_answer *answer = or_answer_of(ctx->request);
    ngx_http_clear_content_length(r);
    ngx_http_clear_accept_ranges(r);
    ngx_http_clear_last_modified(r);
    ngx_http_clear_etag(r);
    ngx_str_null(&r->headers_out.status_line);
    ngx_str_null(&r->headers_out.content_type);
    r->headers_out.content_type_len = 0;
    r->expect_trailers = 0;
    r->allow_ranges = 0;
    ctx->is_replaced = 1;
    for (size_t i = 0; i < answer->n_fields; i++) {
        if (add_response_header(r, answer->fields[i].name, answer->fields[i].value) != NGX_OK) {
            return NGX_ERROR;
        }
    }
    if (answer->grpc_status <= 0) {
        r->headers_out.status = refusal_status(ctx);
        r->headers_out.content_length_n = answer->body.n;
        return copy_text(r->pool, &ctx->body, answer->body);
    }
    /* "trailers only": all is in the headers, of which gRPC's clients want status 200 */
    u_char digits[NGX_INT_T_LEN];
    const or_text name = {"grpc-status", 11};
    const or_text value = {(char *)digits, ngx_sprintf(digits, "%d", answer->grpc_status) - digits};
    const or_text type_name = {"content-type", 12}, type = {"application/grpc", 16};
    r->err_status = 0;
    r->headers_out.status = NGX_HTTP_OK;
    if (r->http_version >= NGX_HTTP_VERSION_20) {
        r->header_only = 1;
    } else {
        r->headers_out.content_length_n = 0;
    }
    if (add_response_header(r, type_name, type) != NGX_OK) {
        return NGX_ERROR;
    }
    return add_response_header(r, name, value);
}

static void hide_ours(ngx_list_t *list) {
    for (ngx_list_part_t *part = &list->part; part; part = part->next) {
        ngx_table_elt_t *h = part->elts;
        for (ngx_uint_t i = 0; i < part->nelts; i++) {
            if (h[i].hash && or_is_ours((const char *)h[i].key.data, h[i].key.len)) {
                h[i].hash = 0;
            }
        }
    }
}

static ngx_int_t on_response_headers(ngx_http_request_t *r) {
    context_t *ctx = r == r->main ? context_of(r) : NULL;
    if (ctx == NULL || ctx->is_replaced) {
        return next_header_filter(r);
    }
    hide_ours(&r->headers_out.headers);
    int is_from_elsewhere = 0;
    if (is_undecided(ctx)) {
        /* The body wasn't read, or is still coming while the service answers already. */
        if (settle(r, ctx, or_body_end(ctx->request, 1)) != NGX_OK || is_undecided(ctx)) {
            return NGX_ERROR;
        }
        if (ctx->state == REFUSED && r->err_status) {
            ctx->state = PASSED; /* NGINX refuses it by itself: its answer says why */
            return next_header_filter(r);
        }
        is_from_elsewhere = ctx->state == REFUSED;
    }
    if (ctx->state == PASSED) {
        if (!ctx->is_response_told) {
            ctx->is_response_told = 1;
            or_response(ctx->request, r->headers_out.status);
        }
        return next_header_filter(r);
    }
    if (is_from_elsewhere) {
        ngx_http_clean_header(r);
    } else if (ngx_http_get_module_ctx(r, ngx_http_outrider_module) == NULL ||
               r->headers_out.status != (ngx_uint_t)refusal_status(ctx)) {
        return next_header_filter(r); /* the operator's error_page: a location of his, or a redirection */
    }
    if (replace_response(r, ctx) != NGX_OK) {
        return NGX_ERROR;
    }
    return next_header_filter(r);
}

static ngx_int_t on_response_body(ngx_http_request_t *r, ngx_chain_t *in) {
    context_t *ctx = r == r->main ? context_of(r) : NULL;
    if (ctx == NULL || !ctx->is_replaced) {
        return next_body_filter(r, in);
    }
    for (ngx_chain_t *cl = in; cl; cl = cl->next) { /* taken and dropped */
        cl->buf->pos = cl->buf->last;
        cl->buf->file_pos = cl->buf->file_last;
    }
    if (ctx->is_sent || r->header_only) {
        return r->buffered || r->connection->buffered ? next_body_filter(r, NULL) : NGX_OK;
    }
    ngx_buf_t *b = ngx_calloc_buf(r->pool);
    if (b == NULL) {
        return NGX_ERROR;
    }
    b->pos = b->start = ctx->body.data;
    b->last = b->end = ctx->body.data + ctx->body.len;
    b->memory = ctx->body.len != 0;
    b->last_buf = 1;
    b->last_in_chain = 1;
    ctx->is_sent = 1;
    ngx_chain_t out = {b, NULL};
    return next_body_filter(r, &out);
}

/* ---- variables ---------------------------------------------------------------------------------------------- */

enum { ACTION, ENFORCED, MODE, SCORE, ID, ROUTE, REASONS, PLACE, SPENT_US };

static ngx_int_t get_variable(ngx_http_request_t *r, ngx_http_variable_value_t *v, uintptr_t which);

static ngx_http_variable_t variables[] = {
#define VARIABLE(name, which) {ngx_string("outrider_" name), NULL, get_variable, which, NGX_HTTP_VAR_NOCACHEABLE, 0}
    VARIABLE("action", ACTION),
    VARIABLE("enforced", ENFORCED),
    VARIABLE("mode", MODE),
    VARIABLE("score", SCORE),
    VARIABLE("id", ID),
    VARIABLE("route", ROUTE),
    VARIABLE("reasons", REASONS),
    VARIABLE("place", PLACE),
    VARIABLE("us", SPENT_US),
#undef VARIABLE
    {ngx_null_string, NULL, NULL, 0, 0, 0},
};

/* Not found ("-" in logs) where nothing has been decided. */
static ngx_int_t get_variable(ngx_http_request_t *r, ngx_http_variable_value_t *v, uintptr_t which) {
    const context_t *ctx = context_of(r->main);
    const or_record *record = ctx ? or_record_of(ctx->request) : NULL;
    if (record == NULL || !record->is_decided) {
        v->not_found = 1;
        return NGX_OK;
    }
    u_char digits[32];
    or_text text = {NULL, 0};
    switch (which) {
    case ACTION: text = record->action; break;
    case ENFORCED: text = record->enforced; break;
    case MODE: text = record->mode; break;
    case SCORE: text = record->score; break;
    case ID: text = record->id; break;
    case ROUTE: text = record->route; break;
    case REASONS: text = record->reasons_list; break;
    case PLACE: text = record->place; break;
    default:
        text.p = (const char *)digits;
        text.n = ngx_snprintf(digits, sizeof(digits), "%.1f", record->spent_us) - digits;
    }
    ngx_str_t copy; /* the record lives until the next call on the request only */
    if (copy_text(r->pool, &copy, text) != NGX_OK) {
        return NGX_ERROR;
    }
    v->data = copy.data;
    v->len = copy.len;
    v->valid = 1;
    v->no_cacheable = 1;
    v->not_found = copy.len == 0;
    return NGX_OK;
}

static ngx_int_t add_variables(ngx_conf_t *cf) {
    for (ngx_http_variable_t *from = variables; from->name.len; from++) {
        ngx_http_variable_t *to = ngx_http_add_variable(cf, &from->name, from->flags);
        if (to == NULL) {
            return NGX_ERROR;
        }
        to->get_handler = from->get_handler;
        to->data = from->data;
    }
    return NGX_OK;
}

/* ---- configuration and processes ---------------------------------------------------------------------------- */

static void *create_main_conf(ngx_conf_t *cf) {
    main_conf_t *conf = ngx_pcalloc(cf->pool, sizeof(main_conf_t));
    if (conf) {
        conf->failure = NGX_CONF_UNSET_UINT;
    }
    return conf;
}

static void *create_loc_conf(ngx_conf_t *cf) {
    loc_conf_t *conf = ngx_pcalloc(cf->pool, sizeof(loc_conf_t));
    if (conf) {
        conf->enabled = NGX_CONF_UNSET;
    }
    return conf;
}

static char *merge_loc_conf(ngx_conf_t *cf, void *parent, void *child) {
    const loc_conf_t *from = parent;
    loc_conf_t *to = child;
    ngx_conf_merge_value(to->enabled, from->enabled, 0);
    return NGX_CONF_OK;
}

static char *set_enabled(ngx_conf_t *cf, ngx_command_t *command, void *conf) {
    char *error = ngx_conf_set_flag_slot(cf, command, conf);
    main_conf_t *main_conf = ngx_http_conf_get_module_main_conf(cf, ngx_http_outrider_module);
    if (error == NGX_CONF_OK && ((loc_conf_t *)conf)->enabled && main_conf->line == 0) {
        main_conf->file = cf->conf_file->file.name;
        main_conf->line = cf->conf_file->line;
    }
    return error;
}

/* Called from the core's thread too, as NGINX's own threads log. */
static void write_log(void *ctx, int level, const char *text, size_t n) {
    const ngx_str_t line = {n, (u_char *)text};
    const ngx_uint_t levels[] = {NGX_LOG_NOTICE, NGX_LOG_WARN, NGX_LOG_ERR};
    (void)ctx;
    ngx_log_error(levels[level < 0 || level > OR_LOG_ERROR ? OR_LOG_ERROR : level], ngx_cycle->log, 0, "outrider: %V",
                  &line);
}

static ngx_int_t open_site(ngx_conf_t *cf, main_conf_t *conf) {
    if (conf->arena.len == 0) {
        ngx_log_error(NGX_LOG_EMERG, cf->log, 0,
                      "\"outrider\" is on in %V:%ui, but \"outrider_arena\" isn't set: add it to the http block, with "
                      "the path that arena.path has in Outrider's settings",
                      &conf->file, conf->line);
        return NGX_ERROR;
    }
    if (conf->failure == NGX_CONF_UNSET_UINT) {
        ngx_log_error(NGX_LOG_EMERG, cf->log, 0,
                      "\"outrider\" is on in %V:%ui, but \"outrider_failure\" isn't set: add it to the http block, "
                      "\"open\" to let requests pass that can't be judged, or \"closed\" to refuse them",
                      &conf->file, conf->line);
        return NGX_ERROR;
    }
    char error[ERROR_BYTES] = "";
    conf->site = or_site_open((const char *)conf->arena.data, conf->arena.len, conf->failure == FAILURE_CLOSED, write_log,
                              NULL, error, sizeof(error));
    if (conf->site == NULL) {
        error[sizeof(error) - 1] = '\0';
        ngx_log_error(NGX_LOG_EMERG, cf->log, 0, "\"outrider_arena %V\" can't be used: %s", &conf->arena, error);
        return NGX_ERROR;
    }
    return NGX_OK;
}

static ngx_int_t install(ngx_conf_t *cf) {
    main_conf_t *conf = ngx_http_conf_get_module_main_conf(cf, ngx_http_outrider_module);
    if (conf->line == 0) {
        return NGX_OK; /* on nowhere */
    }
    if (open_site(cf, conf) != NGX_OK) {
        return NGX_ERROR;
    }
    ngx_http_core_main_conf_t *core = ngx_http_conf_get_module_main_conf(cf, ngx_http_core_module);
    ngx_array_t *handlers = &core->phases[NGX_HTTP_PREACCESS_PHASE].handlers;
    if (ngx_array_push(handlers) == NULL) {
        return NGX_ERROR;
    }
    /* A phase runs its handlers from the last to the first: we come after realip, limit_req and limit_conn. */
    ngx_http_handler_pt *first = handlers->elts;
    ngx_memmove(first + 1, first, (handlers->nelts - 1) * sizeof(*first));
    *first = on_request;

    next_request_body_filter = ngx_http_top_request_body_filter;
    ngx_http_top_request_body_filter = on_request_body;
    next_header_filter = ngx_http_top_header_filter;
    ngx_http_top_header_filter = on_response_headers;
    next_body_filter = ngx_http_top_body_filter;
    ngx_http_top_body_filter = on_response_body;
    return NGX_OK;
}

static or_site *site_of(ngx_cycle_t *cycle) {
    const main_conf_t *conf = ngx_http_cycle_get_module_main_conf(cycle, ngx_http_outrider_module);
    return conf ? conf->site : NULL;
}

static ngx_int_t start_process(ngx_cycle_t *cycle) {
    or_site *site = site_of(cycle);
    if (site && (ngx_process == NGX_PROCESS_WORKER || ngx_process == NGX_PROCESS_SINGLE)) {
        or_site_start(site);
    }
    return NGX_OK;
}

static void end_process(ngx_cycle_t *cycle) {
    or_site *site = site_of(cycle);
    if (site) {
        or_site_stop(site);
    }
}
