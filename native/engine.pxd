"""One request's way: `worker_decide`, read top to bottom.

Nothing here allocates, waits or raises. The Worker is described in native/worker.pxd, how it keeps to the budget in
native/budget.pxd.
"""
from libc.math cimport NAN
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from native.arena cimport *
from native.base cimport *
from native.budget cimport *
from native.clients cimport *
from native.escalate cimport payload_key
from native.identity cimport address_key, principal_of
from native.models cimport ModelSet, models_behaviour_score, models_text_score, tree_predict, tree_predict_text
from native.policy cimport *
from native.reasons cimport *
from native.shedding cimport SHED_SHORT
from native.text cimport text_score
from native.windows cimport *
from native.worker cimport *

cdef enum:
    TICKET_LOGIN = 1             # bits of Decision.spare, for the response half
    TICKET_STRICT_LOGIN = 2
    TICKET_OBJECT = 4
    ATTACKED_PATHS = 5           # a scanner tries everywhere; a page on which people paste SQL is one path


# -- behaviour ---------------------------------------------------------------------------------

cdef struct Finding:
    uint8_t kind                 # DetectorKind
    uint8_t action
    uint16_t reason              # 0: nothing found
    float value                  # what a person is told (a count)
    float strength               # >= 1: value by threshold


cdef inline void found(Finding *f, const Detector *d, int kind, int reason, float value, float strength) noexcept nogil:
    if f.reason and (f.action > d.action or (f.action == d.action and f.strength >= strength)):
        return
    f.kind = <uint8_t>kind
    f.action = d.action
    f.reason = <uint16_t>reason
    f.value = value
    f.strength = strength


cdef inline void found_too(Finding *f, const Policy *p, const Finding *other) noexcept nogil:
    found(f, &p.detector[other.kind], other.kind, other.reason, other.value, other.strength)


