/* What the parts of the NGINX module share. */
#ifndef NGX_HTTP_OUTRIDER_MODULE_H
#define NGX_HTTP_OUTRIDER_MODULE_H

#include <ngx_config.h>
#include <ngx_core.h>
#include <ngx_http.h>

#include "outrider.h"

typedef enum {
    HOLDING, /* undecided: nothing goes on before the body has been judged */
    READING, /* undecided: the body is judged while it goes on */
    PASSED,
    REFUSED
} outrider_state;

typedef struct {
    or_request *request;
    outrider_state state;
    ngx_int_t refusal;          /* of a refused request: the status to leave a phase or a filter with */
    ngx_str_t body;             /* of the answer, while it takes a response's place */
    unsigned is_cut:1;          /* refused while the body was being read */
    unsigned is_replaced:1;     /* the response is our answer... */
    unsigned is_sent:1;         /* ... and has been handed on */
    unsigned is_response_told:1;
} outrider_context;

enum { FAILURE_OPEN, FAILURE_CLOSED };

typedef struct {
    ngx_str_t arena;
    ngx_uint_t failure;         /* FAILURE_OPEN, FAILURE_CLOSED; unset: not said */
    or_site *site;
    ngx_str_t file;             /* where the first `outrider on` stands */
    ngx_uint_t line;            /* 0: nowhere */
} outrider_main_conf;

typedef struct {
    ngx_flag_t enabled;
} outrider_loc_conf;

extern ngx_module_t ngx_http_outrider_module;
extern ngx_http_request_body_filter_pt outrider_next_request_body_filter;
extern ngx_http_output_header_filter_pt outrider_next_header_filter;
extern ngx_http_output_body_filter_pt outrider_next_body_filter;

/* ---- ngx_http_outrider_request.c ---- */

/* NULL for requests that Outrider wasn't asked about. */
outrider_context *outrider_context_of(ngx_http_request_t *r);

int outrider_is_undecided(const outrider_context *ctx);

/* Into memory of the pool; NGX_ERROR where there is none. */
ngx_int_t outrider_copy(ngx_pool_t *pool, ngx_str_t *to, or_text from);

/* Take note of a verdict, and tell the service of a request that passes; NGX_ERROR where there is no memory. */
ngx_int_t outrider_settle(ngx_http_request_t *r, outrider_context *ctx, or_verdict verdict);

/* The preaccess phase's handler and the request body filter. */
ngx_int_t outrider_on_request(ngx_http_request_t *r);
ngx_int_t outrider_on_request_body(ngx_http_request_t *r, ngx_chain_t *in);

/* ---- ngx_http_outrider_response.c ---- */

/* The header filter and the body filter. */
ngx_int_t outrider_on_response_headers(ngx_http_request_t *r);
ngx_int_t outrider_on_response_body(ngx_http_request_t *r, ngx_chain_t *in);

#endif
