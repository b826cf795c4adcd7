/* The response's half: Outrider's answer in the place of NGINX's, and what the core is told of the others. */
#include "ngx_http_outrider_module.h"

/* ---- the response ------------------------------------------------------------------------------------------- */

static ngx_int_t add_response_header(ngx_http_request_t *r, or_text name, or_text value) {
    ngx_str_t copy;
    if (outrider_copy(r->pool, &copy, value) != NGX_OK) {
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
    if (outrider_copy(r->pool, &h->key, name) != NGX_OK) {
        return NGX_ERROR;
    }
    h->value = copy;
    h->hash = 1;
    return NGX_OK;
}

/* Put our answer in the place of the response whose headers are about to be sent. */
static ngx_int_t replace_response(ngx_http_request_t *r, outrider_context *ctx) {
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
        r->headers_out.status = ctx->refusal;
        r->headers_out.content_length_n = answer->body.n;
        return outrider_copy(r->pool, &ctx->body, answer->body);
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

ngx_int_t outrider_on_response_headers(ngx_http_request_t *r) {
    outrider_context *ctx = r == r->main ? outrider_context_of(r) : NULL;
    if (ctx == NULL || ctx->is_replaced) {
        return outrider_next_header_filter(r);
    }
    hide_ours(&r->headers_out.headers);
    int is_from_elsewhere = 0;
    if (outrider_is_undecided(ctx)) {
        /* The body wasn't read, or is still coming while the service answers already. */
        if (outrider_settle(r, ctx, or_body_end(ctx->request, 1)) != NGX_OK || outrider_is_undecided(ctx)) {
            return NGX_ERROR;
        }
        if (ctx->state == REFUSED && r->err_status) {
            ctx->state = PASSED; /* NGINX refuses it by itself: its answer says why */
            return outrider_next_header_filter(r);
        }
        is_from_elsewhere = ctx->state == REFUSED;
    }
    if (ctx->state == PASSED) {
        if (!ctx->is_response_told) {
            ctx->is_response_told = 1;
            or_response(ctx->request, r->headers_out.status);
        }
        return outrider_next_header_filter(r);
    }
    if (is_from_elsewhere) {
        ngx_http_clean_header(r);
    } else if (ngx_http_get_module_ctx(r, ngx_http_outrider_module) == NULL ||
               r->headers_out.status != (ngx_uint_t)ctx->refusal) {
        return outrider_next_header_filter(r); /* the operator's error_page: a location of his, or a redirection */
    }
    if (replace_response(r, ctx) != NGX_OK) {
        return NGX_ERROR;
    }
    return outrider_next_header_filter(r);
}

ngx_int_t outrider_on_response_body(ngx_http_request_t *r, ngx_chain_t *in) {
    outrider_context *ctx = r == r->main ? outrider_context_of(r) : NULL;
    if (ctx && r->headers_out.trailers.part.nelts) {
        hide_ours(&r->headers_out.trailers); /* the service's come with the end of its body */
    }
    if (ctx == NULL || !ctx->is_replaced) {
        return outrider_next_body_filter(r, in);
    }
    for (ngx_chain_t *cl = in; cl; cl = cl->next) { /* taken and dropped */
        cl->buf->pos = cl->buf->last;
        cl->buf->file_pos = cl->buf->file_last;
    }
    if (ctx->is_sent || r->header_only) {
        return r->buffered || r->connection->buffered ? outrider_next_body_filter(r, NULL) : NGX_OK;
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
    return outrider_next_body_filter(r, &out);
}