cdef inline void detect(const Policy *p, const ClientEntry *e, int64_t t, bint principal, Finding *f) noexcept nogil:
    """The named detectors on one client's windows. Each has a count from which it speaks and the
    share of the client's traffic that must be so: a busy office behind one address makes some
    failures, an attacker makes little else."""
    cdef const Detector *d
    cdef float requests, fails, logins, n, share, objects, distinct
    cdef int w
    # objects first: where refusals come from walking through ids, that is the better name
    d = &p.detector[DETECT_ENUMERATION]
    if d.enabled:
        w = d.window
        objects = window_value(&e.window[w], w, Q_OBJECTS, t)
        if objects >= 0.5 * d.count:
            distinct = sketch_count(&e.sketch[SKETCH_OBJECTS])
            share = ratio(window_value(&e.window[w], w, Q_OBJECTS_REFUSED, t), objects)
            requests = window_value(&e.window[w], w, Q_REQUESTS, t)
            if e.step_run >= d.count:
                found(f, d, DETECT_ENUMERATION, REASON_OBJECT_ENUMERATION, e.step_run + 1.0, e.step_run / d.count)
            elif distinct >= 0.6 * d.count and share >= d.share:
                found(f, d, DETECT_ENUMERATION, REASON_OBJECT_ENUMERATION, distinct, 1 + share)
            elif (distinct >= 1.6 * d.count and objects >= 0.95 * requests and distinct >= 0.9 * objects
                    and templates_count(e) <= 2.1
                    # every one of them answered: somebody who is logged in has no reason for that, but of
                    # the nameless a patient one may be a search engine
                    and (principal or sketch_count(&e.sketch[SKETCH_IDENTITIES]) > 0
                         or window_value(&e.window[WINDOW_60S], WINDOW_60S, Q_REQUESTS, t) >= d.count)):
                found(f, d, DETECT_ENUMERATION, REASON_OBJECT_ENUMERATION, distinct, distinct / d.count)
    d = &p.detector[DETECT_CREDENTIAL_STUFFING]
    if d.enabled:
        w = d.window
        fails = window_value(&e.window[w], w, Q_LOGIN_FAILURES, t)
        if fails >= 0.5 * d.count:
            n = sketch_count(&e.sketch[SKETCH_IDENTITIES])
            if n >= d.count and fails >= d.share * window_value(&e.window[w], w, Q_LOGINS, t):
                found(f, d, DETECT_CREDENTIAL_STUFFING, REASON_CREDENTIAL_STUFFING, n, n / d.count)
    d = &p.detector[DETECT_BRUTE_FORCE]
    if d.enabled:
        w = d.window
        fails = window_value(&e.window[w], w, Q_LOGIN_FAILURES, t)
        logins = window_value(&e.window[w], w, Q_LOGINS, t)
        requests = window_value(&e.window[w], w, Q_REQUESTS, t)
        if fails >= d.count and fails >= d.share * logins:
            found(f, d, DETECT_BRUTE_FORCE, REASON_BRUTE_FORCE, fails, fails / d.count)
        elif e.fail_streak >= 1.5 * d.count:
            found(f, d, DETECT_BRUTE_FORCE, REASON_BRUTE_FORCE, e.fail_streak, e.fail_streak / (1.5 * d.count))
        elif (logins >= 2 * d.count and logins >= d.share * requests
              and sketch_count(&e.sketch[SKETCH_IDENTITIES]) <= 3.5):
            # the API answers failed logins with 200: only their number speaks, and that it is always the
            # same account (a gateway logs in many)
            found(f, d, DETECT_BRUTE_FORCE, REASON_BRUTE_FORCE, logins, logins / (2 * d.count))
        else:
            n = window_value(&e.window[w], w, Q_DENIED, t)
            if n >= 2 * d.count and n >= 0.9 * requests and sketch_count(&e.sketch[SKETCH_PATHS]) <= 3.5:
                found(f, d, DETECT_BRUTE_FORCE, REASON_BRUTE_FORCE, n, n / (2 * d.count))
    d = &p.detector[DETECT_SCANNING]
    if d.enabled:
        w = d.window
        n = window_value(&e.window[w], w, Q_MISSING, t)
        if n >= d.count and n >= d.share * window_value(&e.window[w], w, Q_REQUESTS, t):
            distinct = sketch_count(&e.sketch[SKETCH_PATHS])
            if distinct >= 0.7 * d.count:
                found(f, d, DETECT_SCANNING, REASON_SCANNING, n, n / d.count)
        n = window_value(&e.window[w], w, Q_ATTACKS, t)
        if n >= 0.5 * d.count and or_popcount64(e.attacked[0] | e.attacked[1]) >= ATTACKED_PATHS:
            found(f, d, DETECT_SCANNING, REASON_REPEATED_ATTACKS, n, 2 * n / d.count)
    d = &p.detector[DETECT_FLOOD]
    if d.enabled:
        w = d.window
        n = window_value(&e.window[w], w, Q_REQUESTS, t)
        if n >= d.count:
            found(f, d, DETECT_FLOOD, REASON_REQUEST_FLOOD, n, n / d.count)


cdef inline void hold(ClientEntry *e, const Policy *p, const Finding *f, int64_t t) noexcept nogil:
    """Keep refusing the client for a while: what it is refused doesn't reach the service any more,
    so its windows alone would soon look innocent."""
    if f.reason == 0 or f.kind == DETECT_FLOOD or p.hold_us <= 0:
        return
    e.held_until_us = t + p.hold_us
    e.held_action = f.action
    e.held_reason = f.reason
    e.held_kind = f.kind
    e.held_value = f.value


cdef inline bint held(const ClientEntry *e, const Policy *p, int64_t t, Finding *f) noexcept nogil:
    """Is the client being refused for what was found earlier? A stage left out doesn't free it."""
    if (e.held_until_us <= t or e.held_until_us > t + p.hold_us or e.held_kind >= DETECTORS
            or e.held_action > ACTION_BLOCK):
        return False
    found(f, &p.detector[e.held_kind], e.held_kind, e.held_reason, e.held_value, 1.0)
    return True


