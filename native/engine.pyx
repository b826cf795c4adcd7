"""The core's Python host: the arena as an object, models that can be swapped, and Engine,
which decides. Used by the sidecar, by training, by replay and by the tests."""
import os
import secrets
import threading

cimport cython
from libc.math cimport isnan
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from native.arena cimport *
from native.base cimport *
from native.clients cimport *
from native.engine cimport *
from native.identity cimport address_key
from native.models cimport ModelSet, modelset_close, modelset_open
from native.policy cimport *
from native.reasons cimport or_reason_name
from native.extproc_pool cimport Answer, BodyPlan, ExtProcHost
from native.text cimport TEXT_FEATURES, text_name_hash
from native.windows cimport *

import numpy as np

ACTIONS = ("allow", "tag", "throttle", "challenge", "block")
MODES = ("observe", "enforce")
STAGES_NAMES = ("blocklist", "client", "behaviour", "text", "xgboost", "random_forest")
BODY_STATES = ("none", "whole", "part")
HISTOGRAM_BOUNDS_US = tuple(or_bounds_ns[i] / 1000 for i in range(HISTOGRAM_BUCKETS - 1))
COUNTER_NAMES = {
    "requests": COUNT_REQUESTS, "responses": COUNT_RESPONSES,
    **{f"action_{name}": COUNT_ACTION + i for i, name in enumerate(ACTIONS)},
    **{f"enforced_{name}": COUNT_ENFORCED + i for i, name in enumerate(ACTIONS)},
    **{f"skipped_{name}": COUNT_SKIPPED + i for i, name in enumerate(STAGES_NAMES)},
    "budget_overruns": COUNT_OVERRUNS, "events": COUNT_EVENTS, "events_dropped": COUNT_EVENTS_DROPPED,
    "clients_claimed": COUNT_CLIENTS_CLAIMED, "clients_evicted": COUNT_CLIENTS_EVICTED,
    "clients_contended": COUNT_CLIENTS_CONTENDED, "bodies_in_part": COUNT_BODY_PART,
    "texts_cut": COUNT_TEXT_CUT, "headers_dropped": COUNT_HEADERS_DROPPED, "no_models": COUNT_NO_MODELS,
    "locks_stolen": COUNT_LOCKS_STOLEN,
}
# one name per column of entry_features() in windows.pxd, in its order
BEHAVIOUR_FEATURE_NAMES = (
    "requests_1s", "requests_10s", "requests_60s", "requests_600s", "requests_3600s",
    "burst_10s_in_60s", "burst_60s_in_600s", "rate_against_own_history", "rate_against_route",
    "gap_mean", "gap_deviation", "missing_share_60s", "missing_share_600s", "denied_share", "error_share",
    "logins", "login_failures", "login_failure_share", "login_share", "write_share",
    "paths", "path_share", "objects", "object_share", "object_steps", "identities", "agents", "agent_changes",
    "payload_size", "payload_against_route", "response_time", "age")
CLIENT_ENTRY_BYTES = sizeof(ClientEntry) + sizeof(Bucket) // BUCKET_WAYS
LIMITS = {"clients": CLIENTS_LIMIT, "events": EVENTS_LIMIT, "blocklist": BLOCKLIST_LIMIT, "routes": ROUTES_MAX - 1,
          "ranges": RANGES_MAX, "principals": PRINCIPALS_MAX, "path": ROUTE_PATH_MAX, "answer": 1024}


class ArenaError(Exception):
    """The arena file cannot be used; the text says why and what to do."""


