"""Python's view of the text part: for training, replay, scoring files and tests.

    host = TextHost("bundle/linear.bin")      # or TextHost(None): all weights zero
    features, linear = host.score_all(records)    # float32 [n, 48] and [n]; NaN rows: no values
    host.explain(record)                      # dict: place, excerpt, threat, linear, features...
    host.values(record)                       # [(place, kind, variant, decoded text, score)]
    host.windows(records) / host.text_windows(texts)   # hashed windows for the trainer

A record is a dict as in the request-record format: method, url, headers {name: value or list},
body, body_enc. Nothing here is on the request path of a proxy.
"""
import base64
import hashlib
import struct
from collections.abc import Iterable

import numpy as np

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from native.base cimport BODY_NONE, BODY_WHOLE, HEADERS_MAX, Header, Request, Slice
from native.decode cimport base64_text, decode_round, fold_text, strip_text
from native.ngram cimport tokenize, window_hash
from native.reasons cimport or_reason_name
from native.text cimport *
from native.leaves cimport score_value, text_name_hash

SCHEMA = TEXT_SCHEMA
N_TRIGRAMS = TRIGRAMS
N_TOKEN_GRAMS = TOKEN_GRAMS
WINDOW = WINDOW_BYTES
STRIDE = WINDOW_STRIDE

FEATURE_NAMES = [
    "linear", "value_length", "window_length", "letters", "digits", "punctuation", "blanks", "high_bytes",
    "control_bytes", "newlines", "entropy", "distinct_bytes", "longest_word", "longest_repeat", "quotes",
    "angles", "parentheses", "braces", "slashes", "backslashes", "double_dots", "separators", "dollars",
    "equals", "comment_marks", "percents", "template_marks", "substitutions", "calls", "quote_breaks",
    "sql_verbs", "sql_clauses", "sql_functions", "html_strong", "event_handlers", "js_words",
    "shell_strong", "shell_weak", "path_words", "php_java_words", "template_words", "xml_ldap_words",
    "scheme_words", "prose_words", "tokens", "rounds", "variant", "kind",
]
KIND_NAMES = ["path", "query", "key", "form", "json", "xml", "cookie", "header", "agent", "body", "file"]
# other scripts are one character each in an excerpt, and the marks of a value's ends aren't in it
SHOWN = bytes(c if c < 0x80 else 63 for c in range(256))
VARIANT_NAMES = ["plain", "stripped", "base64"]