cdef inline bint took_part(const Policy *p, const ClientEntry *by_address, ClientEntry *by_principal,
                           uint64_t bearer, int kind, int64_t t) noexcept nogil:
    """Does a finding on a principal concern this address? Anybody can send another's API key or the claims of a
    token that nobody has verified: without this, failures in a victim's name would lock the victim out."""
    cdef const Detector *d = &p.detector[kind]
    cdef const Party *party
    if bearer == 0:
        return True                               # nothing else tells the bearers apart
    if kind == DETECT_FLOOD:
        return (by_address == NULL
                or window_value(&by_address.window[d.window], d.window, Q_REQUESTS, t) >= 0.25 * d.count)
    party = party_of(by_principal, bearer)
    if party == NULL:
        return False
    if kind == DETECT_ENUMERATION:
        return party.walked >= 2 or party.faults >= 5 or party.objects >= (d.count if d.count < 255 else 255)
    if kind == DETECT_SCANNING:
        return party.faults >= 5
    return party.logins >= 3 or party.faults >= 0.5 * d.count


cdef inline float finding_score(const RoutePolicy *route, const Finding *f) noexcept nogil:
    """On the common scale: at least the threshold of the action asked for, below the next one's."""
    cdef float low, high = 1.0
    cdef int a
    low = route.threshold[f.action]
    if low > 1:
        low = 0.9 if f.action == ACTION_BLOCK else 0.8 if f.action >= ACTION_THROTTLE else 0.5
    for a in range(f.action + 1, ACTION_BLOCK + 1):
        if low < route.threshold[a] < high:
            high = route.threshold[a]
    return low + (high - low) * (1 - 1 / f.strength) * 0.999 if f.strength > 1 else low


# -- the decision ------------------------------------------------------------------------------

cdef inline bint secret_place(const char *p, uint32_t n) noexcept nogil:
    """Does a value with this place hold a secret by its name? Its text is then kept out of events."""
    return (contains_nocase(p, n, b"passw", 5) or contains_nocase(p, n, b"pwd", 3)
            or contains_nocase(p, n, b"secret", 6) or contains_nocase(p, n, b"token", 5)
            or contains_nocase(p, n, b"authorization", 13) or contains_nocase(p, n, b"cookie", 6)
            or contains_nocase(p, n, b"api-key", 7) or contains_nocase(p, n, b"api_key", 7)
            or contains_nocase(p, n, b"apikey", 6) or contains_nocase(p, n, b"session", 7)
            or contains_nocase(p, n, b"credential", 10) or contains_nocase(p, n, b"card", 4))


cdef inline void add_reason(Decision *d, int reason, float value) noexcept nogil:
    if d.n_reasons < REASONS_MAX:
        d.reason[d.n_reasons] = <uint16_t>reason
        d.reason_value[d.n_reasons] = value
        d.n_reasons += 1


cdef inline bint look_at_client(Worker *w, const Request *r, const Shape *shape, ClientEntry *by_address,
                                ClientEntry *by_principal, const Decision *d, Finding *f) noexcept nogil:
    """Detectors on both entries, the row for the Isolation Forest from the principal's where there
    is one: an address may be an office. True where there is a row. Both entries are locked."""
    cdef RouteStats *route = &w.arena.routes[w.policy.route[d.route].slot]
    cdef ClientEntry *e
    cdef Finding fresh
    memset(&fresh, 0, sizeof(fresh))
    if by_address != NULL:
        detect(&w.policy, by_address, r.time_us, False, &fresh)
        hold(by_address, &w.policy, &fresh, r.time_us)
        if fresh.reason:
            found_too(f, &w.policy, &fresh)
    if by_principal != NULL:
        memset(&fresh, 0, sizeof(fresh))
        detect(&w.policy, by_principal, r.time_us, True, &fresh)
        hold(by_principal, &w.policy, &fresh, r.time_us)
        if fresh.reason and took_part(&w.policy, by_address, by_principal, r.client_key, fresh.kind, r.time_us):
            found_too(f, &w.policy, &fresh)
    e = by_principal if by_principal != NULL else by_address
    if e == NULL:
        return False
    entry_features(e, route, shape, r.time_us, w.behaviour)
    ewma(&route.rate_mean, &route.rate_var, w.behaviour[2], 0.001)
    ewma(&route.size_mean, &route.size_var, shape.size, 0.001)
    route.requests += 1
    return True


