/* The request's half: headers and body are handed over, verdicts carried out. */
#include "ngx_http_outrider_module.h"

/* ---- the context -------------------------------------------------------------------------------------------- */

int outrider_is_undecided(const outrider_context *ctx) {
    return ctx->state == HOLDING || ctx->state == READING;
}

/* With the request's pool: after its log phase. */
static void forget(void *data) {
    or_close(((outrider_context *)data)->request);
}

outrider_context *outrider_context_of(ngx_http_request_t *r) {
    outrider_context *ctx = ngx_http_get_module_ctx(r, ngx_http_outrider_module);
    if (ctx == NULL && (r->internal || r->filter_finalize)) {
        for (ngx_pool_cleanup_t *c = r->pool->cleanup; c; c = c->next) {
            if (c->handler == forget) {
                return c->data;
            }
        }
    }
    return ctx;
}

static outrider_context *make_context(ngx_http_request_t *r, or_site *site) {
    ngx_pool_cleanup_t *cleanup = ngx_pool_cleanup_add(r->pool, sizeof(outrider_context));
    if (cleanup == NULL) {
        return NULL;
    }
    outrider_context *ctx = cleanup->data;
    ngx_memzero(ctx, sizeof(*ctx));
    ctx->request = or_open(site);
    cleanup->handler = forget;
    ngx_http_set_ctx(r, ctx, ngx_http_outrider_module);
    return ctx;
}