cdef class Collector:
    """Growing arrays of hashed windows (training only)."""
    cdef uint32_t *index
    cdef int64_t n_index, cap_index
    cdef int64_t *end
    cdef uint64_t *hash
    cdef uint32_t *owner
    cdef int64_t n, cap
    cdef uint32_t current
    cdef bint failed
    cdef list texts
    cdef bint keep_texts

    def __cinit__(self):
        self.index = NULL
        self.end = NULL
        self.hash = NULL
        self.owner = NULL

    def __dealloc__(self):
        free(self.index)
        free(self.end)
        free(self.hash)
        free(self.owner)

    cdef void add(self, TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
        cdef int64_t need = self.n_index + s.n_trigrams + s.n_tokens, cap
        cdef void *m
        cdef uint32_t i
        cdef uint64_t h = <uint64_t>14695981039346656037u
        if self.failed:
            return
        if need > self.cap_index:
            cap = need * 2 + 65536
            m = realloc(self.index, cap * sizeof(uint32_t))
            if m == NULL:
                self.failed = True
                return
            self.index = <uint32_t *>m
            self.cap_index = cap
        if self.n >= self.cap:
            cap = self.n * 2 + 4096
            m = realloc(self.end, cap * sizeof(int64_t))
            if m != NULL:
                self.end = <int64_t *>m
                m = realloc(self.hash, cap * sizeof(uint64_t))
            if m != NULL:
                self.hash = <uint64_t *>m
                m = realloc(self.owner, cap * sizeof(uint32_t))
            if m == NULL:
                self.failed = True
                return
            self.owner = <uint32_t *>m
            self.cap = cap
        for i in range(s.n_trigrams):
            self.index[self.n_index + i] = s.trigram_hit[i]
        for i in range(s.n_tokens):
            self.index[self.n_index + s.n_trigrams + i] = <uint32_t>TRIGRAMS + s.token_hit[i]
        for i in range(n):
            h = (h ^ p[i]) * <uint64_t>1099511628211u
        self.n_index = need
        self.end[self.n] = need
        self.hash[self.n] = h
        self.owner[self.n] = self.current
        self.n += 1
        if self.keep_texts:
            with gil:
                place = bytes(s.place[:s.place_n]).decode("latin-1")
                self.texts.append((place, <bytes>(<const char *>p)[:n]))

    cdef dict arrays(self):
        if self.failed:
            raise MemoryError("out of memory while collecting windows")
        indptr = np.zeros(self.n + 1, dtype=np.int64)
        out = {"indices": np.empty(self.n_index, dtype=np.uint32), "indptr": indptr,
               "hashes": np.empty(self.n, dtype=np.uint64), "owner": np.empty(self.n, dtype=np.uint32)}
        cdef uint32_t[::1] a = out["indices"]
        cdef uint64_t[::1] h = out["hashes"]
        cdef uint32_t[::1] o = out["owner"]
        cdef int64_t[::1] e = indptr
        if self.n:
            if self.n_index:
                memcpy(&a[0], self.index, self.n_index * sizeof(uint32_t))
            memcpy(&h[0], self.hash, self.n * sizeof(uint64_t))
            memcpy(&o[0], self.owner, self.n * sizeof(uint32_t))
            memcpy(&e[1], self.end, self.n * sizeof(int64_t))
        return out


cdef void collect_window(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    (<Collector>s.sink).add(s, p, n)


def header_hash(name: str) -> int:
    """What TextPolicy.header_hash holds for a header's name."""
    raw = name.lower().encode()
    return text_name_hash(raw, <uint32_t>len(raw))


cdef class RequestView:
    """A record as a Request: keeps the bytes alive that the slices point to."""
    cdef Request r
    cdef Header headers[HEADERS_MAX]
    cdef list keep

    cdef int fill(self, dict record) except -1:
        cdef uint32_t k = 0
        self.keep = []
        self.r.method = self.slice_of(record.get("method", "GET"))
        url = as_bytes(record.get("url", "/"))
        if url[:7].lower() == b"http://" or url[:8].lower() == b"https://":
            at = url.find(b"/", 8)
            url = url[at:] if at >= 0 else b"/"
        path, _, query = url.partition(b"?")
        self.r.path = self.slice_of(path)
        self.r.query = self.slice_of(query)
        self.r.headers = self.headers
        items = record.get("headers") or {}
        pairs = list(items.items() if isinstance(items, dict) else items)
        if record.get("ua") and not any(str(n).lower() == "user-agent" for n, _ in pairs):
            pairs.append(("user-agent", record["ua"]))
        if record.get("ref") and record["ref"] != "-":
            pairs.append(("referer", record["ref"]))
        self.r.headers_dropped = 0
        for name, value in pairs:
            for one in value if isinstance(value, list | tuple) else (value,):
                if k >= HEADERS_MAX:
                    self.r.headers_dropped += 1
                    continue
                self.headers[k].name = self.slice_of(as_bytes(name).lower())
                self.headers[k].value = self.slice_of(one)
                k += 1
        self.r.n_headers = k
        body = record.get("body") or b""
        if record.get("body_enc") == "b64" and isinstance(body, str):
            body = base64.b64decode(body)
        self.r.body = self.slice_of(body)
        self.r.body_bytes = self.r.body.n
        self.r.body_state = BODY_WHOLE if self.r.body.n else BODY_NONE
        return 0

    cdef Slice slice_of(self, value):
        cdef Slice s
        cdef bytes raw = as_bytes(value)
        self.keep.append(raw)
        s.p = raw
        s.n = <uint32_t>len(raw)
        return s


cdef bytes as_bytes(value):
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return str(value).encode("utf-8", "surrogatepass")


def write_weights(path, trigram, token, double bias) -> None:
    """Quantise float weights ([65536] and [16384]) to int8 and write the weights file.

    Each table has one scale: its largest absolute weight becomes 127. Raises ValueError on other
    shapes or weights that are no finite numbers.
    """
    with open(path, "wb") as f:
        f.write(weights_bytes(trigram, token, bias))


def weights_bytes(trigram, token, double bias) -> bytes:
    """The weights file's bytes, as write_weights writes them."""
    tables = []
    scales = []
    for table, n in ((trigram, TRIGRAMS), (token, TOKEN_GRAMS)):
        table = np.asarray(table, dtype=np.float64)
        if table.shape != (n,) or not np.isfinite(table).all() or not np.isfinite(bias):
            raise ValueError(f"weights must be {n} finite numbers, got shape {table.shape}")
        scale = float(np.abs(table).max()) / 127 or 1.0
        tables.append(np.clip(np.rint(table / scale), -127, 127).astype(np.int8).tobytes())
        scales.append(scale)
    data = b"".join(tables)
    head = struct.pack("<8sIIfffI", b"ORLINEAR", LINEAR_VERSION, TEXT_SCHEMA, *scales, bias, 0)
    digest = hashlib.blake2b(head + data, digest_size=8).digest()
    return head + digest + bytes(LINEAR_HEADER_BYTES - len(head) - 8) + data


def read_weights(path) -> dict:
    """The weights file as {"trigram", "token" (float32), "bias", "schema", "id"}; ValueError where it
    is none or belongs to another schema."""
    with open(path, "rb") as f:
        data = f.read()
    return parse_weights(data)


ERRORS = {-1: "it has the wrong size", -2: "it is no weights file", -3: "its version is unknown",
          -4: "it was trained for another feature schema", -5: "its scales are no finite numbers"}


def parse_weights(bytes data) -> dict:
    cdef TextModel m
    cdef int rc = text_model_from_bytes(data, len(data), &m)
    if rc:
        raise ValueError(f"weights refused: {ERRORS[rc]}")
    tables = np.frombuffer(data, dtype=np.int8, offset=LINEAR_HEADER_BYTES).astype(np.float32)
    return {"trigram": tables[:TRIGRAMS] * m.trigram_scale, "token": tables[TRIGRAMS:] * m.token_scale,
            "bias": m.bias, "schema": m.schema, "id": m.id}


cdef class TextHost:
    """Scores request records with one set of weights. Not for several threads at once.

    weights: path of a weights file, its bytes, or None for all zero. Options are those of
    TextPolicy: body_bytes_max, decode_rounds, values_max, windows_max, headers (names; None: every
    header without a fixed shape).
    """
    cdef TextModel model
    cdef TextPolicy policy
    cdef TextScratch *scratch
    cdef TextResult result
    cdef RequestView view
    cdef bytes data

    def __cinit__(self):
        self.scratch = <TextScratch *>calloc(1, sizeof(TextScratch))
        if self.scratch == NULL:
            raise MemoryError("no memory for the text scratch")
        self.view = RequestView()

    def __dealloc__(self):
        free(self.scratch)

    def __init__(self, weights=None, *, body_bytes_max=65536, decode_rounds=3, values_max=256,
                 windows_max=512, headers=None):
        text_policy_default(&self.policy)
        self.policy.body_bytes_max = body_bytes_max
        self.policy.decode_rounds = decode_rounds
        self.policy.values_max = values_max
        self.policy.windows_max = windows_max
        if headers is not None:
            if len(headers) > TEXT_HEADERS_MAX:
                raise ValueError(f"at most {TEXT_HEADERS_MAX} headers, got {len(headers)}")
            self.policy.every_header = 0
            self.policy.n_headers = len(headers)
            for i, name in enumerate(headers):
                self.policy.header_hash[i] = header_hash(name)
        self.load(weights)

    def load(self, weights) -> None:
        """Take other weights: a path, the file's bytes or None. ValueError where they are refused."""
        if weights is None:
            data = weights_bytes(np.zeros(TRIGRAMS), np.zeros(TOKEN_GRAMS), 0.0)
        elif isinstance(weights, bytes):
            data = weights
        else:
            with open(weights, "rb") as f:
                data = f.read()
        cdef TextModel m
        cdef int rc = text_model_from_bytes(data, len(data), &m)
        if rc:
            raise ValueError(f"weights refused: {ERRORS[rc]}")
        self.data = data
        self.model = m

    @property
    def weights(self) -> bytes:
        """The weights file in use."""
        return self.data

    cdef void run(self, uint64_t deadline_ns) noexcept:
        text_score(&self.view.r, &self.model, &self.policy, self.scratch, &self.result, deadline_ns)

    def score_all(self, records: Iterable[dict]) -> tuple:
        """(features float32 [n, TEXT_FEATURES], linear float32 [n]) of each record's worst window."""
        rows = list(records)
        features = np.empty((len(rows), TEXT_FEATURES), dtype=np.float32)
        linear = np.empty(len(rows), dtype=np.float32)
        cdef float[:, ::1] f = features
        cdef float[::1] v = linear
        cdef Py_ssize_t i
        self.scratch.collect = 0
        for i, record in enumerate(rows):
            self.view.fill(record)
            self.run(0)
            memcpy(&f[i, 0], self.result.features, TEXT_FEATURES * sizeof(float))
            v[i] = self.result.linear
        return features, linear

    def features(self, records):
        """float32 [n, TEXT_FEATURES]; NaN rows where a request has no values."""
        return self.score_all(records)[0]

    def linear(self, records):
        """float32 [n], high = attack; NaN where a request has no values."""
        return self.score_all(records)[1]

    def explain(self, record: dict, deadline_ns: int = 0) -> dict:
        """Everything the decision gets to know about a record."""
        self.scratch.collect = 0
        self.view.fill(record)
        self.run(deadline_ns)
        cdef TextResult *r = &self.result
        return {
            "linear": r.linear, "place": (<bytes>r.place[:r.place_n]).decode("latin-1"),
            "excerpt": <bytes>r.excerpt[:r.excerpt_n], "threat": r.threat,
            "threat_name": (<bytes>or_reason_name(r.threat)).decode(),
            "features": dict(zip(FEATURE_NAMES, [r.features[i] for i in range(TEXT_FEATURES)], strict=True)),
            "n_values": r.n_values, "n_windows": r.n_windows, "cut": bool(r.cut), "overrun": bool(r.overrun),
            "login_key": r.login_key,
        }

    def score_at(self, str part, uint64_t address, uint32_t n, bytes content_type=b"") -> dict:
        """Score a request whose path, query, body, or value of the header named by `part` lies at an
        address of the caller's choosing: the tests put it against a protected page."""
        cdef Slice s
        self.scratch.collect = 0
        self.view.fill({"method": "POST", "url": "/", "headers": {"content-type": content_type, part: "x"}})
        s.p = <const char *><size_t>address
        s.n = n
        if part == "path":
            self.view.r.path = s
        elif part == "query":
            self.view.r.query = s
        elif part == "body":
            self.view.r.body = s
        else:
            self.view.headers[1].value = s
        self.run(0)
        return {"linear": self.result.linear, "n_windows": self.result.n_windows,
                "cut": bool(self.result.cut)}

    def values(self, record: dict) -> list:
        """[(place, folded text)] of every window read, for tests and for looking at decisions."""
        cdef Collector c = Collector()
        c.keep_texts = True
        c.texts = []
        self.collect_into(c)
        try:
            self.view.fill(record)
            self.run(0)
        finally:
            self.scratch.collect = 0
        return c.texts

    cdef void collect_into(self, Collector c) noexcept:
        self.scratch.collect = 1
        self.scratch.sink = <void *>c
        self.scratch.sink_call = <void *>collect_window

    def windows(self, records) -> dict:
        """Hashed windows of the records for the trainer: {"indices" uint32, "indptr" int64 (CSR over
        windows), "hashes" uint64 (of the folded text), "owner" uint32 (index of the record)}."""
        cdef Collector c = Collector()
        self.collect_into(c)
        try:
            for i, record in enumerate(records):
                c.current = i
                self.view.fill(record)
                self.run(0)
        finally:
            self.scratch.collect = 0
        return c.arrays()

    def text_windows(self, texts, plus: bool = False) -> dict:
        """As windows, for single values (bytes or str) as they stand in a request; plus: '+' is a
        space (query and form values)."""
        cdef Collector c = Collector()
        cdef bytes raw
        cdef TextScratch *s = self.scratch
        self.collect_into(c)
        s.model = &self.model
        s.policy = &self.policy
        s.deadline_ns = 0
        try:
            for i, text in enumerate(texts):
                c.current = i
                raw = as_bytes(text)
                s.n_values = 0
                s.n_windows = 0
                s.overrun = 0
                s.clock = 4
                s.worst.linear = -1e30
                score_value(s, <const uint8_t *><const char *>raw, <uint32_t>len(raw), 1, plus)
        finally:
            self.scratch.collect = 0
        return c.arrays()

    def text_scores(self, texts, plus: bool = False):
        """float32 [n]: score of the worst window of each single value."""
        out = np.full(len(texts), np.nan, dtype=np.float32)
        cdef bytes raw
        cdef TextScratch *s = self.scratch
        s.collect = 0
        s.model = &self.model
        s.policy = &self.policy
        s.deadline_ns = 0
        for i, text in enumerate(texts):
            raw = as_bytes(text)
            s.n_values = 0
            s.n_windows = 0
            s.overrun = 0
            s.clock = 4
            s.worst.linear = -1e30
            score_value(s, <const uint8_t *><const char *>raw, <uint32_t>len(raw), 1, plus)
            if s.worst.linear > -1e29:
                out[i] = s.worst.linear
        return out


# ---------------------------------------------------------------- single steps, for the tests

def fold(bytes text) -> bytes:
    """Folded text (native/decode.pxd)."""
    out = bytearray(len(text) + 1)
    cdef unsigned char[::1] o = out
    cdef uint32_t k = fold_text(<const uint8_t *><const char *>text, <uint32_t>len(text), &o[0])
    return bytes(out[:k])


def strip(bytes text) -> bytes:
    """Folded text without what interpreters ignore."""
    out = bytearray(len(text) + 1)
    cdef unsigned char[::1] o = out
    cdef uint32_t k = strip_text(<const uint8_t *><const char *>text, <uint32_t>len(text), &o[0])
    return bytes(out[:k])


def decode(bytes text, bint plus=False) -> tuple:
    """(text after one round, whether an escape was undone, whether another round may find more)."""
    out = bytearray(len(text) + 4)
    cdef unsigned char[::1] o = out
    cdef bint changed = False, again = False
    cdef uint32_t k = decode_round(<const uint8_t *><const char *>text, <uint32_t>len(text), &o[0], plus,
                                   &changed, &again)
    return bytes(out[:k]), bool(changed), bool(again)


def unbase64(bytes text):
    """What base64_text makes of the text, None where it refuses."""
    out = bytearray(len(text) + 4)
    cdef unsigned char[::1] o = out
    cdef uint32_t k = 0
    if not base64_text(<const uint8_t *><const char *>text, <uint32_t>len(text), &o[0], &k):
        return None
    return bytes(out[:k])


def tokens(bytes text) -> list:
    """Token numbers of folded text of at most 176 bytes."""
    cdef uint8_t out[192]
    cdef uint32_t k
    if len(text) > 176:
        raise ValueError("at most 176 bytes")
    k = tokenize(<const uint8_t *><const char *>text, <uint32_t>len(text), out)
    return [out[i] for i in range(k)]


def buckets(bytes text) -> tuple:
    """(trigram buckets, token buckets) of a window of folded text, in the order of their first
    appearance."""
    cdef TextScratch *s = <TextScratch *>calloc(1, sizeof(TextScratch))
    if s == NULL:
        raise MemoryError("no memory for the text scratch")
    try:
        window_hash(s, <const uint8_t *><const char *>text, <uint32_t>len(text))
        return ([s.trigram_hit[i] for i in range(s.n_trigrams)], [s.token_hit[i] for i in range(s.n_tokens)])
    finally:
        free(s)


# ---------------------------------------------------------------- what of a text is shown

def normal_forms(bytes text, int rounds, bint plus) -> list:
    """What the kernel reads a text as, as excerpts spell it: folded, and without what interpreters ignore."""
    for _ in range(rounds):
        text, _changed, again = decode(text, plus)
        plus = False
        if not again:
            break
    folded = fold(text)
    return [form.translate(SHOWN) for form in (folded, strip(folded))]


def cut_around(bytes text, bytes window, int keep, int rounds=3) -> tuple:
    """(at most `keep` bytes of text with the window in them, whether they stand so in the text).

    window: as in a decision's excerpt. Where it can't be found in the text, it is looked for in what that holds in
    base64; else the window itself is all that is shown: whatever it is padded or wrapped with, it is in sight."""
    if len(text) <= keep:
        return text, True
    for source, as_sent in ((text, True), (unbase64(decode(text)[0]), False)):
        if source is None:
            continue
        best = None
        for plus in (False, True):
            for start in range(0, max(len(source) - keep, 0) + keep // 4, max(keep // 4, 1)):
                start = min(start, max(len(source) - keep, 0))
                for form in normal_forms(source[start:start + keep], rounds, plus):
                    at = form.find(window)
                    if at >= 0:
                        off = abs(2 * at + len(window) - len(form))      # twice how far it is from the middle
                        if best is None or off < best[0]:
                            best = off, start
        if best is not None:
            return source[best[1]:best[1] + keep], as_sent
    return window[:keep], False
