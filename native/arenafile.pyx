"""The arena as an object of the Python host: create, open, write the policy, block, count, drain; and decisions as
records."""
import os
import secrets

from libc.math cimport isfinite, isnan
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from native.arena cimport *
from native.base cimport *
from native.clients cimport *
from native.identity cimport address_key
from native.policy cimport *
from native.reasons cimport or_reason_name
from native.ring cimport *
from native.shedding cimport *
from native.text cimport text_name_hash


ACTIONS = ("allow", "tag", "throttle", "challenge", "block")
MODES = ("observe", "enforce")
STAGES_NAMES = ("blocklist", "client", "behaviour", "text", "xgboost", "random_forest")
WHYS = ("", "uncertain", "novel", "sampled")
BLOCK_KINDS = ("client", "payload")
BODY_STATES = ("none", "whole", "part")
HISTOGRAM_BOUNDS_US = tuple(or_bounds_ns[i] / 1000.0 for i in range(HISTOGRAM_BUCKETS - 1))
# of a route's decisions: finer, and with all of the bounds above among them
LATENCY_BOUNDS_US = tuple(or_fine_bounds_ns[i] / 1000.0 for i in range(LATENCY_BUCKETS - 1))
COUNTER_NAMES = {
    "requests": COUNT_REQUESTS, "responses": COUNT_RESPONSES,
    **{f"action_{name}": COUNT_ACTION + i for i, name in enumerate(ACTIONS)},
    **{f"enforced_{name}": COUNT_ENFORCED + i for i, name in enumerate(ACTIONS)},
    **{f"skipped_{name}": COUNT_SKIPPED + i for i, name in enumerate(STAGES_NAMES)},
    "budget_overruns": COUNT_OVERRUNS, "events": COUNT_EVENTS, "events_dropped": COUNT_EVENTS_DROPPED,
    "clients_claimed": COUNT_CLIENTS_CLAIMED, "clients_evicted": COUNT_CLIENTS_EVICTED,
    "clients_contended": COUNT_CLIENTS_CONTENDED, "bodies_in_part": COUNT_BODY_PART,
    "texts_cut": COUNT_TEXT_CUT, "headers_dropped": COUNT_HEADERS_DROPPED, "no_models": COUNT_NO_MODELS,
    "locks_stolen": COUNT_LOCKS_STOLEN, "held": COUNT_HELD, "stages_shed": COUNT_SHED,
    "texts_in_part": COUNT_TEXT_PART, "unjudged_open": COUNT_UNJUDGED_OPEN,
    "unjudged_closed": COUNT_UNJUDGED_CLOSED, "proxies_attached": COUNT_ATTACHED,
    "escalated": COUNT_ESCALATED, "escalations_limited": COUNT_ESCALATIONS_LIMITED,
    "escalations_dropped": COUNT_ESCALATIONS_DROPPED,
}
# one name per column of entry_features() in windows.pxd, in its order
BEHAVIOUR_FEATURE_NAMES = (
    "requests_1s", "requests_10s", "requests_60s", "requests_600s", "requests_3600s",
    "burst_10s_in_60s", "burst_60s_in_600s", "rate_against_own_history", "rate_against_route",
    "gap_mean", "gap_deviation", "missing_share_60s", "missing_share_600s", "denied_share", "error_share",
    "logins", "login_failures", "login_failure_share", "login_share", "write_share",
    "paths", "path_share", "objects", "object_share", "object_steps", "identities", "agents", "agent_changes",
    "payload_size", "payload_against_route", "response_time", "age")
ESCALATE_TEXT_MAX = 4096
CLIENT_ENTRY_BYTES = sizeof(ClientEntry) + sizeof(Bucket) // BUCKET_WAYS
LIMITS = {"clients": CLIENTS_LIMIT, "events": EVENTS_LIMIT, "escalations": ESCALATIONS_LIMIT,
          "blocklist": BLOCKLIST_LIMIT, "routes": ROUTES_MAX - 1,
          "ranges": RANGES_MAX, "principals": PRINCIPALS_MAX, "path": ROUTE_PATH_MAX, "answer": 1024}


class ArenaError(Exception):
    """The arena file cannot be used; the text says why and what to do."""


cdef uint32_t next_power(uint64_t n):
    cdef uint64_t p = 1
    while p < n:
        p <<= 1
    return <uint32_t>p


cdef bytes as_bytes(object value):
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    return str(value).encode("utf-8", "surrogateescape")