cdef inline ClientEntry *take_client(Worker *w, uint64_t key, int64_t t, uint32_t *slot, uint32_t *mine) noexcept nogil:
    cdef int how
    cdef ClientEntry *e = client_take(w.arena.buckets, w.arena.entries, w.arena.n_buckets, key, t,
                                      slot, mine, &how)
    if how:
        if how & 1:
            count(w, COUNT_CLIENTS_CLAIMED, 1)
        if how & 2:
            count(w, COUNT_CLIENTS_EVICTED, 1)
        if how & 4:
            count(w, COUNT_LOCKS_STOLEN, 1)
        if how & 8:
            count(w, COUNT_CLIENTS_CONTENDED, 1)
    if e == NULL:
        slot[0] = 0
    return e


cdef inline int action_of(const RoutePolicy *route, float score, int most) noexcept nogil:
    """The strongest action whose threshold the score reaches, up to most."""
    cdef int a = most
    while a > ACTION_ALLOW:
        if score >= route.threshold[a]:
            return a
        a -= 1
    return ACTION_ALLOW


cdef inline void worker_decide(Worker *w, Request *r, Decision *d) noexcept nogil:
    """From a request to a decision. Fills all of d."""
    cdef uint64_t start = or_now_ns(), now = start, deadline = <uint64_t>-1, text_until = <uint64_t>-1
    cdef const RoutePolicy *route
    cdef const BlockEntry *block
    cdef ModelSet *models
    cdef ClientEntry *by_address = NULL
    cdef ClientEntry *by_principal = NULL
    cdef uint32_t lock_address = 0, lock_principal = 0, todo, skip, shed = 0, bytes
    cdef Shape shape
    cdef Slice path
    cdef Finding f, claim
    cdef float unusual = 0, xgboost = NAN, forest = NAN
    cdef int at, action
    cdef bint allow_listed = False, is_held, is_cut = False, hurried, is_judged = False

    memset(d, 0, sizeof(Decision))
    memset(&f, 0, sizeof(f))
    memset(&claim, 0, sizeof(claim))
    d.raw_linear = d.raw_xgboost = d.raw_forest = d.raw_isolation = NAN
    d.id = or_add64(&w.arena.head.next_id, 1)
    d.time_us = r.time_us
    d.body_state = r.body_state
    w.has_behaviour = w.secret = 0
    w.unusual = NAN
    w.without_policy = not worker_refresh(w)
    if w.without_policy:
        finish(w, r, d, start, 0)                 # no policy yet: allowed, and counted
        return

    # 1. the route and who is asking
    d.route = pick_route(&w.policy, r.method, r.path, w.path, PATH_BYTES, &path)
    route = &w.policy.route[d.route]
    d.mode = route.mode
    d.budget_us = route.budget_us
    hurried = route.budget_us != 0 and not w.unhurried
    if hurried:
        deadline = start + route.budget_us * <uint64_t>1000
    if r.client_key == 0 and r.has_address:
        r.client_key = address_key(r.address, w.arena.key)
    if r.principal_key == 0 and w.policy.n_principals and not w.anonymous:
        r.principal_key = principal_of(r, &w.policy, w.arena.key, w.token)
    d.client_key = r.client_key
    d.principal_key = r.principal_key

    # 2. the lists: a hit ends here
    if w.policy.n_ranges and r.has_address:
        at = find_range(&w.policy, r.address)
        if at >= 0 and w.policy.range[at].action == ACTION_ALLOW:
            allow_listed = True
        elif at >= 0:
            d.action = w.policy.range[at].action
            d.score = 1
            add_reason(d, REASON_BLOCKED_RANGE, 0)
    if not allow_listed and d.action == 0 and or_load64(&w.arena.head.blocked_keys):
        block = block_hit(w.arena, r.client_key, BLOCK_CLIENT, r.time_us) if r.client_key else NULL
        if block == NULL and r.principal_key:
            block = block_hit(w.arena, r.principal_key, BLOCK_CLIENT, r.time_us)
        if block != NULL:
            d.action = block_action(block)
            d.score = 1
            add_reason(d, block.reason if block.reason else
                       REASON_BLOCKED_ADDRESS if block.key == r.client_key else REASON_BLOCKED_PRINCIPAL,
                       <float>(block.expires_us - r.time_us) * 1e-6)
    now = stage_done(w, d, STAGE_BLOCKLIST, start)
    if d.action == ACTION_ALLOW and route.exempt:
        add_reason(d, REASON_EXEMPT_ROUTE, 0)
    if d.action != ACTION_ALLOW or route.exempt:
        finish(w, r, d, start, 0)
        return

    # 3. the client's entries: windows of address and principal. Locked until the features are
    #    read, some hundred ns
    shape_of(r, path, route.login, &shape)
    d.path_hash = shape.path_hash
    d.spare = ((TICKET_LOGIN if shape.is_login else 0) | (TICKET_STRICT_LOGIN if shape.is_strict_login else 0)
               | (TICKET_OBJECT if shape.template_hash else 0))
    if r.client_key:
        by_address = take_client(w, r.client_key, r.time_us, &d.client_slot, &lock_address)
        if by_address != NULL:
            entry_request(by_address, &shape, r.time_us, r.principal_key)
    if r.principal_key and r.principal_key != r.client_key:
        by_principal = take_client(w, r.principal_key, r.time_us, &d.principal_slot, &lock_principal)
        if by_principal != NULL:
            entry_request(by_principal, &shape, r.time_us, 0)
            if r.client_key and shape.template_hash:
                party_object(by_principal, r.client_key)
    now = stage_done(w, d, STAGE_CLIENT, now)

    # 4. numeric side
    models = worker_models(w)
    if models == NULL:
        count(w, COUNT_NO_MODELS, 1)
    todo = 1 << STAGE_BEHAVIOUR
    if models != NULL and models.has_text:
        todo |= (1 << STAGE_TEXT) | (1 << STAGE_XGBOOST) | (1 << STAGE_FOREST)
    bytes = r.path.n + r.query.n + 64 * r.n_headers
    bytes += r.body.n if r.body.n < w.policy.text.body_bytes_max else w.policy.text.body_bytes_max
    skip = 0
    if hurried:
        if w.policy.shed:
            shed = shed_stages(w, route)
            if shed and is_small(w, route, bytes):
                shed = 0
            d.shed = shed & todo | (1 << STAGE_TEXT if shed & SHED_SHORT else 0)
        skip = todo & shed | plan_skips(w, todo & ~shed, now, deadline, bytes)
    is_held = by_address != NULL and held(by_address, &w.policy, r.time_us, &f)
    if (by_principal != NULL and held(by_principal, &w.policy, r.time_us, &claim)
            and took_part(&w.policy, by_address, by_principal, r.client_key, claim.kind, r.time_us)):
        found_too(&f, &w.policy, &claim)
        is_held = True
    if is_held:
        count(w, COUNT_HELD, 1)
    if not skip & (1 << STAGE_BEHAVIOUR):
        w.has_behaviour = look_at_client(w, r, &shape, by_address, by_principal, d, &f)
    if by_address != NULL:
        entry_unlock(by_address, lock_address)
    if by_principal != NULL:
        entry_unlock(by_principal, lock_principal)
    if not skip & (1 << STAGE_BEHAVIOUR):
        if w.has_behaviour and models != NULL and w.policy.detector[DETECT_UNUSUAL].enabled:
            d.raw_isolation = tree_predict(&models.isolation, w.behaviour, &w.trees)
            w.unusual = unusual = models_behaviour_score(models, d.raw_isolation)
        now = stage_done(w, d, STAGE_BEHAVIOUR, now)

    # 5. language side: the worst value, first by the linear kernel, then by the trees
    todo &= ~(<uint32_t>1 << STAGE_BEHAVIOUR)
    d.skipped = skip & (1 << STAGE_BEHAVIOUR)
    if todo and hurried:
        skip = todo & shed | plan_skips(w, todo & ~shed, now, deadline, bytes)
        d.skipped |= skip
    elif todo == 0:
        skip = 0
    if todo and not skip & (1 << STAGE_TEXT):
        if hurried:
            text_until = text_deadline(w, todo & ~skip, shed, route.budget_us, now, deadline)
        text_score(r, &models.text, &w.policy.text, &w.text, &w.found, text_until)
        d.raw_linear = w.found.linear
        now = stage_done(w, d, STAGE_TEXT, now)
        text_cost(w, <float>d.stage_ns[STAGE_TEXT] / <float>(bytes + 1), text_until, now)
        if w.found.cut:
            count(w, COUNT_TEXT_CUT, 1)
            is_cut = True
        if w.found.overrun:
            d.skipped |= 1 << STAGE_TEXT
        todo = (1 << STAGE_XGBOOST) | (1 << STAGE_FOREST)
        if hurried:
            if w.found.overrun:
                shed |= before_text(&w.policy)    # the text wanted their time, too
            skip = todo & shed | plan_skips(w, todo & ~shed, now, deadline, 0)
            d.skipped = (d.skipped & ~todo) | skip    # the text may have taken less than was feared
        if not skip & (1 << STAGE_XGBOOST):
            xgboost = tree_predict_text(&models.xgboost, w.found.linear, w.found.features, &w.trees)
            d.raw_xgboost = xgboost
            now = stage_done(w, d, STAGE_XGBOOST, now)
        if not skip & (1 << STAGE_FOREST):
            forest = tree_predict_text(&models.forest, w.found.linear, w.found.features, &w.trees)
            d.raw_forest = forest
            now = stage_done(w, d, STAGE_FOREST, now)
        d.score_text = models_text_score(models, w.found.linear, xgboost, forest)
        d.threat = w.found.threat
        d.place_n = w.found.place_n
        memcpy(d.place, w.found.place, PLACE_MAX)
        w.secret = secret_place(w.found.place, w.found.place_n)
        if not w.secret:
            d.excerpt_n = w.found.excerpt_n
            memcpy(d.excerpt, w.found.excerpt, EXCERPT_MAX)
        if w.found.login_key and by_address != NULL:
            # a name tried at a login counts for the address; one lost under contention is no harm
            sketch_add(&by_address.sketch[SKETCH_IDENTITIES], w.found.login_key)
    worker_models_done(w)

    # 6. either side may flag
    action = action_of(route, d.score_text, ACTION_BLOCK)
    if action == ACTION_THROTTLE:
        action = ACTION_TAG                       # slowing down doesn't make a text harmless
    if action > ACTION_ALLOW:
        add_reason(d, d.threat if d.threat else REASON_SUSPICIOUS_TEXT, d.score_text)
    d.action = <uint8_t>action
    if action == ACTION_BLOCK and by_address != NULL and entry_lock(by_address, &lock_address):
        # by address only: a principal is a claim that anyone can make
        if or_load64(key_place(w.arena, d.client_slot)) == d.client_key:
            entry_attack(by_address, r.time_us, shape.path_hash)
        entry_unlock(by_address, lock_address)
    if f.reason:
        d.score_behaviour = finding_score(route, &f)
        add_reason(d, f.reason, f.value)
        if f.action > d.action:
            d.action = f.action
    action = action_of(route, unusual, w.policy.detector[DETECT_UNUSUAL].action)
    if action > ACTION_ALLOW:
        add_reason(d, REASON_UNUSUAL_BEHAVIOUR, unusual)
        if action > d.action:
            d.action = <uint8_t>action
    # what the forest alone may not ask for, its score must not suggest
    if action == w.policy.detector[DETECT_UNUSUAL].action and action < ACTION_BLOCK:
        for at in range(action + 1, ACTION_BLOCK + 1):
            if unusual >= route.threshold[at]:
                unusual = route.threshold[at] - 0.001
                break
    if unusual > d.score_behaviour:
        d.score_behaviour = unusual
    d.score = d.score_text if d.score_text >= d.score_behaviour else d.score_behaviour
    # a text that a judge has found out: only one that looks like something, so that nobody can have what everybody
    # sends put on the list
    if (not allow_listed and or_load64(&w.arena.head.blocked_payloads) and d.score_text >= route.payload_floor
            and d.raw_linear == d.raw_linear):
        block = block_hit(w.arena, payload_key(&w.text.worst, w.arena.key), BLOCK_PAYLOAD, r.time_us)
        if block != NULL:
            is_judged = True
            d.score = 1
            if block_action(block) > d.action:
                d.action = block_action(block)
            add_reason(d, block.reason if block.reason else REASON_BLOCKED_PAYLOAD,
                       <float>(block.expires_us - r.time_us) * 1e-6)
    if allow_listed and d.action > ACTION_TAG:
        d.action = ACTION_TAG
        add_reason(d, REASON_ALLOW_LISTED, 0)
    if r.body_state == BODY_PART:
        count(w, COUNT_BODY_PART, 1)
        add_reason(d, REASON_BODY_PART, <float>r.body_bytes)
    if is_cut:
        add_reason(d, REASON_TEXT_CUT, w.found.n_values)
    if r.headers_dropped:
        count(w, COUNT_HEADERS_DROPPED, 1)
    # neither clearly one thing nor the other: for the judge
    if not allow_listed and not is_judged:
        d.escalate = <uint8_t>to_escalate(w, route, d)
        if d.escalate and not may_escalate(w, d):
            d.escalate = ESCALATED_NOT
            count(w, COUNT_ESCALATIONS_LIMITED, 1)
    finish(w, r, d, start, now)


