/* Outrider in NGINX: a thin shim over the core (outrider.h). Here are directives, variables and processes.
 *
 * The request's way: the preaccess phase (outrider_on_request) hands over the headers; the request body filter the
 * body, as whoever reads it does so; outrider_settle takes note of the verdict. A refusal is a status that NGINX makes
 * a response of; the header and the body filter then put Outrider's answer in its place, unless the operator has an
 * error_page for that status. The context lives as long as the request: internal redirects forget the pointer to it
 * (r->ctx), so outrider_context_of finds it again among the pool's cleanups, and no request is decided twice.
 *
 * Subrequests are left alone: they are the operator's, not the client's.
 */
#include "ngx_http_outrider_module.h"

enum { ERROR_BYTES = 512 };

static char *set_enabled(ngx_conf_t *cf, ngx_command_t *command, void *conf);
static char *set_arena(ngx_conf_t *cf, ngx_command_t *command, void *conf);
static char *set_failure(ngx_conf_t *cf, ngx_command_t *command, void *conf);
static ngx_int_t add_variables(ngx_conf_t *cf);
static ngx_int_t install(ngx_conf_t *cf);
static void *create_main_conf(ngx_conf_t *cf);
static void *create_loc_conf(ngx_conf_t *cf);
static char *merge_loc_conf(ngx_conf_t *cf, void *parent, void *child);
static ngx_int_t start_process(ngx_cycle_t *cycle);
static void end_process(ngx_cycle_t *cycle);

