"""The answers of the ext_proc protocol, written into the pool's output buffer.

Field numbers are those of envoy.service.ext_proc.v3, checked in the tests against the
compiled API messages. The writer fills backwards: read these functions from the bottom.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport strlen

from native.base cimport (ACTION_BLOCK, ACTION_THROTTLE, Decision, Slice, lower)
from native.pbwire cimport (PB_BYTES, PbField, PbReader, PbWriter, pb_close, pb_is, pb_next, pb_put_bytes,
                            pb_put_double, pb_put_raw, pb_put_text, pb_put_uint, pb_reader, pb_written)
from native.reasons cimport or_reason_name
from native.extproc_pool cimport ANSWER_BYTES_MAX, Answer, StreamState
from native.wording cimport (bounded, escape_place, hex64, is_ours, number_text, or_action_name, or_details, printable,
                             score_text)

cdef enum Part:
    # fields of ProcessingRequest and, with the other meaning, of ProcessingResponse
    IN_REQUEST_HEADERS = 2
    IN_RESPONSE_HEADERS = 3
    IN_REQUEST_BODY = 4
    IN_RESPONSE_BODY = 5
    IN_REQUEST_TRAILERS = 6
    IN_RESPONSE_TRAILERS = 7
    OUT_REQUEST_HEADERS = 1
    OUT_RESPONSE_HEADERS = 2
    OUT_REQUEST_BODY = 3
    OUT_RESPONSE_BODY = 4
    OUT_REQUEST_TRAILERS = 5
    OUT_RESPONSE_TRAILERS = 6
    OUT_IMMEDIATE = 7
    OUT_METADATA = 8
    OUT_MODE_OVERRIDE = 9


cdef inline void put_set_header(PbWriter *w, const char *name, const char *value, uint32_t n) noexcept nogil:
    """HeaderMutation.set_headers: OVERWRITE_IF_EXISTS_OR_ADD."""
    cdef uint32_t option = pb_written(w), header
    pb_put_uint(w, 3, 2)
    header = pb_written(w)
    pb_put_bytes(w, 3, value, n)
    pb_put_text(w, 1, name)
    pb_close(w, 1, header)
    pb_close(w, 1, option)


cdef inline void put_decision_headers(PbWriter *w, const Decision *d) noexcept nogil:
    """x-outrider-score (0.0000 to 1.0000), x-outrider-action (what is carried out), x-outrider-id."""
    cdef char text[16]
    cdef const char *action = or_action_name(d.enforced)
    hex64(d.id, text)
    put_set_header(w, "x-outrider-id", text, 16)
    put_set_header(w, "x-outrider-action", action, <uint32_t>strlen(action))
    score_text(d.score, text)
    put_set_header(w, "x-outrider-score", text, 6)


cdef inline bint is_set_name(Slice name) noexcept nogil:
    """One of the three names above, letter case aside: setting overwrites it."""
    cdef const char *names[3]
    cdef int k
    cdef uint32_t i
    names[0] = "x-outrider-score"
    names[1] = "x-outrider-action"
    names[2] = "x-outrider-id"
    for k in range(3):
        if name.n == strlen(names[k]):
            i = 0
            while i < name.n and lower(<uint8_t>name.p[i]) == <uint8_t>names[k][i]:
                i += 1
            if i == name.n:
                return True
    return False


cdef inline void put_removals(PbWriter *w, Slice header_map, bint keep_set) noexcept nogil:
    """HeaderMutation.remove_headers for every x-outrider-* in the HeaderMap (already checked).

    keep_set leaves the names out that are set in the same mutation. An answer holds less of a
    name than the message did, so that all of them always fit.
    """
    cdef PbReader entries = pb_reader(header_map.p, header_map.n), r
    cdef PbField entry, f
    cdef Slice name
    while pb_next(&entries, &entry):
        if entry.number != 1 or entry.wire != PB_BYTES:
            continue
        name.p = NULL
        name.n = 0
        r = pb_reader(entry.data.p, entry.data.n)
        while pb_next(&r, &f):
            if f.number == 1 and pb_is(&r, &f, PB_BYTES):
                name = f.data
        # no HTTP name, and no string for protobuf either: naming it would spoil the whole answer
        if is_ours(name) and printable(name) and not (keep_set and is_set_name(name)):
            pb_put_bytes(w, 2, name.p, name.n)


cdef inline void put_all_removals(PbWriter *w, Slice message, uint32_t part, bint keep_set) noexcept nogil:
    """The same for all HeaderMaps of an HttpHeaders in field `part` of the ProcessingRequest."""
    cdef PbReader outer = pb_reader(message.p, message.n), inner
    cdef PbField f, g
    while pb_next(&outer, &f):
        if f.number != part or f.wire != PB_BYTES:
            continue
        inner = pb_reader(f.data.p, f.data.n)
        while pb_next(&inner, &g):
            if g.number == 1 and g.wire == PB_BYTES:
                put_removals(w, g.data, keep_set)


cdef inline void end_struct_field(PbWriter *w, const char *name, uint32_t mark,
                                  uint32_t start) noexcept nogil:
    """Makes a Value's content written since `mark` the Struct field `name`, all since `start`."""
    pb_close(w, 2, mark)
    pb_put_text(w, 1, name)
    pb_close(w, 1, start)