cdef inline void worker_respond(Worker *w, const Decision *d, int status, int64_t response_us,
                                int64_t time_us) noexcept nogil:
    """The response half, once per request that was let through. response_us < 0: not known."""
    cdef ClientEntry *e
    cdef uint32_t slot, mine
    cdef int i
    cdef uint64_t key
    cdef float ms = <float>response_us * 0.001 if response_us >= 0 else -1.0
    count(w, COUNT_RESPONSES, 1)
    for i in range(2):
        slot = d.client_slot if i == 0 else d.principal_slot
        key = d.client_key if i == 0 else d.principal_key
        if slot == 0 or slot > w.arena.n_clients:
            continue
        e = &w.arena.entries[slot - 1]
        if not entry_lock(e, &mine):
            count(w, COUNT_CLIENTS_CONTENDED, 1)
            continue
        if or_load64(key_place(w.arena, slot)) == key:
            if d.spare & TICKET_LOGIN and not d.spare & TICKET_STRICT_LOGIN and status >= 400:
                entry_add(e, Q_LOGINS, 1)         # "auth", "token": only failures make it a login
            entry_response(e, time_us, status, d.spare & TICKET_LOGIN, d.spare & TICKET_OBJECT, ms)
            if i == 1 and d.client_key:
                party_answer(e, d.client_key, status, d.spare & TICKET_LOGIN)
        entry_unlock(e, mine)