static ngx_command_t commands[] = {
    {ngx_string("outrider"), NGX_HTTP_MAIN_CONF | NGX_HTTP_SRV_CONF | NGX_HTTP_LOC_CONF | NGX_CONF_FLAG, set_enabled,
     NGX_HTTP_LOC_CONF_OFFSET, offsetof(outrider_loc_conf, enabled), NULL},
    {ngx_string("outrider_arena"), NGX_HTTP_MAIN_CONF | NGX_CONF_TAKE1, set_arena, NGX_HTTP_MAIN_CONF_OFFSET, 0, NULL},
    {ngx_string("outrider_failure"), NGX_HTTP_MAIN_CONF | NGX_CONF_TAKE1, set_failure, NGX_HTTP_MAIN_CONF_OFFSET, 0,
     NULL},
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

ngx_http_request_body_filter_pt outrider_next_request_body_filter;
ngx_http_output_header_filter_pt outrider_next_header_filter;
ngx_http_output_body_filter_pt outrider_next_body_filter;

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
    const outrider_context *ctx = outrider_context_of(r->main);
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
    if (outrider_copy(r->pool, &copy, text) != NGX_OK) {
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
    outrider_main_conf *conf = ngx_pcalloc(cf->pool, sizeof(outrider_main_conf));
    if (conf) {
        conf->failure = NGX_CONF_UNSET_UINT;
    }
    return conf;
}

static void *create_loc_conf(ngx_conf_t *cf) {
    outrider_loc_conf *conf = ngx_pcalloc(cf->pool, sizeof(outrider_loc_conf));
    if (conf) {
        conf->enabled = NGX_CONF_UNSET;
    }
    return conf;
}

static char *merge_loc_conf(ngx_conf_t *cf, void *parent, void *child) {
    const outrider_loc_conf *from = parent;
    outrider_loc_conf *to = child;
    ngx_conf_merge_value(to->enabled, from->enabled, 0);
    return NGX_CONF_OK;
}

static char *set_enabled(ngx_conf_t *cf, ngx_command_t *command, void *conf) {
    char *error = ngx_conf_set_flag_slot(cf, command, conf);
    outrider_main_conf *main_conf = ngx_http_conf_get_module_main_conf(cf, ngx_http_outrider_module);
    if (error == NGX_CONF_OK && ((outrider_loc_conf *)conf)->enabled && main_conf->line == 0) {
        main_conf->file = cf->conf_file->file.name;
        main_conf->line = cf->conf_file->line;
    }
    return error;
}

static char *set_arena(ngx_conf_t *cf, ngx_command_t *command, void *conf) {
    ngx_str_t *arena = &((outrider_main_conf *)conf)->arena;
    const ngx_str_t path = ((ngx_str_t *)cf->args->elts)[1];
    (void)command;
    if (arena->len) {
        return "is a duplicate: NGINX has one arena, keep one of them";
    }
    if (path.len == 0 || path.data[0] != '/') {
        ngx_conf_log_error(NGX_LOG_EMERG, cf, 0,
                           "\"outrider_arena\" wants an absolute path (the one that arena.path has in Outrider's "
                           "settings), not \"%V\"",
                           &path);
        return NGX_CONF_ERROR;
    }
    *arena = path;
    return NGX_CONF_OK;
}

static char *set_failure(ngx_conf_t *cf, ngx_command_t *command, void *conf) {
    ngx_uint_t *failure = &((outrider_main_conf *)conf)->failure;
    const ngx_str_t mode = ((ngx_str_t *)cf->args->elts)[1];
    (void)command;
    if (*failure != NGX_CONF_UNSET_UINT) {
        return "is a duplicate: keep one of them";
    }
    if (mode.len == 4 && ngx_strncmp(mode.data, "open", 4) == 0) {
        *failure = FAILURE_OPEN;
    } else if (mode.len == 6 && ngx_strncmp(mode.data, "closed", 6) == 0) {
        *failure = FAILURE_CLOSED;
    } else {
        ngx_conf_log_error(NGX_LOG_EMERG, cf, 0,
                           "\"outrider_failure\" must be \"open\" (requests pass that can't be judged) or \"closed\" "
                           "(they are refused), not \"%V\"",
                           &mode);
        return NGX_CONF_ERROR;
    }
    return NGX_CONF_OK;
}

/* Called from the core's thread too, as NGINX's own threads log. */
static void write_log(void *ctx, int level, const char *text, size_t n) {
    const ngx_str_t line = {n, (u_char *)text};
    const ngx_uint_t levels[] = {NGX_LOG_NOTICE, NGX_LOG_WARN, NGX_LOG_ERR};
    (void)ctx;
    ngx_log_error(levels[level < 0 || level > OR_LOG_ERROR ? OR_LOG_ERROR : level], ngx_cycle->log, 0, "outrider: %V",
                  &line);
}

static ngx_int_t open_site(ngx_conf_t *cf, outrider_main_conf *conf) {
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
    conf->site = or_site_open((const char *)conf->arena.data, conf->arena.len, conf->failure == FAILURE_CLOSED,
                              write_log, NULL, error, sizeof(error));
    if (conf->site == NULL) {
        error[sizeof(error) - 1] = '\0';
        ngx_log_error(NGX_LOG_EMERG, cf->log, 0, "\"outrider_arena\" can't be used: %s; it is \"%V\"", error, &conf->arena);
        return NGX_ERROR;
    }
    return NGX_OK;
}

static ngx_int_t install(ngx_conf_t *cf) {
    outrider_main_conf *conf = ngx_http_conf_get_module_main_conf(cf, ngx_http_outrider_module);
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
    *first = outrider_on_request;

    outrider_next_request_body_filter = ngx_http_top_request_body_filter;
    ngx_http_top_request_body_filter = outrider_on_request_body;
    outrider_next_header_filter = ngx_http_top_header_filter;
    ngx_http_top_header_filter = outrider_on_response_headers;
    outrider_next_body_filter = ngx_http_top_body_filter;
    ngx_http_top_body_filter = outrider_on_response_body;
    return NGX_OK;
}

static or_site *site_of(ngx_cycle_t *cycle) {
    const outrider_main_conf *conf = ngx_http_cycle_get_module_main_conf(cycle, ngx_http_outrider_module);
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
