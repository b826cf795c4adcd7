"""The engine as an ExtProcHost: functions around a Worker, for whoever drives requests through native/inspect.pxd."""
from libc.stdint cimport int64_t, uint64_t

from native.base cimport ACTION_THROTTLE, Decision, Request, Slice, or_unix_us
from native.engine cimport worker_decide, worker_respond
from native.extproc_pool cimport Answer, BodyPlan, ExtProcHost
from native.models cimport ModelSet
from native.policy cimport ROUTES_MAX, RoutePolicy, pick_route
from native.windows cimport BEHAVIOUR_FEATURES, BEHAVIOUR_SCHEMA
from native.worker cimport PATH_BYTES, Worker, worker_refresh


cdef inline void host_init(ExtProcHost *host, Worker *w) noexcept nogil:
    host.ctx = w
    host.refresh = host_refresh
    host.plan = host_plan
    host.decide = host_decide
    host.answer = host_answer
    host.respond = host_respond
    host.route_name = host_route_name


cdef inline bint models_fit(const ModelSet *m) noexcept nogil:
    """Does its Isolation Forest, if it has one, take the rows that this build makes?"""
    return (m.isolation.kind == 0
            or (m.behaviour_features == BEHAVIOUR_FEATURES and m.behaviour_schema == BEHAVIOUR_SCHEMA))


cdef inline void host_refresh(ExtProcHost *host) noexcept nogil:
    """Trusted hops and address header are the policy's; the slice points into the worker's own copy."""
    cdef Worker *w = <Worker *>host.ctx
    worker_refresh(w)
    host.tell_upstream = w.policy.tell_upstream
    host.tell_proxy = w.policy.tell_proxy
    host.trusted_hops = w.policy.trusted_hops
    host.address_header.p = w.policy.address_header
    host.address_header.n = w.policy.address_header_n


cdef inline void host_plan(void *ctx, Request *r, BodyPlan *plan) noexcept nogil:
    cdef Worker *w = <Worker *>ctx
    cdef const RoutePolicy *route
    cdef Slice path
    if not worker_refresh(w):
        return
    route = &w.policy.route[pick_route(&w.policy, r.method, r.path, w.path, PATH_BYTES, &path)]
    if not route.exempt:
        plan.mode = route.body_mode
        plan.limit_bytes = route.body_limit


cdef inline void host_decide(void *ctx, Request *r, Decision *d) noexcept nogil:
    if r.time_us == 0:
        r.time_us = or_unix_us()
    worker_decide(<Worker *>ctx, r, d)


cdef inline void host_answer(void *ctx, const Decision *d, Answer *a) noexcept nogil:
    cdef Worker *w = <Worker *>ctx
    if d.enforced == ACTION_THROTTLE:
        a.status = w.policy.throttle_status
        a.body.p = w.policy.throttle_body
        a.body.n = w.policy.throttle_body_n
    else:
        a.status = w.policy.block_status
        a.body.p = w.policy.block_body
        a.body.n = w.policy.block_body_n
    a.content_type.p = w.policy.block_type
    a.content_type.n = w.policy.block_type_n
    a.retry_after_s = d.retry_after_s


cdef inline Slice host_route_name(void *ctx, const Decision *d) noexcept nogil:
    cdef const RoutePolicy *route = &(<Worker *>ctx).policy.route[d.route if d.route < ROUTES_MAX else 0]
    cdef Slice name
    name.p = route.name
    name.n = route.name_n
    return name


cdef inline void host_respond(void *ctx, const Decision *d, int status, uint64_t response_us) noexcept nogil:
    worker_respond(<Worker *>ctx, d, status, <int64_t>response_us, or_unix_us())
