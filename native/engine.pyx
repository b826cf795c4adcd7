"""Models that can be swapped, and Engine, which decides: the core's Python host. Used by the sidecar, by training, by
replay and by the tests."""
import os
import re
import threading

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport geteuid

from native.arena cimport *
from native.arenafile cimport ArenaFile, as_bytes, key_of_client, parse_client, record_of_decision, text_of
from native.base cimport *
from native.clients cimport *
from native.engine cimport *
from native.extproc_pool cimport BodyPlan, ExtProcHost
from native.host cimport host_init, host_plan, host_refresh, models_fit
from native.models cimport ModelSet, modelset_close, modelset_open
from native.policy cimport *
from native.reasons cimport or_reason_name
from native.shedding cimport *
from native.text cimport TEXT_FEATURES
from native.windows cimport *

import numpy as np

from native.arenafile import (
    ACTIONS, BEHAVIOUR_FEATURE_NAMES, BODY_STATES, CLIENT_ENTRY_BYTES, COUNTER_NAMES, HISTOGRAM_BOUNDS_US,
    LATENCY_BOUNDS_US, LIMITS, MODES, STAGES_NAMES, ArenaError)

__all__ = [
    "ACTIONS", "BEHAVIOUR_FEATURE_NAMES", "BODY_STATES", "CLIENT_ENTRY_BYTES", "COUNTER_NAMES", "HISTOGRAM_BOUNDS_US",
    "LATENCY_BOUNDS_US", "LIMITS", "MODES", "STAGES_NAMES", "ArenaError", "Engine", "ModelError", "Models", "Verdict"]

ABSOLUTE_URL = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")


class ModelError(Exception):
    """A runtime folder was refused; the models in use were kept."""


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
            ok = modelset_open(c_name, geteuid(), fresh, err, 1024)
        if ok == 0 and not models_fit(fresh):
            has = f"{fresh.behaviour_features} features of schema {fresh.behaviour_schema}"
            modelset_close(fresh)
            free(fresh)
            raise ModelError(f"{folder}: behaviour rows of {has}, this build makes {BEHAVIOUR_FEATURES} of schema "
                             f"{BEHAVIOUR_SCHEMA} (train the bundle again)")
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
        return self.d.spent_ns / 1000.0              # C integers are divided as in C

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
        host_init(&self.host, self.worker)
        host_refresh(&self.host)

    def __dealloc__(self):
        if self.worker != NULL:
            self.models.forget(<uintptr_t>self.worker)
            free(self.worker)

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
        cdef BodyPlan plan
        cdef float[::1] row
        memset(&r, 0, sizeof(Request))
        absolute = ABSOLUTE_URL.match(u)
        if absolute:
            authority = absolute[1]
            u = u[absolute.end():]
            if not u.startswith(b"/"):
                u = b"/" + u
            r.authority.p = authority
            r.authority.n = <uint32_t>len(authority)
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
            # what a proxy would have been asked for: nothing, or so much of it
            memset(&plan, 0, sizeof(plan))
            host_plan(self.worker, &r, &plan)
            r.body_bytes = len(b)
            if plan.mode != ROUTE_BODY_NONE and plan.limit_bytes:
                r.body.p = b
                r.body.n = <uint32_t>min(len(b), plan.limit_bytes)
                r.body_state = BODY_WHOLE if r.body.n == len(b) else BODY_PART
        if client is not None:
            if parse_client(client, r.address):
                r.has_address = 1
            else:
                r.client_key = key_of_client(&self.arena.arena, client)
        if principal is not None:
            name = b"principal:" + as_bytes(principal)
            r.principal_key = siphash24(name, len(name), self.arena.arena.key[0],
                                        self.arena.arena.key[1]) | 1
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
        random, with nothing of Python in between. requests: (method, url, headers, body) as for decide().
        Returns float32[rounds, STAGES + 1]: ns per stage and in all."""
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