cdef inline void put_struct_text(PbWriter *w, const char *name, const char *text, uint32_t n) noexcept nogil:
    cdef uint32_t mark = pb_written(w)
    pb_put_bytes(w, 3, text, n)
    end_struct_field(w, name, mark, mark)


cdef inline void put_struct_number(PbWriter *w, const char *name, double v) noexcept nogil:
    cdef uint32_t mark = pb_written(w)
    pb_put_double(w, 2, v)
    end_struct_field(w, name, mark, mark)


cdef inline void put_metadata(PbWriter *w, const Decision *d, Slice route) noexcept nogil:
    """ProcessingResponse.dynamic_metadata: namespace "outrider".

    action (the verdict), enforced (what is carried out), mode, score, id, route (its name),
    reasons (list of names), place (escaped, absent when none).
    """
    cdef char text[384]
    cdef uint32_t outer = pb_written(w), inner = outer, mark, value, n
    cdef const char *name
    cdef int i
    n = escape_place(d.place, d.place_n if d.place_n <= 96 else 96, text)
    if n:
        put_struct_text(w, "place", text, n)
    mark = pb_written(w)
    for i in range(<int>(d.n_reasons if d.n_reasons <= 4 else 4) - 1, -1, -1):
        value = pb_written(w)
        pb_put_text(w, 3, or_reason_name(d.reason[i]))
        pb_close(w, 1, value)
    pb_close(w, 6, mark)
    end_struct_field(w, "reasons", mark, mark)
    if route.n:
        put_struct_text(w, "route", route.p, route.n)
    hex64(d.id, text)
    put_struct_text(w, "id", text, 16)
    put_struct_number(w, "score", bounded(d.score))
    name = "enforce" if d.mode else "observe"
    put_struct_text(w, "mode", name, <uint32_t>strlen(name))
    name = or_action_name(d.enforced)
    put_struct_text(w, "enforced", name, <uint32_t>strlen(name))
    name = or_action_name(d.action)
    put_struct_text(w, "action", name, <uint32_t>strlen(name))
    pb_close(w, 5, inner)
    end_struct_field(w, "outrider", inner, outer)
    pb_close(w, OUT_METADATA, outer)


cdef inline void put_mode_override(PbWriter *w, const StreamState *s) noexcept nogil:
    """Asks for the body. It replaces the whole mode, so the response body's is repeated; trailers are
    asked for because a body that is followed by some never ends with end_of_stream."""
    cdef uint32_t mark = pb_written(w)
    # BodyMode -> ProcessingMode.BodySendMode
    cdef uint32_t mode = 2 if s.plan_mode == 1 else 1 if s.plan_mode == 2 else 3
    pb_put_uint(w, 5, 1)
    if s.announced_response_body:
        pb_put_uint(w, 4, s.announced_response_body)
    pb_put_uint(w, 3, mode)
    pb_put_uint(w, 2, 1)
    pb_close(w, OUT_MODE_OVERRIDE, mark)


cdef inline void put_immediate(PbWriter *w, const Decision *d, const Answer *a, bint is_grpc) noexcept nogil:
    """ImmediateResponse. To a gRPC client only its status is sent: another content type would break it."""
    cdef uint32_t outer = pb_written(w), mark
    cdef uint16_t wait_s = a.retry_after_s if a.retry_after_s else d.retry_after_s
    cdef uint32_t status = a.status
    cdef char text[10]
    if status < 200 or status > 599:
        status = 429 if d.enforced == ACTION_THROTTLE else 403
    pb_put_text(w, 5, or_details(d.enforced if d.enforced <= ACTION_BLOCK else ACTION_BLOCK))
    if is_grpc:
        # PERMISSION_DENIED or RESOURCE_EXHAUSTED
        mark = pb_written(w)
        pb_put_uint(w, 1, 8 if d.enforced == ACTION_THROTTLE else 7)
        pb_close(w, 4, mark)
    elif a.body.n and a.body.n <= ANSWER_BYTES_MAX:
        pb_put_bytes(w, 3, a.body.p, a.body.n)
    mark = pb_written(w)
    if wait_s:
        put_set_header(w, "retry-after", text, number_text(wait_s, text))
    put_set_header(w, "cache-control", "no-store", 8)
    if a.content_type.n and a.content_type.n <= 256 and printable(a.content_type) and not is_grpc:
        put_set_header(w, "content-type", a.content_type.p, a.content_type.n)
    pb_close(w, 2, mark)
    mark = pb_written(w)
    pb_put_uint(w, 1, status)
    pb_close(w, 1, mark)
    pb_close(w, OUT_IMMEDIATE, outer)