ngx_int_t outrider_copy(ngx_pool_t *pool, ngx_str_t *to, or_text from) {
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

static ngx_int_t tell_service(ngx_http_request_t *r, outrider_context *ctx) {
    const or_field *told;
    const size_t n = or_told(ctx->request, &told);
    for (size_t i = 0; i < n; i++) {
        ngx_table_elt_t *h = ngx_list_push(&r->headers_in.headers);
        if (h == NULL) {
            return NGX_ERROR;
        }
        ngx_memzero(h, sizeof(*h));
        if (outrider_copy(r->pool, &h->key, told[i].name) != NGX_OK ||
            outrider_copy(r->pool, &h->value, told[i].value) != NGX_OK) {
            return NGX_ERROR;
        }
        h->lowcase_key = h->key.data;
        h->hash = ngx_hash_key(h->key.data, h->key.len);
    }
    return NGX_OK;
}

/* ---- verdicts ----------------------------------------------------------------------------------------------- */

ngx_int_t outrider_settle(ngx_http_request_t *r, outrider_context *ctx, or_verdict verdict) {
    switch (verdict) {
    case OR_PASS:
        ctx->state = PASSED;
        return tell_service(r, ctx);
    case OR_REFUSE: {
        const ngx_int_t status = or_answer_of(ctx->request)->status;
        ctx->state = REFUSED;
        ctx->refusal = status >= NGX_HTTP_BAD_REQUEST && status < 600 ? status : NGX_HTTP_FORBIDDEN;
        return NGX_OK;
    }
    case OR_HOLD:
        ctx->state = HOLDING;
        return NGX_OK;
    default:
        ctx->state = READING;
        return NGX_OK;
    }
}

/* The body has been read: go on where outrider_on_request left. */
static void on_body_read(ngx_http_request_t *r) {
    outrider_context *ctx = ngx_http_get_module_ctx(r, ngx_http_outrider_module);
    if (outrider_is_undecided(ctx)) {
        const ngx_int_t rc = outrider_settle(r, ctx, or_body_end(ctx->request, 0));
        if (rc != NGX_OK || outrider_is_undecided(ctx)) {
            ngx_http_finalize_request(r, NGX_HTTP_INTERNAL_SERVER_ERROR);
            return;
        }
    }
    r->write_event_handler = ngx_http_core_run_phases;
    ngx_http_core_run_phases(r);
}

ngx_int_t outrider_on_request(ngx_http_request_t *r) {
    const outrider_loc_conf *conf = ngx_http_get_module_loc_conf(r, ngx_http_outrider_module);
    if (!conf->enabled || r != r->main) {
        return NGX_DECLINED;
    }
    outrider_context *ctx = ngx_http_get_module_ctx(r, ngx_http_outrider_module);
    if (ctx) {
        return ctx->state == REFUSED ? ctx->refusal : ctx->state == HOLDING ? NGX_DONE : NGX_DECLINED;
    }
    ctx = outrider_context_of(r);
    if (ctx) { /* redirected; a refused request is here for the operator's error_page */
        if (ctx->state != REFUSED) {
            ngx_http_set_ctx(r, ctx, ngx_http_outrider_module);
        }
        return NGX_DECLINED;
    }
    if (r->headers_in.headers.last == NULL) {
        /* An error_page for what wasn't even a request; or HTTP/0.9, which NGINX takes, and which nothing judges. */
        return r->internal ? NGX_DECLINED : NGX_HTTP_BAD_REQUEST;
    }
    const outrider_main_conf *main_conf = ngx_http_get_module_main_conf(r, ngx_http_outrider_module);
    ctx = make_context(r, main_conf->site);
    if (ctx == NULL || hand_over_headers(r, ctx->request) != NGX_OK) {
        return NGX_HTTP_INTERNAL_SERVER_ERROR;
    }
    /* HTTP/2 without a length counts as chunked unless the stream has ended */
    const int end = r->headers_in.content_length_n <= 0 && !r->headers_in.chunked;
    if (!end) {
        or_framed(ctx->request);
    }
    const or_verdict verdict = or_headers_done(ctx->request, end);
    if (or_has_ours(ctx->request) && remove_ours(&r->headers_in.headers) != NGX_OK) {
        return NGX_HTTP_INTERNAL_SERVER_ERROR;
    }
    if (outrider_settle(r, ctx, verdict) != NGX_OK) {
        return NGX_HTTP_INTERNAL_SERVER_ERROR;
    }
    if (ctx->state == REFUSED) {
        return ctx->refusal;
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
ngx_int_t outrider_on_request_body(ngx_http_request_t *r, ngx_chain_t *in) {
    outrider_context *ctx = r == r->main ? outrider_context_of(r) : NULL;
    if (ctx == NULL || ctx->state == PASSED) {
        return outrider_next_request_body_filter(r, in);
    }
    int at_end = 0;
    if (outrider_is_undecided(ctx)) {
        const outrider_state before = ctx->state;
        for (ngx_chain_t *cl = in; cl && outrider_is_undecided(ctx); cl = cl->next) {
            const ngx_buf_t *b = cl->buf;
            const size_t n = ngx_buf_in_memory(b) ? (size_t)(b->last - b->pos) : 0;
            at_end = b->last_buf;
            if (n == 0 && !at_end) {
                continue;
            }
            if (outrider_settle(r, ctx, or_body(ctx->request, (const char *)b->pos, n, at_end)) != NGX_OK) {
                return NGX_HTTP_INTERNAL_SERVER_ERROR;
            }
            if (outrider_is_undecided(ctx)) {
                ctx->state = before; /* what is held stays so until the end, what goes on can't be held any more */
            }
        }
        /* Held and refused at its end: outrider_on_request says so when the body is in, and the connection is kept. */
        ctx->is_cut = ctx->state == REFUSED && !(before == HOLDING && at_end);
    }
    if (!ctx->is_cut) {
        return outrider_next_request_body_filter(r, in);
    }
    if (at_end && r->request_body->buf == NULL) {
        return ctx->refusal; /* it came with the headers, and what follows it is still in place */
    }
    /* What is left of the body must not be taken for the connection's next request. */
    r->keepalive = 0;
    r->lingering_close = 1;
#if (NGX_HTTP_V2)
    if (r->stream) {
        r->stream->skip_data = 1;
    }
#endif
    return ctx->refusal;
}
