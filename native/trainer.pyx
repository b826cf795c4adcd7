"""AdaGrad logistic regression on hashed windows (training only, not on the request path).

A bag is one example: a benign bag teaches with every one of its windows, an attack's bag only with
the window that scores highest, since the rest of a long payload may be harmless text.
"""
import numpy as np

from libc.math cimport exp, sqrt
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef inline double margin(const float *w, double bias, const uint32_t *idx, int64_t a,
                          int64_t b) noexcept nogil:
    cdef double s = 0
    cdef int64_t i
    for i in range(a, b):
        s += w[idx[i]]
    return s / sqrt(<double>(b - a) + 4) + bias


def fit(indices, indptr, bags, labels, weights, int n_features, *, int epochs=4, double rate=0.1,
        double decay=0.0, uint64_t seed=0, start=None, progress=None) -> tuple:
    """Train; returns (float32 weights [n_features], bias).

    indices uint32, indptr int64: CSR over windows (features present). bags int64 [m + 1]: windows of
    bag k are bags[k]..bags[k+1]. labels uint8 [m], weights float32 [m]. decay: weight decay per step
    on the features of the window. start: (weights, bias) to go on from. progress: called with the
    epoch's number after each.
    """
    cdef uint32_t[::1] idx = np.ascontiguousarray(indices, dtype=np.uint32)
    cdef int64_t[::1] ptr = np.ascontiguousarray(indptr, dtype=np.int64)
    cdef int64_t[::1] bag = np.ascontiguousarray(bags, dtype=np.int64)
    cdef uint8_t[::1] y = np.ascontiguousarray(labels, dtype=np.uint8)
    cdef float[::1] sw = np.ascontiguousarray(weights, dtype=np.float32)
    w_np = np.zeros(n_features, dtype=np.float32) if start is None else np.array(start[0], dtype=np.float32)
    g_np = np.full(n_features, 1e-8, dtype=np.float32)
    cdef float[::1] w = w_np
    cdef float[::1] acc = g_np
    cdef double bias = 0.0 if start is None else start[1]
    cdef double bias_acc = 1e-8, z, p, g, gj, best
    cdef int64_t k, m, a, b, j, first, last, chosen, n_bags = y.shape[0]
    cdef int e
    cdef int64_t[::1] order
    if n_bags == 0 or idx.shape[0] == 0:
        raise ValueError("nothing to train on")
    if bag.shape[0] != n_bags + 1 or sw.shape[0] != n_bags or bag[n_bags] != ptr.shape[0] - 1:
        raise ValueError("bags, labels, weights and windows don't belong together")
    if int(np.max(indices)) >= n_features:
        raise ValueError("a feature index is beyond n_features")
    rng = np.random.default_rng(seed)
    for e in range(epochs):
        order = rng.permutation(n_bags).astype(np.int64)
        with nogil:
            for m in range(n_bags):
                k = order[m]
                first = bag[k]
                last = bag[k + 1]
                if first == last:
                    continue
                if y[k] and last - first > 1:
                    best = -1e300
                    chosen = first
                    for j in range(first, last):
                        z = margin(&w[0], bias, &idx[0], ptr[j], ptr[j + 1])
                        if z > best:
                            best = z
                            chosen = j
                    first = chosen
                    last = chosen + 1
                for j in range(first, last):
                    a = ptr[j]
                    b = ptr[j + 1]
                    z = margin(&w[0], bias, &idx[0], a, b)
                    p = 1.0 / (1.0 + exp(-z)) if z > -500 else 0.0
                    g = (p - y[k]) * sw[k]
                    bias_acc += g * g
                    bias -= rate * g / sqrt(bias_acc)
                    g /= sqrt(<double>(b - a) + 4)
                    for a in range(a, b):
                        gj = g + decay * w[idx[a]]
                        acc[idx[a]] += <float>(gj * gj)
                        w[idx[a]] -= <float>(rate * gj / sqrt(acc[idx[a]]))
        if progress is not None:
            progress(e + 1)
    return w_np, bias