cdef class ArenaFile:
    """The shared-memory file. Create it once (the sidecar), open it anywhere.

    Not to be closed while an Engine on it is in use; engines hold a reference."""
    def __cinit__(self):
        memset(&self.arena, 0, sizeof(Arena))

    @staticmethod
    def create(path, clients=65536, events=4096, blocklist=65536, counter_slots=16, key=None, reserve=False,
               mode=0o600, gid=None, escalations=256):
        """Make a new arena file (replacing whatever stands at the path in one step) and map it.

        clients, events, escalations and blocklist are rounded up to powers of two. key: 16 bytes for the keyed
        hashes of addresses and principals, random where None. reserve: take all of the memory now, so that a
        tmpfs that fills up later can't kill whoever touches a page for the first time. mode, gid: of the file; group
        None leaves that of the process. Raises ArenaError, and OSError where the group can't be given."""
        cdef ArenaHeader header
        cdef uint64_t total
        cdef bytes k = secrets.token_bytes(16) if key is None else bytes(key)
        for name, value, most in (("clients", clients, CLIENTS_LIMIT), ("events", events, EVENTS_LIMIT),
                                  ("escalations", escalations, ESCALATIONS_LIMIT),
                                  ("blocklist", blocklist, BLOCKLIST_LIMIT),
                                  ("counter_slots", counter_slots, COUNTER_SLOTS_LIMIT)):
            if not 1 <= value <= most:
                raise ArenaError(f"{name} is {value}, allowed are 1 to {most}")
        if len(k) != 16:
            raise ArenaError(f"the hash key has {len(k)} bytes, 16 are needed")
        memset(&header, 0, sizeof(header))
        header.buckets = next_power(max(clients // BUCKET_WAYS, 1))
        header.clients = header.buckets * BUCKET_WAYS
        header.events = next_power(max(events, 2))
        header.escalations = next_power(max(escalations, 2))
        header.blocklist = next_power(max(blocklist, BLOCK_PROBES))
        header.counter_slots = counter_slots
        memcpy(header.key, <const char *>k, 16)
        header.created_us = or_unix_us()
        total = arena_lay_out(&header)
        path = os.fspath(path)
        folder = os.path.dirname(path) or "."
        try:
            room = os.statvfs(folder)
        except OSError as error:
            raise ArenaError(f"{path}: cannot create: {error.strerror} (make the folder, or set arena.path)") from error
        if room.f_bavail * room.f_frsize < min(total, 16 << 20) or room.f_blocks * room.f_frsize < total:
            raise ArenaError(f"{path}: needs up to {total >> 20} MiB, {folder} has "
                             f"{(room.f_bavail * room.f_frsize) >> 20} MiB free of "
                             f"{(room.f_blocks * room.f_frsize) >> 20} MiB (lower arena.clients, or give the "
                             "volume more memory)")
        # not the pid alone: in a container every sidecar has the same, and one killed here left its file behind
        fresh = f"{path}.{os.getpid()}-{secrets.token_hex(4)}.new"
        try:
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArenaError(f"{path}: cannot create: {error.strerror}") from error
        try:
            os.ftruncate(fd, total)
            if reserve:
                try:
                    os.posix_fallocate(fd, 0, total)
                except OSError as error:
                    raise ArenaError(f"{path}: cannot reserve {total >> 20} MiB: {error.strerror} (lower "
                                     "arena.clients, or give the volume more memory)") from error
            os.pwrite(fd, (<char *>&header)[:sizeof(header)], 0)
            if gid is not None:
                os.fchown(fd, -1, gid)
            os.fchmod(fd, mode)                   # whatever the umask says
            self = ArenaFile._map(fresh, path)
            ring_init(&(<ArenaFile>self).arena.events)
            ring_init(&(<ArenaFile>self).arena.escalations)
            os.rename(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
        finally:
            os.close(fd)
        return self

    @staticmethod
    def open(path):
        """Map an existing arena. Raises ArenaError where it isn't one of this build."""
        return ArenaFile._map(os.fspath(path), os.fspath(path))

    @staticmethod
    def _map(file, path):
        cdef ArenaFile self = ArenaFile()
        cdef char err[256]
        cdef bytes name = os.fsencode(file)
        if arena_open(name, &self.arena, err, 256) != 0:
            raise ArenaError(f"{path}: {err.decode('utf-8', 'replace')} (stop whoever uses it and remove the "
                             "file; it holds only what can be learnt again)")
        self.path = path
        return self

    def __dealloc__(self):
        arena_close(&self.arena)

    @property
    def bytes(self):
        """Size of the file."""
        return self.arena.bytes

    @property
    def shape(self):
        """What it was created with: clients, events, escalations, blocklist, counter_slots."""
        cdef ArenaHeader *h = self.arena.head
        return {"clients": h.clients, "events": h.events, "escalations": h.escalations, "blocklist": h.blocklist,
                "counter_slots": h.counter_slots}

    @property
    def policy_generation(self):
        return or_load64(&self.arena.head.policy_generation)

    @property
    def key(self):
        return (<char *>self.arena.key)[:16]

    # -- policy --------------------------------------------------------------------------------

    def write_policy(self, dict spec):
        """Publish a policy (made by sidecar.policy.compile_policy) to all who have the arena open.

        spec's keys and limits are those of native/policy.pxd; raises ValueError beyond them. A route keeps its
        figures as long as its name is there, wherever it stands; what it has shed it tries again when its budget or
        the order of skipping is another."""
        cdef uint64_t g = self.arena.head.policy_generation + 1
        cdef Policy *p = &self.arena.policy[g & 1]
        cdef Policy *old = &self.arena.policy[(g - 1) & 1]
        cdef int i
        if (len(spec["routes"]) > ROUTES_MAX or len(spec["ranges"]) > RANGES_MAX
                or len(spec["principals"]) > PRINCIPALS_MAX):
            raise ValueError("too many routes, ranges or principals for the policy")
        memset(p, 0, sizeof(Policy))
        p.written_us = or_unix_us()
        p.fail_closed = spec["fail_closed"]
        p.trusted_hops = spec["trusted_hops"]
        p.block_status = spec["block_status"]
        p.throttle_status = spec["throttle_status"]
        p.tell_upstream = spec["tell_upstream"]
        p.tell_proxy = spec["tell_proxy"]
        p.retry_after_s = spec["retry_after_s"]
        p.hold_us = spec["hold_us"]
        p.allow_sample = spec["allow_sample"]
        p.escalate_client_ms = spec["escalate_client_ms"]
        p.escalate_all_us = spec["escalate_all_us"]
        p.escalate_text = spec["escalate_text"]
        p.address_header_n = <uint8_t>put(p.address_header, NAME_MAX, spec["address_header"], "client.address_header")
        p.block_type_n = put(p.block_type, 64, spec["block_type"], "answers.block.content_type")
        p.block_body_n = put(p.block_body, 1024, spec["block_body"], "answers.block.body")
        p.throttle_body_n = put(p.throttle_body, 1024, spec["throttle_body"], "answers.throttle.body")
        for i, stage in enumerate(spec["skip"][:6]):
            p.skip[i] = STAGES_NAMES.index(stage)
        p.n_skip = min(len(spec["skip"]), 6)
        p.shed = spec["shed"]
        p.shed_hold_ms = spec["shed_hold_ms"]
        for i, source in enumerate(spec["principals"]):
            p.principal[i].kind = source["kind"]
            p.principal[i].name_n = <uint8_t>put(p.principal[i].name, NAME_MAX, source["name"], "client.principal")
            p.principal[i].claim_n = <uint8_t>put(p.principal[i].claim, NAME_MAX, source.get("claim", ""),
                                                  "client.principal")
        p.n_principals = len(spec["principals"])
        for i, detector in enumerate(spec["detectors"][:DETECTORS]):
            p.detector[i].enabled = detector["enabled"]
            p.detector[i].action = detector["action"]
            p.detector[i].window = detector["window"]
            p.detector[i].count = detector["count"]
            p.detector[i].share = detector["share"]
        p.text.body_bytes_max = spec["text"]["body_bytes_max"]
        p.text.decode_rounds = spec["text"]["decode_rounds"]
        p.text.values_max = spec["text"]["values_max"]
        p.text.windows_max = spec["text"]["windows_max"]
        p.text.every_header = spec["text"]["every_header"]
        for i, header in enumerate(spec["text"]["headers"][:32]):
            name = as_bytes(header)
            p.text.header_hash[i] = text_name_hash(name, <uint32_t>len(name))
        p.text.n_headers = min(len(spec["text"]["headers"]), 32)
        for i, route in enumerate(spec["routes"]):
            p.route[i].kind = route["kind"]
            p.route[i].mode = route["mode"]
            p.route[i].exempt = route["exempt"]
            p.route[i].login = route["login"]
            p.route[i].body_mode = route["body_mode"]
            p.route[i].methods = route["methods"]
            p.route[i].body_limit = route["body_limit"]
            p.route[i].budget_us = route["budget_us"]
            for j in range(5):
                p.route[i].threshold[j] = route["threshold"][j]
            p.route[i].escalate_from, p.route[i].escalate_to = route["escalate_from"], route["escalate_to"]
            p.route[i].escalate_novel = route["escalate_novel"]
            p.route[i].escalate_sample = route["escalate_sample"]
            p.route[i].payload_floor = route["payload_floor"]
            p.route[i].path_n = put(p.route[i].path, ROUTE_PATH_MAX, route["path"], "routes.path")
            p.route[i].name_n = <uint8_t>put(p.route[i].name, NAME_MAX, route["name"], "routes.name")
        p.n_routes = len(spec["routes"])
        place_routes(&self.arena, p, old if g > 1 else NULL)
        for i, (low, high, action) in enumerate(spec["ranges"]):
            memcpy(p.range[i].low, <const char *><bytes>low, 16)
            memcpy(p.range[i].high, <const char *><bytes>high, 16)
            p.range[i].action = action
        p.n_ranges = len(spec["ranges"])
        p.generation = g
        or_store64(&self.arena.head.policy_generation, g)

    def publish_models(self, folder, generation):
        """Tell hosts that load models by themselves where the current runtime folder is."""
        cdef ModelsRegion *m = self.arena.models
        cdef bytes name = os.fsencode(folder)
        if len(name) >= MODEL_PATH_MAX:
            raise ValueError(f"{folder}: {len(name)} bytes, at most {MODEL_PATH_MAX - 1} are kept")
        or_store64(&m.generation, 0)              # readers wait while it is 0
        memset(m.path, 0, MODEL_PATH_MAX)
        memcpy(m.path, <const char *>name, len(name))
        or_store64(&m.generation, <uint64_t>generation)

    @property
    def published_models(self):
        """(folder, generation); generation 0: none yet."""
        return os.fsdecode(<bytes>self.arena.models.path), self.arena.models.generation

    # -- blocklist -----------------------------------------------------------------------------

    def client_key(self, client):
        """The key under which a client's address (or any other name) is known here."""
        return key_of_client(&self.arena, client)

    def block(self, uint64_t key, double seconds, action="block", reason=0, kind="client"):
        """Refuse the client, or with kind "payload" the text, with this key for so long; a key that is there already
        gets the new action and time. action: block, challenge or throttle. reason: a code of native/reasons.pxd, 0
        for the plain one. Raises ArenaError when there is no room, ValueError for what can't be."""
        cdef int64_t now = or_unix_us()
        if action not in ACTIONS[ACTION_THROTTLE:]:
            raise ValueError(f"action {action!r}: a blocklist refuses, by {', '.join(ACTIONS[ACTION_THROTTLE:])}")
        if kind not in BLOCK_KINDS:
            raise ValueError(f"kind {kind!r}: one of {', '.join(BLOCK_KINDS)}")
        if key == 0 or not 0 < seconds <= 1e9:
            raise ValueError(f"key {key} for {seconds} s: a key isn't 0, and the time more than 0 and at most 1e9")
        if block_put(&self.arena, key, BLOCK_KINDS.index(kind), now + <int64_t>(seconds * 1e6), ACTIONS.index(action),
                     reason, now) != 0:
            raise ArenaError("the blocklist is full around this key (raise arena.blocklist)")

    def unblock(self, uint64_t key):
        """True where the key was on the list, of whatever kind."""
        return block_drop(&self.arena, key)

    def blocked(self):
        """What is on the blocklist and hasn't expired, a list of dicts: key, kind, action, reason (code; 0 the plain
        one), remaining_s, hits. Walks the list."""
        cdef const BlockEntry *e
        cdef int64_t now = or_unix_us()
        cdef uint64_t key
        cdef uint32_t i
        out = []
        for i in range(self.arena.n_blocklist):
            e = &self.arena.blocklist[i]
            key = or_load64(&e.key)
            if key and e.expires_us > now:
                out.append({"key": key, "kind": BLOCK_KINDS[min(e.kind, BLOCK_PAYLOAD)],
                            "action": ACTIONS[block_action(e)], "reason": e.reason,
                            "remaining_s": (e.expires_us - now) / 1e6, "hits": e.hits})
        return out

    def sweep_blocked(self):
        """Drop what has expired, so that an empty list costs the requests nothing again. Returns how many."""
        cdef uint32_t n
        with nogil:
            n = block_sweep(&self.arena, or_unix_us())
        return n

    # -- what happened -------------------------------------------------------------------------

    def counters(self):
        """Totals over all workers since the arena was created, by name."""
        cdef uint32_t s
        cdef int c
        out = {}
        for name, number in COUNTER_NAMES.items():
            c = number
            total = 0
            for s in range(self.arena.n_slots):
                total += self.arena.counters[s].value[c]
            out[name] = total
        return out

    def histograms(self):
        """Latency counts per stage and "total", over all routes: lists with one count per bucket, the last without
        bound. See HISTOGRAM_BOUNDS_US."""
        cdef uint64_t counts[7][16]
        cdef const RouteCounters *c
        cdef uint64_t at
        cdef uint32_t s
        cdef int i, b
        memset(counts, 0, sizeof(counts))
        for s in range(self.arena.n_slots):
            for i in range(STAGES):
                for b in range(HISTOGRAM_BUCKETS):
                    counts[i][b] += self.arena.counters[s].stage[i][b]
            for b in range(HISTOGRAM_BUCKETS):
                counts[STAGES][b] += self.arena.counters[s].total[b]
        for at in range(<uint64_t>self.arena.n_slots * ROUTES_MAX):
            c = &self.arena.route_counters[at]
            for i in range(STAGES):
                for b in range(HISTOGRAM_BUCKETS):
                    counts[i][b] += c.stage[i][b]
            for b in range(LATENCY_BUCKETS):
                if c.latency[b]:
                    counts[STAGES][coarse_bucket(b)] += c.latency[b]
        return {name: [counts[i][b] for b in range(HISTOGRAM_BUCKETS)]
                for i, name in enumerate((*STAGES_NAMES, "total"))}

    def routes(self):
        """What the arena knows of each route of the current policy, in its order. A list of dicts:

        name, path, budget_us (0: none), requests, latency (counts by LATENCY_BOUNDS_US, the last without bound),
        decisions (the same by HISTOGRAM_BOUNDS_US), spent_s (sum), stages (name -> counts by HISTOGRAM_BOUNDS_US),
        actions (name -> count, as decided), skipped and shed (name -> count; skipped is for whatever reason),
        texts_in_part, overruns, shed_now (names, in the order in which they went; text_in_part: the text is cut
        short), shed_level (0 nothing; how far along that order), sheds and taken_back (how often)."""
        cdef RouteCounters sum_
        cdef uint64_t *total = <uint64_t *>&sum_
        cdef const uint64_t *one
        cdef const RoutePolicy *route
        cdef const RouteControl *control
        cdef Policy policy
        cdef uint32_t s, bits, level
        cdef int r, i, b, at
        out = []
        memcpy(&policy, &self.arena.policy[or_load64(&self.arena.head.policy_generation) & 1], sizeof(Policy))
        policy_bound(&policy)
        for r in range(policy.n_routes):
            route = &policy.route[r]
            control = &self.arena.control[route.slot]
            memset(total, 0, sizeof(RouteCounters))
            for s in range(self.arena.n_slots):
                one = <const uint64_t *>&self.arena.route_counters[<uint64_t>s * ROUTES_MAX + route.slot]
                for at in range(<int>(sizeof(RouteCounters) // 8)):
                    total[at] += one[at]
            level = 0
            if policy.shed and route.budget_us:
                level = min(shed_level(control), shed_levels(policy.skip, policy.n_skip))
            bits = shed_bits(policy.skip, policy.n_skip, level)
            latency = [sum_.latency[b] for b in range(LATENCY_BUCKETS)]
            out.append({
                "name": text_of(route.name, route.name_n), "path": text_of(route.path, route.path_n),
                "budget_us": route.budget_us, "requests": sum(latency), "latency": latency,
                "decisions": coarse(latency),
                "spent_s": sum_.spent_ns / 1e9,
                "stages": {name: [sum_.stage[i][b] for b in range(HISTOGRAM_BUCKETS)]
                           for i, name in enumerate(STAGES_NAMES)},
                "actions": {name: sum_.action[i] for i, name in enumerate(ACTIONS)},
                "skipped": {name: sum_.skipped[i] for i, name in enumerate(STAGES_NAMES)},
                "shed": {name: sum_.shed[i] for i, name in enumerate(STAGES_NAMES)},
                "texts_in_part": sum_.text_part, "overruns": sum_.overruns,
                "shed_now": names_of(policy.skip, policy.n_skip, bits), "shed_level": level,
                "sheds": control.shed, "taken_back": control.taken_back,
            })
        return out

    def note(self, int route, bint overran, int n, uint64_t now_ms):
        """Count n decisions on the route with this index as overran or not, all at one time, as workers do: for
        tests and for trying out what shedding would do. Returns how often its level changed. Not for a route that
        serves."""
        cdef Policy *p = &self.arena.policy[or_load64(&self.arena.head.policy_generation) & 1]
        cdef RouteControl *c
        cdef int _i, changes = 0
        if not 0 <= route < <int>min(p.n_routes, <uint32_t>ROUTES_MAX):
            raise ValueError(f"there is no route {route}")
        c = &self.arena.control[min(p.route[route].slot, <uint16_t>(ROUTES_MAX - 1))]
        with nogil:
            for _i in range(n):
                changes += shed_note(c, overran, now_ms, p.skip, p.n_skip, p.shed_hold_ms)
        return changes

    @property
    def created(self):
        """When the arena was made, unix seconds."""
        return self.arena.head.created_us / 1e6

    def known_clients(self):
        """How many entries of the client table are in use (walks the table)."""
        cdef uint64_t i, n = 0
        cdef int k
        with nogil:
            for i in range(self.arena.n_buckets):
                for k in range(BUCKET_WAYS):
                    if self.arena.buckets[i].key[k]:
                        n += 1
        return n

    def knows(self, client):
        """Requests counted for this client, 0 where it has no entry."""
        cdef uint32_t slot
        cdef ClientEntry *e = client_find(self.arena.buckets, self.arena.entries, self.arena.n_buckets,
                                          key_of_client(&self.arena, client), &slot)
        return 0 if e == NULL else e.requests

    @property
    def events_given_up(self):
        """Events lost because whoever wrote them ended before they were whole."""
        return self.events.given_up

    @property
    def escalations_given_up(self):
        """Escalations lost likewise."""
        return self.escalations.given_up

    def drain(self, int most=1024):
        """Up to `most` events out of the ring, oldest first, as decision records (dicts)."""
        cdef void *slot
        out = []
        while len(out) < most:
            slot = next_slot(&self.arena.events, &self.events)
            if slot == NULL:
                break
            out.append(record_of_event(<Event *>slot))
            ring_release(&self.arena.events)
        return out

    def drain_escalations(self, int most=64):
        """Up to `most` requests for the judge, oldest first. A list of dicts:

        id, ts (unix s), why (uncertain, novel, sampled), client (address as text, or None), client_key,
        principal_key, payload_key (0: none; the text is then none that a blocklist may name), method, path, query
        (as sent, at most 1 KiB together), authority, user_agent, route, place, threat, body_type, action, enforced,
        score, score_text, score_behaviour, unusual (None: not known), reasons (names), behaviour (features by name,
        empty where not known), text (bytes: the worst value, at most escalation.text of it, around the worst window),
        text_as_sent (False: unescaped or decoded), text_cut, secret (True: left out because of its place), excerpt
        (the worst window as the models read it). All of it is the client's choice but keys, scores and names."""
        cdef void *slot
        cdef Policy *policy = &self.arena.policy[or_load64(&self.arena.head.policy_generation) & 1]
        cdef uint32_t keep = min(policy.escalate_text, <uint32_t>ESCALATE_TEXT_MAX)
        cdef uint32_t rounds = min(policy.text.decode_rounds, <uint32_t>8)
        out = []
        while len(out) < most:
            slot = next_slot(&self.arena.escalations, &self.escalations)
            if slot == NULL:
                break
            out.append(escalation_of(<Escalation *>slot, keep, rounds))
            ring_release(&self.arena.escalations)
        return out


cdef void *next_slot(Ring *ring, RingReader *reader):
    """The oldest slot that is whole, or NULL where there is none yet."""
    cdef void *slot
    cdef uint64_t tail
    cdef double now
    while True:
        slot = ring_peek(ring)
        if slot != NULL:
            return slot
        tail = ring.tail[0]
        if or_load64(ring.head) == tail:
            return NULL
        # claimed and never written: its writer died. Give it 200 ms, then go past it
        now = or_now_ns() / 1e9
        if reader.stuck_at != tail + 1:
            reader.stuck_at = tail + 1
            reader.stuck_since = now
            return NULL
        if now - reader.stuck_since < 0.2:
            return NULL
        reader.given_up += 1
        ring_release(ring)


cdef int coarse_bucket(int fine):
    """The bucket of HISTOGRAM_BOUNDS_US in which this one of LATENCY_BOUNDS_US lies."""
    return bucket_of_ns(or_fine_bounds_ns[fine] if fine < LATENCY_BUCKETS - 1 else <uint64_t>-1)


def shed_step(uint64_t state, uint32_t requests, uint32_t overruns, uint64_t now_ms, uint32_t levels,
              uint32_t first_ms):
    """RouteControl.state after a window (native/shedding.pxd), for tests."""
    return shed_after(state, requests, overruns, now_ms, levels, first_ms)


cdef list names_of(const uint8_t *skip, uint32_t n_skip, uint32_t bits):
    """What shed_bits gave, by name, in the order of skipping."""
    out = [STAGES_NAMES[skip[i]] for i in range(n_skip) if skip[i] < STAGES and bits >> skip[i] & 1]
    return [*out, "text_in_part"] if bits & SHED_SHORT else out


def shed_at(order, int level):
    """(levels that an order of skipping has, names of what goes at this one): for tests."""
    cdef uint8_t skip[6]
    cdef uint32_t bits, n = 0
    for stage in order[:6]:
        skip[n] = STAGES_NAMES.index(stage)
        n += 1
    bits = shed_bits(skip, n, level)
    return shed_levels(skip, n), names_of(skip, n, bits)


def latency_bucket(uint64_t ns):
    """Index into a route's latency counts, for tests."""
    return or_fine_bucket(ns)


cdef list coarse(list latency):
    out = [0] * HISTOGRAM_BUCKETS
    for b, n in enumerate(latency):
        if n:
            out[coarse_bucket(b)] += n
    return out


cdef uint64_t take(uint64_t *p):
    """What stood there, leaving 0: nothing that others add meanwhile is lost."""
    cdef uint64_t n = or_load64(p)
    while not or_cas64(p, n, 0):
        n = or_load64(p)
    return n


cdef void retire(Arena *arena, int slot):
    """A route has gone: its slot is as new. Totals over all routes stay what they were."""
    cdef RouteCounters *c
    cdef uint32_t s
    cdef int i, b
    for s in range(arena.n_slots):
        c = &arena.route_counters[<uint64_t>s * ROUTES_MAX + slot]
        for i in range(STAGES):
            for b in range(HISTOGRAM_BUCKETS):
                or_add64(&arena.counters[s].stage[i][b], take(&c.stage[i][b]))
        for b in range(LATENCY_BUCKETS):
            or_add64(&arena.counters[s].total[coarse_bucket(b)], take(&c.latency[b]))
        memset(c, 0, sizeof(RouteCounters))
    memset(&arena.control[slot], 0, sizeof(RouteControl))
    memset(&arena.routes[slot], 0, sizeof(RouteStats))


cdef void place_routes(Arena *arena, Policy *p, const Policy *old):
    """Give each route of p the slot that its name has in old (NULL: none), the others free ones, emptied."""
    cdef int i, slot
    cdef bint same
    before = {}
    if old != NULL:
        for i in range(min(old.n_routes, <uint32_t>ROUTES_MAX)):
            before[<bytes>old.route[i].name[:min(old.route[i].name_n, <uint8_t>NAME_MAX)]] = i
    used = set()
    fresh = []
    for i in range(p.n_routes):
        was = before.pop(<bytes>p.route[i].name[:p.route[i].name_n], None)
        if was is None or old.route[<int>was].slot in used or old.route[<int>was].slot >= ROUTES_MAX:
            fresh.append(i)
            continue
        slot = p.route[i].slot = old.route[<int>was].slot
        used.add(slot)
        if p.route[i].budget_us != old.route[<int>was].budget_us:
            retire(arena, slot)                   # overruns of another budget say nothing about this one
        same = (p.n_skip == old.n_skip and memcmp(p.skip, old.skip, 6) == 0 and p.shed == old.shed
                and p.route[i].budget_us == old.route[<int>was].budget_us)
        if not same:
            or_store64(&arena.control[slot].window, 0)
            or_store64(&arena.control[slot].state, 0)
    free_ = [slot for slot in range(ROUTES_MAX) if slot not in used]
    for i, slot in zip(fresh, free_):
        p.route[i].slot = <uint16_t>slot
        retire(arena, slot)


cdef uint16_t put(char *to, int room, object value, str name) except? 65535:
    cdef bytes b = as_bytes(value)
    if len(b) > room:
        raise ValueError(f"{name}: {len(b)} bytes, at most {room} are kept")
    memcpy(to, <const char *>b, len(b))
    return <uint16_t>len(b)


cdef bint parse_client(object client, uint8_t *address) except -1:
    import ipaddress
    try:
        ip = ipaddress.ip_address(client)
    except ValueError:
        return False
    packed = ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed
    memcpy(address, <const char *><bytes>packed, 16)
    return True


cdef uint64_t key_of_client(const Arena *arena, object client) except? 0:
    cdef uint8_t address[16]
    cdef bytes name
    if parse_client(client, address):
        return address_key(address, arena.key)
    name = as_bytes(client)
    return siphash24(name, len(name), arena.key[0], arena.key[1]) | 1


cdef str text_of(const char *p, uint32_t n):
    return p[:n].decode("utf-8", "backslashreplace")


cdef object number_of(float x):
    return None if isnan(x) else round(x, 6)


cdef double share_of(float x):
    """A score out of memory that others can write."""
    return round(min(max(x, 0.0), 1.0), 6) if isfinite(x) else 0.0


cdef dict record_of_decision(const Decision *given):
    # a copy with its lengths bound: events lie in memory that others can write
    cdef Decision bound = given[0]
    cdef const Decision *d = &bound
    bound.n_reasons = min(bound.n_reasons, REASONS_MAX)
    bound.place_n = min(bound.place_n, PLACE_MAX)
    bound.excerpt_n = min(bound.excerpt_n, EXCERPT_MAX)
    bound.action = min(bound.action, ACTION_BLOCK)
    bound.enforced = min(bound.enforced, ACTION_BLOCK)
    bound.mode = min(bound.mode, MODE_ENFORCE)
    bound.body_state = min(bound.body_state, BODY_PART)
    bound.route = min(bound.route, ROUTES_MAX - 1)
    reasons = []
    for i in range(d.n_reasons):
        reasons.append({"code": d.reason[i], "name": or_reason_name(d.reason[i]).decode(),
                        "value": round(d.reason_value[i], 4)})
    return {
        "id": d.id, "ts": d.time_us / 1e6, "client": None, "action": ACTIONS[d.action],
        "enforced": ACTIONS[d.enforced], "mode": MODES[d.mode], "score": round(d.score, 4),
        "scores": {"text": round(d.score_text, 4), "behaviour": round(d.score_behaviour, 4)},
        "raw": {"linear": number_of(d.raw_linear), "xgboost": number_of(d.raw_xgboost),
                "random_forest": number_of(d.raw_forest), "isolation_forest": number_of(d.raw_isolation)},
        "reasons": reasons, "place": text_of(d.place, d.place_n), "excerpt": text_of(d.excerpt, d.excerpt_n),
        "route": d.route, "budget_us": d.budget_us or None, "spent_us": round(d.spent_ns / 1000.0, 1),
        "stages_us": {STAGES_NAMES[i]: round(d.stage_ns[i] / 1000.0, 1) for i in range(STAGES) if d.stage_ns[i]},
        "skipped": [STAGES_NAMES[i] for i in range(STAGES) if d.skipped >> i & 1],
        "shed": [STAGES_NAMES[i] for i in range(STAGES) if d.skipped & d.shed & (<uint32_t>1 << i)],
        "body": BODY_STATES[d.body_state], "escalated": bool(d.escalate),
        "client_key": f"{d.client_key:016x}" if d.client_key else None,
        "principal_key": f"{d.principal_key:016x}" if d.principal_key else None,
    }


cdef dict record_of_event(const Event *e):
    import ipaddress
    record = record_of_decision(&e.decision)
    if e.has_address:
        ip = ipaddress.IPv6Address((<const char *>e.address)[:16])
        record["client"] = str(ip.ipv4_mapped or ip)
    if e.route_n:
        record["route"] = text_of(e.route, min(e.route_n, NAME_MAX))
    record["method"] = text_of(e.method, min(e.method_n, 16))
    record["path"] = text_of(e.path, min(e.path_n, 256))
    record["authority"] = text_of(e.authority, min(e.authority_n, 64))
    record["user_agent"] = text_of(e.agent, min(e.agent_n, 128))
    return record


cdef dict escalation_of(const Escalation *e, uint32_t keep, uint32_t rounds):
    # lengths are read once and bound: the slot lies in memory that others can write
    from native.text import cut_around
    cdef uint32_t text_n = min(e.text_n, CHUNK_BYTES), target_n = min(e.target_n, TARGET_MAX), i
    cdef uint32_t path_n = min(<uint32_t>e.path_n, target_n)
    record = record_of_event(&e.event)
    text = e.text[:text_n]
    excerpt = e.event.decision.excerpt[:min(e.event.decision.excerpt_n, EXCERPT_MAX)]
    part, found = cut_around(text, excerpt, keep, rounds)
    return {
        "id": record["id"], "ts": record["ts"], "why": WHYS[e.why] if 0 < e.why < len(WHYS) else WHYS[1],
        "client": record["client"], "client_key": e.event.decision.client_key,
        "principal_key": e.event.decision.principal_key, "payload_key": e.payload_key,
        "method": record["method"], "path": text_of(e.target, path_n),
        "query": text_of(e.target + path_n + 1, target_n - path_n - 1) if target_n > path_n else "",
        "authority": record["authority"], "user_agent": record["user_agent"], "route": str(record["route"]),
        "place": record["place"], "threat": or_reason_name(e.event.decision.threat).decode(),
        "body_type": text_of(e.type, min(e.type_n, BODY_TYPE_MAX)),
        "action": record["action"], "enforced": record["enforced"], "score": share_of(e.event.decision.score),
        "score_text": share_of(e.event.decision.score_text),
        "score_behaviour": share_of(e.event.decision.score_behaviour),
        "unusual": share_of(e.unusual) if e.unusual == e.unusual else None,
        "reasons": [reason["name"] for reason in record["reasons"]],
        "behaviour": {name: e.behaviour[i] for i, name in enumerate(BEHAVIOUR_FEATURE_NAMES)
                      if isfinite(e.behaviour[i])} if e.has_behaviour else {},
        "text": part, "text_as_sent": bool(e.as_sent) and found, "text_cut": len(part) < text_n,
        "secret": bool(e.secret), "excerpt": record["excerpt"],
    }
