"""Python's hold on the native transport: a server of some threads, each with an engine of its own.

Python opens the listening socket, starts the threads (each spends its life in run(), without the
interpreter's lock) and steers them by a few words in memory.
"""
import os

cimport cython
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from native.base cimport or_load64, or_now_ns, or_store64
from native.extproc_pool cimport STREAM_MESSAGE_BYTES_MAX, ExtProcHost
from native.http2 cimport (Loop, conn_open, loop_close, loop_open, loop_run, loop_step, or_write_fd, take_parcels)
from native.nghttp2 cimport nghttp2_version
from native.rpc cimport PHASE_CLOSING, PHASE_DEAD, PHASE_EXPIRING, PHASE_RUNNING, Limits, Shared

THREADS_MAX = 64
PHASES = {"running": PHASE_RUNNING, "closing": PHASE_CLOSING, "expiring": PHASE_EXPIRING, "dead": PHASE_DEAD}


def library_version() -> str:
    """Of the libnghttp2 in use."""
    return nghttp2_version(0).version_str.decode()


@cython.no_gc_clear              # other threads work with its memory until run() has returned
cdef class Server:
    """A server of len(hosts) threads. Call run(i) once in a thread of its own for each.

    hosts: objects with host_address() (an ExtProcHost), one per thread, used by that thread only.
    listener: descriptor of a listening, non-blocking socket, which stays the caller's; -1 for none.
    Sizes in bytes, times in seconds; connections, streams: over all threads; memory: of unfinished
    messages and unsent answers, and as much again for kept headers and bodies, over all threads.
    Raises ValueError for limits out of range, MemoryError and OSError.
    """
    cdef Loop *loops
    cdef Shared shared
    cdef readonly int threads
    cdef object hosts
    cdef list pipes

    def __cinit__(self, hosts, int listener, *, uint32_t connections, uint32_t streams, uint32_t message_bytes,
                  uint32_t header_bytes=16384, uint64_t memory_bytes=256 << 20, double idle_s, double keepalive_s,
                  double keepalive_timeout_s):
        cdef Limits limits
        cdef int i
        self.hosts = list(hosts)
        self.threads = len(self.hosts)
        self.pipes = []
        if not 1 <= self.threads <= THREADS_MAX:
            raise ValueError(f"1 to {THREADS_MAX} threads")
        if not (connections and streams and 0 < message_bytes <= STREAM_MESSAGE_BYTES_MAX):
            raise ValueError("a limit is 0, or messages over 64 MiB")
        if min(idle_s, keepalive_s, keepalive_timeout_s) < 0.01:
            raise ValueError("times are at least 10 ms")
        limits.connections = connections
        limits.streams = streams
        limits.message_bytes = message_bytes
        limits.header_bytes = header_bytes
        # however many threads share it, each can hold a message or two of the largest size
        limits.memory_bytes = max(memory_bytes // self.threads, 2 * <uint64_t>message_bytes)
        limits.idle_ns = <uint64_t>(idle_s * 1e9)
        limits.keepalive_ns = <uint64_t>(keepalive_s * 1e9)
        limits.keepalive_timeout_ns = <uint64_t>(keepalive_timeout_s * 1e9)
        self.shared.serving = 1
        self.shared.phase = PHASE_RUNNING
        self.loops = <Loop *>calloc(self.threads, sizeof(Loop))
        if self.loops == NULL:
            raise MemoryError
        for i in range(self.threads):
            self.loops[i].epoll = -1
        for i in range(self.threads):
            wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self.pipes += [wake_in, wake_out]
            if not loop_open(&self.loops[i], <ExtProcHost *><uintptr_t>self.hosts[i].host_address(), &self.shared,
                             &limits, listener if i == 0 else -1, wake_in, wake_out, limits.memory_bytes):
                raise MemoryError("no memory or descriptors for a transport thread")
            self.loops[i].loops = self.loops
            self.loops[i].n_loops = self.threads

    def __dealloc__(self):
        cdef int i
        if self.loops != NULL:
            for i in range(self.threads):
                if self.loops[i].epoll >= 0:
                    take_parcels(&self.loops[i])      # sockets dealt to it and never looked at
                    loop_close(&self.loops[i])
            free(self.loops)
        if self.pipes is not None:
            for fd in self.pipes:
                os.close(fd)

    def run(self, int thread):
        """Serves until stop("dead"), or until the last connection has ended after stop("closing")."""
        if not 0 <= thread < self.threads:
            raise ValueError("no such thread")
        with nogil:
            loop_run(&self.loops[thread])

    def set_serving(self, bint serving):
        """What the health service says from now on."""
        or_store64(&self.shared.serving, 1 if serving else 0)
        self.wake()

    def stop(self, phase):
        """closing: nothing new, what is in progress may end; expiring: it is decided on what is known and
        ended well; dead: connections are cut. Never back."""
        if PHASES[phase] > or_load64(&self.shared.phase):
            or_store64(&self.shared.phase, <uint64_t>PHASES[phase])
            self.wake()

    cdef wake(self):
        cdef char nothing[5]
        cdef int i
        nothing[0] = nothing[1] = nothing[2] = nothing[3] = nothing[4] = 0
        for i in range(self.threads):
            or_write_fd(self.loops[i].wake_out, nothing, 5)

    def adopt(self, int fd, bint exact=False):
        """Serve this connected socket in thread 0, which isn't running: for tests, with step(). Takes it over.
        exact: whatever is read lies in memory of just that size, so that a sanitizer sees one byte too far."""
        self.loops[0].exact = exact
        self.loops[0].thread.now_ns = or_now_ns()
        self.loops[0].live += 1
        self.shared.connections += 1
        if not conn_open(&self.loops[0], fd):
            raise MemoryError

    def step(self, int timeout_ms=0):
        """One round of thread 0, here (for tests)."""
        cdef bint more
        with nogil:
            more = loop_step(&self.loops[0], timeout_ms)
        return more

    def stats(self):
        """Counters and gauges by name, over all threads."""
        cdef int i
        cdef Loop *loop
        out = {}
        for i in range(self.threads):
            loop = &self.loops[i]
            for name, value in (
                    ("connections_opened", loop.thread.counts.connections_opened),
                    ("connections_refused", loop.thread.counts.connections_refused),
                    ("connections_dropped", loop.thread.counts.connections_dropped),
                    ("streams_opened", loop.thread.counts.streams_opened),
                    ("streams_refused", loop.thread.counts.streams_refused),
                    ("streams_idle_closed", loop.thread.counts.streams_idle_closed),
                    ("streams_dropped", loop.thread.counts.streams_dropped),
                    ("protocol_errors", loop.thread.counts.protocol_errors),
                    ("internal_errors", loop.thread.counts.internal_errors),
                    ("messages", loop.thread.counts.messages),
                    ("headers_dropped", loop.thread.pool.counts.headers_dropped),
                    ("bodies_cut", loop.thread.pool.counts.bodies_cut),
                    ("late_decisions", loop.thread.pool.counts.late_decisions),
                    ("no_buffer", loop.thread.pool.counts.no_buffer),
                    ("memory_bytes", loop.thread.memory_bytes),
                    ("buffer_bytes", loop.thread.pool.buffer_bytes)):
                out[name] = out.get(name, 0) + value
        out["connections"] = or_load64(&self.shared.connections)
        out["streams"] = or_load64(&self.shared.streams)
        out["watchers"] = or_load64(&self.shared.watchers)
        return out
