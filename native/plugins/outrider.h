/* What a proxy's shim asks of Outrider's core: the interface of native/plugins/core.pyx.
 *
 * A shim fills in one request after the other, piece by piece and in the order of this file, and carries out what
 * it is told. It never blocks: nothing here waits, and nothing but or_site_open and or_site_start allocates once a
 * thread has seen its usual load (what a shim keeps of a request is its own matter). Pointers that a shim passes in need to live until the call returns, but for
 * headers: those until or_headers_done returns. Pointers that it gets live until the next call on that request.
 */
#ifndef OUTRIDER_H
#define OUTRIDER_H

#include <stddef.h>
#include <stdint.h>

typedef struct or_site or_site;       /* an arena by its path, and what to do without one; of the whole process */
typedef struct or_request or_request; /* one request; belongs to the thread that opened it */

typedef struct {
    const char *p;                    /* never NUL-terminated by contract; may be NULL where n is 0 */
    size_t n;
} or_text;

typedef struct {
    or_text name, value;
} or_field;

enum { OR_LOG_INFO = 0, OR_LOG_WARNING = 1, OR_LOG_ERROR = 2 };

/* Called from any thread. text is one line of printable ASCII without a line end. */
typedef void (*or_log_fn)(void *ctx, int level, const char *text, size_t n);

typedef enum {
    OR_PASS = 0,                      /* decided: let it go on. or_told says what to tell the service */
    OR_REFUSE = 1,                    /* decided: answer with or_answer_of, pass nothing (more) of it on */
    OR_HOLD = 2,                      /* undecided: keep headers and body back, hand over the body */
    OR_READ = 3                       /* undecided: pass headers and earlier parts on, hand over the body */
} or_verdict;

/* ---- the arena ---------------------------------------------------------------------------------------------- */

/* The site of this arena path (absolute) and failure mode, made when it is first asked for; NULL with a text in err for
 * a path that can't be one, or where there are more than 16. The file need not be there. Starts nothing and opens
 * nothing: may be called before fork. */
or_site *or_site_open(const char *arena, size_t n, int fail_closed, or_log_fn log, void *log_ctx, char *err,
                      size_t err_n);

/* In a process that serves: attach if the arena is there, and start the thread that keeps looking after arena,
 * policy and models. Calls after the first do nothing. */
void or_site_start(or_site *site);

/* Before the process ends or the library is left: ends that thread (waits for it: some ms, or as long as models that it is opening take). Requests may still be in
 * progress and go on with what is attached. */
void or_site_stop(or_site *site);

/* ---- one request -------------------------------------------------------------------------------------------- */

/* A new request of this thread. Never NULL: where there is no memory it is one that follows the failure mode. */
or_request *or_open(or_site *site);

/* One header, in the order of the request. The first calls hand over ":method", ":path" (with the query, as sent),
 * ":authority" and ":scheme". Names in lower case. */
void or_header(or_request *r, const char *name, size_t name_n, const char *value, size_t value_n);

/* The client's address as the proxy sees it: text as in 192.0.2.1, 192.0.2.1:80, [2001:db8::1]:80, optional.
 * appended: whether the proxy has already added its peer to X-Forwarded-For. */
void or_peer(or_request *r, const char *address, size_t n, int appended);

/* The protocol says that a body follows, whatever the headers say (HTTP/2 needs no content-length): then no upgrade's
 * headers make a tunnel of it. Not for proxies that hand over an upgraded connection as a body. */
void or_framed(or_request *r);

/* All headers are there. end: there is no body. */
or_verdict or_headers_done(or_request *r, int end);

/* After OR_HOLD or OR_READ: a part of the body, in order; end: it was the last. OR_HOLD and OR_READ ask for more. */
or_verdict or_body(or_request *r, const char *p, size_t n, int end);

/* After OR_HOLD or OR_READ: no more will come. cut: the rest couldn't be read (a buffer's limit, a peer that left):
 * decided on the first part, and marked. Otherwise the body was complete (trailers, for example, have come). */
or_verdict or_body_end(or_request *r, int cut);

/* Is this one of our header names, x-outrider-*? Requests must not carry a client's, nor responses a service's. */
int or_is_ours(const char *name, size_t n);

/* Did the client send any? Then they are to be removed before or_told's are set. */
int or_has_ours(const or_request *r);

/* After OR_PASS: headers to set on the request towards the service (none for most). Returns how many, at most 3. */
size_t or_told(const or_request *r, const or_field **fields);

typedef struct {
    uint32_t status;                  /* 400..599 */
    int grpc_status;                  /* > 0: to a gRPC client; body and content type are then empty */
    or_text body;
    or_text details;                  /* for the proxy's own log */
    size_t n_fields;
    const or_field *fields;           /* retry-after, cache-control, content-type */
} or_answer;

/* After OR_REFUSE. */
const or_answer *or_answer_of(or_request *r);

typedef struct {
    int is_decided;                   /* 0: not (yet), or followed the failure mode; the rest is empty then */
    int tell;                         /* is the proxy's log to be told (answers.metadata)? */
    or_text action, enforced, mode;   /* what was decided, what is carried out, "observe" or "enforce" */
    or_text id;                       /* 16 hexadecimal digits, as in decision records */
    or_text score;                    /* "0.0000" to "1.0000" */
    double score_number;
    or_text route;
    or_text place;                    /* printable ASCII; empty for most */
    size_t n_reasons;                 /* at most 4 */
    or_text reasons[4];
    or_text reasons_list;             /* the same, with commas between */
    double spent_us;
} or_record;

/* What the proxy's log may say of this request. */
const or_record *or_record_of(or_request *r);

/* The response's status is known (its headers are about to be sent to the client). At most once; not for refusals. */
void or_response(or_request *r, int status);

/* The request is over, however it ended. r is gone. */
void or_close(or_request *r);

#endif