class ModelError(Exception):
    """A runtime folder was refused; the models in use were kept."""


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
    cdef Arena arena
    cdef readonly str path
    cdef uint64_t stuck_at
    cdef double stuck_since
    cdef readonly uint64_t events_given_up

    def __cinit__(self):
        memset(&self.arena, 0, sizeof(Arena))

    @staticmethod
    def create(path, clients=65536, events=4096, blocklist=65536, counter_slots=16, key=None):
        """Make a new arena file (replacing whatever stands at the path in one step) and map it.

        clients, events and blocklist are rounded up to powers of two. key: 16 bytes for the keyed
        hashes of addresses and principals, random where None. Raises ArenaError."""
        cdef ArenaHeader header
        cdef uint64_t total
        cdef bytes k = secrets.token_bytes(16) if key is None else bytes(key)
        for name, value, most in (("clients", clients, CLIENTS_LIMIT), ("events", events, EVENTS_LIMIT),
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
        fresh = f"{path}.{os.getpid()}.new"
        try:
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArenaError(f"{path}: cannot create: {error.strerror}") from error
        try:
            os.ftruncate(fd, total)
            os.pwrite(fd, (<char *>&header)[:sizeof(header)], 0)
            self = ArenaFile._map(fresh, path)
            events_init(&(<ArenaFile>self).arena)
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
        """What it was created with: clients, events, blocklist, counter_slots."""
        cdef ArenaHeader *h = self.arena.head
        return {"clients": h.clients, "events": h.events, "blocklist": h.blocklist, "counter_slots": h.counter_slots}

    @property
    def policy_generation(self):
        return or_load64(&self.arena.head.policy_generation)

    def set_key(self, key):
        """Replace the hash key (16 bytes): what is known of clients is lost with it."""
        cdef bytes k = bytes(key)
        if len(k) != 16:
            raise ArenaError(f"the hash key has {len(k)} bytes, 16 are needed")
        memcpy(self.arena.head.key, <const char *>k, 16)

    @property
    def key(self):
        return (<char *>self.arena.head.key)[:16]

    # -- policy --------------------------------------------------------------------------------

    def write_policy(self, dict spec):
        """Publish a policy (made by sidecar.policy.compile_policy) to all who have the arena open.

        spec's keys and limits are those of native/policy.pxd; raises ValueError beyond them."""
        cdef uint64_t g = self.arena.head.policy_generation + 1
        cdef Policy *p = &self.arena.policy[g & 1]
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
        p.retry_after_s = spec["retry_after_s"]
        p.hold_us = spec["hold_us"]
        p.allow_sample = spec["allow_sample"]
        p.address_header_n = <uint8_t>put(p.address_header, NAME_MAX, spec["address_header"], "client.address_header")
        p.block_type_n = put(p.block_type, 64, spec["block_type"], "answers.block.content_type")
        p.block_body_n = put(p.block_body, 1024, spec["block_body"], "answers.block.body")
        for i, stage in enumerate(spec["skip"][:6]):
            p.skip[i] = STAGES_NAMES.index(stage)
        p.n_skip = min(len(spec["skip"]), 6)
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
            p.route[i].path_n = put(p.route[i].path, ROUTE_PATH_MAX, route["path"], "routes.path")
        p.n_routes = len(spec["routes"])
        for i, (low, high, action) in enumerate(spec["ranges"]):
            memcpy(p.range[i].low, <const char *><bytes>low, 16)
            memcpy(p.range[i].high, <const char *><bytes>high, 16)
            p.range[i].action = action
        p.n_ranges = len(spec["ranges"])
        p.generation = g
        or_store64(&self.arena.head.policy_generation, g)

    # -- blocklist -----------------------------------------------------------------------------

    def client_key(self, client):
        """The key under which a client's address (or any other name) is known here."""
        return key_of_client(&self.arena, client)

    def block(self, uint64_t key, double seconds, action="block", reason=48):
        """Refuse the client with this key for so long. Raises ArenaError when there is no room."""
        cdef int64_t now = or_unix_us()
        if block_put(&self.arena, key, now + <int64_t>(seconds * 1e6), ACTIONS.index(action), reason, now) != 0:
            raise ArenaError("the blocklist is full around this key (raise arena.blocklist)")

    def unblock(self, uint64_t key):
        return block_drop(&self.arena, key)

    # -- what happened -------------------------------------------------------------------------

    def counters(self):
        """Totals over all workers since the arena was created, by name."""
        cdef uint32_t s
        cdef int c
        out = {}
        for name, number in COUNTER_NAMES.items():
            c = number
            total = 0
            for s in range(self.arena.head.counter_slots):
                total += self.arena.counters[s].value[c]
            out[name] = total
        return out

    def histograms(self):
        """Latency counts per stage and "total": lists with one count per bucket, the last without bound."""
        cdef uint32_t s
        cdef int i, b
        out = {}
        for i, name in enumerate((*STAGES_NAMES, "total")):
            counts = [0] * HISTOGRAM_BUCKETS
            for s in range(self.arena.head.counter_slots):
                for b in range(HISTOGRAM_BUCKETS):
                    counts[b] += self.arena.counters[s].histogram[i][b]
            out[name] = counts
        return out

    def route_actions(self):
        """List per route (policy order) of five totals by action."""
        cdef uint32_t s
        cdef int r, a
        out = []
        for r in range(max(self.arena.policy[self.arena.head.policy_generation & 1].n_routes, 1)):
            row = [0] * 5
            for s in range(self.arena.head.counter_slots):
                for a in range(5):
                    row[a] += self.arena.counters[s].route_action[r][a]
            out.append(row)
        return out

    def known_clients(self):
        """How many entries of the client table are in use (walks the table)."""
        cdef uint64_t i, n = 0
        cdef int k
        with nogil:
            for i in range(self.arena.head.buckets):
                for k in range(BUCKET_WAYS):
                    if self.arena.buckets[i].key[k]:
                        n += 1
        return n

    def knows(self, client):
        """Requests counted for this client, 0 where it has no entry."""
        cdef uint32_t slot
        cdef ClientEntry *e = client_find(self.arena.buckets, self.arena.entries, self.arena.head.buckets,
                                          key_of_client(&self.arena, client), &slot)
        return 0 if e == NULL else e.requests

    def drain(self, int most=1024):
        """Up to `most` events out of the ring, oldest first, as decision records (dicts)."""
        cdef Event *e
        cdef uint64_t tail
        out = []
        while len(out) < most:
            e = event_peek(&self.arena)
            if e == NULL:
                tail = self.arena.head.event_tail
                if or_load64(&self.arena.head.event_head) == tail:
                    break
                # claimed and never written: its writer died. Give it 200 ms, then go past it
                now = or_now_ns() / 1e9
                if self.stuck_at != tail + 1:
                    self.stuck_at = tail + 1
                    self.stuck_since = now
                    break
                if now - self.stuck_since < 0.2:
                    break
                self.events_given_up += 1
                event_release(&self.arena)
                continue
            out.append(record_of_event(e))
            event_release(&self.arena)
        return out


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
        return address_key(address, arena.head.key)
    name = as_bytes(client)
    return siphash24(name, len(name), arena.head.key[0], arena.head.key[1]) | 1


cdef str text_of(const char *p, uint32_t n):
    return p[:n].decode("utf-8", "backslashreplace")


cdef object number_of(float x):
    return None if isnan(x) else round(x, 6)


cdef dict record_of_decision(const Decision *d):
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
        "route": d.route, "budget_us": d.budget_us or None, "spent_us": round(d.spent_ns / 1000, 1),
        "stages_us": {STAGES_NAMES[i]: round(d.stage_ns[i] / 1000, 1) for i in range(STAGES) if d.stage_ns[i]},
        "skipped": [STAGES_NAMES[i] for i in range(STAGES) if d.skipped >> i & 1],
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
    record["method"] = text_of(e.method, e.method_n)
    record["path"] = text_of(e.path, e.path_n)
    record["authority"] = text_of(e.authority, e.authority_n)
    record["user_agent"] = text_of(e.agent, e.agent_n)
    return record


# -- models --------------------------------------------------------------------------------------

@cython.no_gc_clear              # __dealloc__ needs its attributes; without this, a cycle's collector clears them first
cdef class Models:
    """The model set that engines score with; can be swapped while they do."""
    cdef ModelSlot slot
    cdef list retired            # addresses of sets that may still be in use
    cdef object workers          # addresses of the registered workers
    cdef object lock
    cdef readonly str folder

    def __cinit__(self):
        self.slot.current = NULL
        self.retired = []
        self.workers = set()
        self.lock = threading.Lock()

    def load(self, folder):
        """Open a runtime folder and make it current. Raises ModelError, keeping the old, where it is
        refused. The old set is closed as soon as no engine scores with it."""
        cdef char err[1024]
        cdef bytes name = os.fsencode(folder)
        cdef const char *c_name = name
        cdef int ok
        cdef ModelSet *fresh = <ModelSet *>calloc(1, sizeof(ModelSet))
        if fresh == NULL:
            raise MemoryError
        with nogil:
            ok = modelset_open(c_name, fresh, err, 1024)
        if ok == 0 and fresh.isolation.predict != NULL and fresh.behaviour_features != BEHAVIOUR_FEATURES:
            modelset_close(fresh)
            free(fresh)
            raise ModelError(f"{folder}: behaviour rows of {fresh.behaviour_features} features, this build makes "
                             f"{BEHAVIOUR_FEATURES} (train the bundle again)")
        if ok != 0:
            free(fresh)
            raise ModelError(err.decode("utf-8", "replace"))
        with self.lock:
            old = <uintptr_t>self.slot.current
            or_store64(<uint64_t *>&self.slot.current, <uint64_t><uintptr_t>fresh)
            self.folder = str(folder)
            if old:
                self.retired.append(old)
            self._sweep()

    def _sweep(self):
        cdef uintptr_t address
        cdef bint busy
        or_fence_full()
        kept = []
        for address in self.retired:
            busy = False
            for worker in self.workers:
                if <uintptr_t>or_load64(<uint64_t *>&(<Worker *><uintptr_t>worker).in_use) == address:
                    busy = True
            if busy:
                kept.append(address)
            else:
                modelset_close(<ModelSet *>address)
                free(<void *>address)
        self.retired = kept

    @property
    def generation(self):
        return 0 if self.slot.current == NULL else self.slot.current.generation

    cdef void register(self, uintptr_t worker):
        with self.lock:
            self.workers.add(worker)

    cdef void forget(self, uintptr_t worker):
        with self.lock:
            self.workers.discard(worker)

    def __dealloc__(self):
        # engines hold a reference, so none is left
        if self.slot.current != NULL:
            modelset_close(self.slot.current)
            free(self.slot.current)
        for address in self.retired:
            modelset_close(<ModelSet *><uintptr_t>address)
            free(<void *><uintptr_t>address)


# -- decisions -----------------------------------------------------------------------------------

cdef class Verdict:
    """One decision, as a value. `record()` gives the decision record."""
    cdef Decision d
    cdef readonly object behaviour   # np.float32[BEHAVIOUR_FEATURES], only where asked for
    cdef readonly object text        # np.float32[TEXT_FEATURES], likewise

    @property
    def action(self):
        return ACTIONS[self.d.action]

    @property
    def enforced(self):
        return ACTIONS[self.d.enforced]

    @property
    def score(self):
        return self.d.score

    @property
    def place(self):
        return text_of(self.d.place, self.d.place_n)

    @property
    def reasons(self):
        return [or_reason_name(self.d.reason[i]).decode() for i in range(self.d.n_reasons)]

    @property
    def spent_us(self):
        return self.d.spent_ns / 1000

    @property
    def skipped(self):
        return [STAGES_NAMES[i] for i in range(STAGES) if self.d.skipped >> i & 1]

    def record(self):
        """The decision record (a new dict)."""
        return record_of_decision(&self.d)

    def __repr__(self):
        return f"<Verdict {self.action} {self.score:.3f} {self.reasons} {self.place!r}>"


@cython.no_gc_clear
cdef class Engine:
    """Decides. One per thread; engines share the arena and the models.

    keep_features: attach the feature rows to each Verdict (training, explanations). unhurried: skip no
    stage for lack of time, so that the same input gives the same output (training, replay)."""
    cdef Worker *worker
    cdef ExtProcHost host
    cdef readonly ArenaFile arena
    cdef readonly Models models
    cdef public bint keep_features
    cdef Header headers[128]

    def __cinit__(self, ArenaFile arena not None, Models models=None, bint keep_features=False,
                  bint unhurried=False):
        self.arena = arena
        self.models = Models() if models is None else models
        self.keep_features = keep_features
        self.worker = <Worker *>calloc(1, sizeof(Worker))
        if self.worker == NULL:
            raise MemoryError
        worker_init(self.worker, &arena.arena, &self.models.slot)
        self.worker.unhurried = unhurried
        self.models.register(<uintptr_t>self.worker)
        memset(&self.host, 0, sizeof(self.host))
        self.host.ctx = self.worker
        self.host.plan = host_plan
        self.host.decide = host_decide
        self.host.answer = host_answer
        self.host.respond = host_respond
        self.refresh_host()

    def __dealloc__(self):
        if self.worker != NULL:
            self.models.forget(<uintptr_t>self.worker)
            free(self.worker)

    def refresh_host(self):
        """Take trusted hops and address header over from the policy (after write_policy)."""
        worker_refresh(self.worker)
        self.host.trusted_hops = self.worker.policy.trusted_hops
        self.host.address_header.p = self.worker.policy.address_header
        self.host.address_header.n = self.worker.policy.address_header_n

    def host_address(self):
        """Address of the ExtProcHost that drives this engine (for native.extproc)."""
        return <uintptr_t>&self.host

    def load_models(self, folder):
        self.models.load(folder)

    def decide(self, method, url, headers=None, body=None, client=None, principal=None, ts=None,
               bint anonymous=False):
        """Decide on one request.

        method, url: str or bytes; url with its query, absolute or not. headers: list of (name, value)
        or a dict. body: bytes, str or None. client: an IP address or any other name; principal: any
        name. ts: unix seconds, None for now. anonymous: no principal is read from the headers, so that
        without a client the text alone is judged. Returns a Verdict."""
        cdef Request r
        cdef Verdict v = Verdict()
        cdef bytes m = as_bytes(method), u = as_bytes(url), b = None, name, value
        cdef int n = 0, at
        cdef float[::1] row
        memset(&r, 0, sizeof(Request))
        if b"://" in u[:12]:
            rest = u.split(b"://", 1)[1]
            slash = rest.find(b"/")
            authority = rest if slash < 0 else rest[:slash]
            u = b"/" if slash < 0 else rest[slash:]
            r.authority.p = authority
            r.authority.n = <uint32_t>len(authority)
        hash_at = u.find(b"#")
        if hash_at >= 0:
            u = u[:hash_at]
        r.method.p = m
        r.method.n = <uint32_t>len(m)
        at = u.find(b"?")
        r.path.p = u
        r.path.n = <uint32_t>(len(u) if at < 0 else at)
        if at >= 0:
            r.query.p = <const char *>u + at + 1
            r.query.n = <uint32_t>(len(u) - at - 1)
        keep = []
        if headers:
            for key, val in (headers.items() if isinstance(headers, dict) else headers):
                if n == HEADERS_MAX:
                    r.headers_dropped += 1
                    continue
                name = as_bytes(key).lower()
                value = as_bytes(val)
                keep.append((name, value))
                if name == b"host":
                    r.authority.p = value
                    r.authority.n = <uint32_t>len(value)
                    continue
                self.headers[n].name.p = name
                self.headers[n].name.n = <uint32_t>len(name)
                self.headers[n].value.p = value
                self.headers[n].value.n = <uint32_t>len(value)
                n += 1
        r.headers = self.headers
        r.n_headers = n
        if body is not None and len(body):
            b = as_bytes(body)
            r.body.p = b
            r.body.n = <uint32_t>len(b)
            r.body_bytes = len(b)
            r.body_state = BODY_WHOLE
        if client is not None:
            if parse_client(client, r.address):
                r.has_address = 1
            else:
                r.client_key = key_of_client(&self.arena.arena, client)
        if principal is not None:
            name = b"principal:" + as_bytes(principal)
            r.principal_key = siphash24(name, len(name), self.arena.arena.head.key[0],
                                        self.arena.arena.head.key[1]) | 1
        r.time_us = or_unix_us() if ts is None else <int64_t>(<double>ts * 1e6)
        self.worker.anonymous = anonymous
        with nogil:
            worker_decide(self.worker, &r, &v.d)
        self.worker.anonymous = False
        if self.keep_features:
            v.behaviour = np.empty(BEHAVIOUR_FEATURES, np.float32)
            row = v.behaviour
            memcpy(&row[0], self.worker.behaviour, BEHAVIOUR_FEATURES * sizeof(float))
            v.text = np.empty(TEXT_FEATURES, np.float32)
            row = v.text
            memcpy(&row[0], self.worker.found.features, TEXT_FEATURES * sizeof(float))
        return v

    def respond(self, Verdict verdict not None, int status, response_ms=None, ts=None):
        """The response half: status, time to answer in ms (None: not known), unix seconds (None: now)."""
        cdef int64_t us = -1 if response_ms is None else <int64_t>(<double>response_ms * 1000)
        cdef int64_t t = or_unix_us() if ts is None else <int64_t>(<double>ts * 1e6)
        worker_respond(self.worker, &verdict.d, status, us, t)

    def time_stages(self, list requests, int rounds, clients=1):
        """Bench only: decide `rounds` times on the given requests in turn, from `clients` addresses drawn at
        random, with nothing of Python in between. requests: (method, url, headers, body) as for decide(). Returns float32[rounds, STAGES + 1]: ns per stage and in all."""
        cdef int i, k, n = len(requests), at = 0
        cdef Request *prepared = <Request *>calloc(n, sizeof(Request))
        cdef Header *headers = <Header *>calloc(sum(len(r[2]) for r in requests) or 1, sizeof(Header))
        cdef Request *r
        cdef Decision d
        cdef uint32_t many = clients, who
        cdef float[:, ::1] out = np.zeros((rounds, STAGES + 1), np.float32)
        cdef bytes m, path, query, b, name, value
        cdef uint64_t x = 88172645463325252
        keep = []
        if prepared == NULL or headers == NULL:
            raise MemoryError
        for i in range(n):
            method, url, pairs, body = requests[i]
            r = &prepared[i]
            m = as_bytes(method)
            path, _, query = as_bytes(url).partition(b"?")
            b = as_bytes(body)
            keep.append((m, path, query, b))
            r.method.p, r.method.n = m, <uint32_t>len(m)
            r.path.p, r.path.n = path, <uint32_t>len(path)
            r.query.p, r.query.n = query, <uint32_t>len(query)
            r.body.p, r.body.n = b, <uint32_t>len(b)
            r.body_bytes = len(b)
            r.body_state = BODY_WHOLE if len(b) else BODY_NONE
            r.headers = &headers[at]
            for key, val in pairs:
                name = as_bytes(key).lower()
                value = as_bytes(val)
                keep.append((name, value))
                headers[at].name.p, headers[at].name.n = name, <uint32_t>len(name)
                headers[at].value.p, headers[at].value.n = value, <uint32_t>len(value)
                at += 1
            r.n_headers = <uint32_t>min(len(pairs), HEADERS_MAX)
            r.has_address = 1
            r.address[10] = r.address[11] = 0xff
        with nogil:
            for i in range(rounds):
                x ^= x << 13
                x ^= x >> 7
                x ^= x << 17
                r = &prepared[i % n]
                who = 0x0a000000 + <uint32_t>(x % many)
                r.address[12] = <uint8_t>(who >> 24)
                r.address[13] = <uint8_t>(who >> 16)
                r.address[14] = <uint8_t>(who >> 8)
                r.address[15] = <uint8_t>who
                r.client_key = 0
                r.principal_key = 0
                r.time_us = or_unix_us()
                worker_decide(self.worker, r, &d)
                for k in range(STAGES):
                    out[i, k] = d.stage_ns[k]
                out[i, STAGES] = d.spent_ns
        free(prepared)
        free(headers)
        return np.asarray(out)


# -- the host of the ext_proc machine ------------------------------------------------------------

cdef void host_plan(void *ctx, Request *r, BodyPlan *plan) noexcept nogil:
    cdef Worker *w = <Worker *>ctx
    cdef const RoutePolicy *route
    if not worker_refresh(w):
        return
    route = &w.policy.route[find_route(&w.policy, r)]
    if not route.exempt:
        plan.mode = route.body_mode
        plan.limit_bytes = route.body_limit


cdef void host_decide(void *ctx, Request *r, Decision *d) noexcept nogil:
    if r.time_us == 0:
        r.time_us = or_unix_us()
    worker_decide(<Worker *>ctx, r, d)


cdef void host_answer(void *ctx, const Decision *d, Answer *a) noexcept nogil:
    cdef Worker *w = <Worker *>ctx
    a.status = w.policy.throttle_status if d.enforced == ACTION_THROTTLE else w.policy.block_status
    a.body.p = w.policy.block_body
    a.body.n = w.policy.block_body_n
    a.content_type.p = w.policy.block_type
    a.content_type.n = w.policy.block_type_n
    a.retry_after_s = d.retry_after_s


cdef void host_respond(void *ctx, const Decision *d, int status, uint64_t response_us) noexcept nogil:
    worker_respond(<Worker *>ctx, d, status, <int64_t>response_us, or_unix_us())
