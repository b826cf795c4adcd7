/* What the core's plugin host needs of the system: memory of its own for each thread, one watching thread per site, and
 * a mapped file that may shrink. Included by core.pyx only. */
#ifndef OUTRIDER_SYSTEM_H
#define OUTRIDER_SYSTEM_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "outrider.h"

#define OR_SITES_MAX 16
#define OR_GUARDS_MAX 64

/* ---- per thread ---------------------------------------------------------------------------------------------- */

static __thread void *or_threads[OR_SITES_MAX];

static inline void *or_thread_get(uint32_t site) { return or_threads[site]; }
static inline void or_thread_set(uint32_t site, void *thread) { or_threads[site] = thread; }

/* ---- the watcher --------------------------------------------------------------------------------------------- */

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t told;
    pthread_t thread;
    int running, stop;
    void (*tick)(void *);
    void *arg;
    unsigned every_ms;
} or_watcher;

static void *or_watch(void *arg) {
    or_watcher *w = arg;
    struct timespec until;
    pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        pthread_mutex_unlock(&w->lock);
        w->tick(w->arg);
        pthread_mutex_lock(&w->lock);
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += (long)(w->every_ms % 1000) * 1000000;
        until.tv_sec += w->every_ms / 1000 + until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        while (!w->stop && pthread_cond_timedwait(&w->told, &w->lock, &until) != ETIMEDOUT) { }
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* 0, or an errno. Signals are the proxy's: the thread takes none, but for those that its own faults raise. */
static int or_watcher_start(or_watcher *w, void (*tick)(void *), void *arg, unsigned every_ms) {
    pthread_condattr_t attr;
    sigset_t all, before;
    int rc;
    if (w->running) return 0;
    pthread_mutex_init(&w->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&w->told, &attr);
    pthread_condattr_destroy(&attr);
    w->stop = 0;
    w->tick = tick;
    w->arg = arg;
    w->every_ms = every_ms;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&w->thread, NULL, or_watch, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    w->running = rc == 0;
    return rc;
}

static void or_watcher_stop(or_watcher *w) {
    if (!w->running) return;
    pthread_mutex_lock(&w->lock);
    w->stop = 1;
    pthread_cond_signal(&w->told);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    w->running = 0;
}

/* ---- a file that shrinks ------------------------------------------------------------------------------------- */

/* Touching a page of a mapped file beyond the file's end raises SIGBUS, and the proxy would die of somebody's truncate.
 * So: the arena's mappings are listed here, and the handler puts anonymous zeroes in the place of the one that was
 * hit, marks it lost, and lets the access go on. What is read from then on is zeroes, which the core understands as
 * "no policy"; nothing that bounds an access is read from the mapping (see Arena in native/arena.pxd). Other faults go
 * to whoever handled them before. */
typedef struct {
    char *base;                       /* NULL: free */
    uint64_t bytes;
    int lost;
} or_guard;

static or_guard or_guards[OR_GUARDS_MAX];
static struct sigaction or_before;
static int or_guarding;
static pthread_mutex_t or_guards_lock = PTHREAD_MUTEX_INITIALIZER;

static void or_on_bus(int number, siginfo_t *info, void *context) {
    char *at = info->si_addr;
    int i, saved = errno;
    for (i = 0; i < OR_GUARDS_MAX; i++) {
        char *base = __atomic_load_n(&or_guards[i].base, __ATOMIC_ACQUIRE);
        if (base != NULL && at >= base && at < base + or_guards[i].bytes) {
            /* a plain system call: safe in a handler. Threads that come here at once do the same once more */
            if (mmap(base, or_guards[i].bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                     0) == MAP_FAILED)
                break;
            __atomic_store_n(&or_guards[i].lost, 1, __ATOMIC_RELEASE);
            errno = saved;
            return;
        }
    }
    errno = saved;
    if (or_before.sa_flags & SA_SIGINFO) {
        or_before.sa_sigaction(number, info, context);
    } else if (or_before.sa_handler != SIG_DFL && or_before.sa_handler != SIG_IGN) {
        or_before.sa_handler(number);
    } else {
        struct sigaction plain;
        memset(&plain, 0, sizeof plain);
        plain.sa_handler = SIG_DFL;
        sigaction(SIGBUS, &plain, NULL);  /* the access is made again, and the process ends as it would have */
    }
}

/* Index of the guard, or -1: none is free. */
static int or_guard_add(void *base, uint64_t bytes) {
    struct sigaction mine;
    int i;
    pthread_mutex_lock(&or_guards_lock);
    if (!or_guarding) {
        memset(&mine, 0, sizeof mine);
        mine.sa_sigaction = or_on_bus;
        mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&mine.sa_mask);
        or_guarding = sigaction(SIGBUS, &mine, &or_before) == 0;
    }
    for (i = 0; or_guarding && i < OR_GUARDS_MAX; i++)
        if (or_guards[i].base == NULL) {
            or_guards[i].bytes = bytes;
            or_guards[i].lost = 0;
            __atomic_store_n(&or_guards[i].base, (char *)base, __ATOMIC_RELEASE);
            break;
        }
    pthread_mutex_unlock(&or_guards_lock);
    return or_guarding && i < OR_GUARDS_MAX ? i : -1;
}

static inline int or_guard_lost(int i) { return i >= 0 && __atomic_load_n(&or_guards[i].lost, __ATOMIC_ACQUIRE); }

/* Before it is unmapped. */
static inline void or_guard_drop(int i) {
    if (i >= 0) __atomic_store_n(&or_guards[i].base, (char *)NULL, __ATOMIC_RELEASE);
}

/* What stands at a path: 0 and its identity, or -1. */
static inline int or_path_is(const char *path, uint64_t *device, uint64_t *inode, int64_t *bytes) {
    struct stat s;
    if (stat(path, &s)) return -1;
    *device = s.st_dev;
    *inode = s.st_ino;
    *bytes = s.st_size;
    return 0;
}

/* May a file of that user's stand there because anybody could put it there? The process's own and root's may not. */
static inline int or_is_planted(const char *path, uint32_t owner) {
    struct stat s;
    char folder[1024];
    const char *slash = strrchr(path, '/');
    size_t n = slash != NULL ? (size_t)(slash - path) : 0;
    if (owner == 0 || owner == geteuid()) return 0;
    if (n >= sizeof folder) return 1;
    memcpy(folder, path, n);
    memcpy(folder + n, "/", 2); /* a link is followed to what it names */
    return stat(folder, &s) || s.st_mode & S_IWOTH;
}

#endif
