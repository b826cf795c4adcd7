"""Structs and limits of the text part, shared by values, decode, ngram, lexical and text.

Users cimport these names from native.text.
"""
from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    TEXT_SCHEMA = 1              # bumped when tokens, hashes, decodings or features change
    TEXT_FEATURES = 48
    TRIGRAMS = 65536             # buckets of byte trigrams
    TOKEN_GRAMS = 16384          # buckets of token 1-5-grams
    WINDOW_BYTES = 160
    WINDOW_STRIDE = 80
    CHUNK_BYTES = 8192           # a longer value is decoded piece by piece
    CHUNK_OVERLAP = 256          # bytes two pieces share, so that a payload on the seam is seen whole
    POOL_BYTES = 131072          # unescaped strings of nested documents
    DEPTH_MAX = 32               # open containers of one JSON or XML document with names of their own
    NEST_MAX = 4                 # documents inside strings of documents
    TEXT_HEADERS_MAX = 32        # chosen headers of a policy
    MEMO_ENTRIES = 16
    MEMO_BYTES = 384             # longest header value remembered
    LINEAR_HEADER_BYTES = 64     # of a weights file
    LINEAR_FILE_BYTES = 64 + 65536 + 16384


cdef enum TextKind:
    # where a value was found
    KIND_PATH = 0
    KIND_QUERY = 1
    KIND_KEY = 2                 # the name of a parameter, member or field
    KIND_FORM = 3
    KIND_JSON = 4
    KIND_XML = 5
    KIND_COOKIE = 6
    KIND_HEADER = 7
    KIND_AGENT = 8
    KIND_BODY = 9                # a body without structure
    KIND_FILE = 10               # head of an uploaded file


cdef enum TextVariant:
    VARIANT_PLAIN = 0
    VARIANT_STRIPPED = 1         # comments, empty quotes, escapes and joins of strings removed
    VARIANT_BASE64 = 2


cdef struct TextModel:
    # memory belongs to whoever mapped the weights file
    const int8_t *trigram        # TRIGRAMS weights
    const int8_t *token          # TOKEN_GRAMS weights
    float trigram_scale
    float token_scale
    float bias
    uint32_t schema
    uint64_t id                  # content hash: remembered header scores are dropped when it changes


cdef struct TextPolicy:
    uint32_t body_bytes_max
    uint32_t decode_rounds
    uint32_t values_max
    uint32_t windows_max
    uint32_t n_headers
    uint32_t every_header        # 1: every header but those with a fixed shape is read
    uint64_t header_hash[32]     # text_name_hash of the chosen headers' names


cdef struct TextWorst:
    # the worst window so far and what is needed to describe it
    const uint8_t *raw           # raw_bytes of the value as sent, or unescaped out of a document (TextScratch.kept)
    float linear
    uint8_t kind
    uint8_t variant
    uint8_t rounds               # decodings that changed the value
    uint8_t spare
    uint32_t value_bytes         # of the decoded value
    uint32_t raw_bytes           # of the piece of the value in which the window lies
    uint16_t place_n
    uint16_t text_n
    uint8_t place[96]
    uint8_t text[168]            # WINDOW_BYTES used: lower case, folded


cdef struct TextMemo:
    uint64_t key
    uint32_t value_n             # 0: free
    uint32_t n_values
    uint32_t n_windows
    uint32_t raw_at              # where in the value the worst piece began
    TextWorst worst
    uint8_t value[384]


cdef struct TextScratch:
    # Working memory of one thread, zero-initialised, about 195 KiB. Nothing in it outlives a
    # request but the remembered header values.
    const TextModel *model
    const TextPolicy *policy
    uint64_t deadline_ns
    uint64_t model_id
    uint32_t n_values
    uint32_t n_windows
    uint32_t clock               # windows until the clock is read again
    uint32_t ticks               # likewise, steps of a walker
    uint32_t pool_n
    uint8_t cut
    uint8_t overrun
    uint8_t nest
    uint8_t has_password
    uint8_t part                 # for lack of time a value was looked at in part
    uint8_t in_header            # the header that is being walked is kept by its caller
    uint64_t login
    uint32_t place_n
    uint32_t collect             # 1: windows are kept for training (native/text.pyx), never in service
    void *sink                   # Collector
    void *sink_call              # WindowSink (native/values.pxd)
    uint32_t n_trigrams          # distinct buckets of the window just hashed
    uint32_t n_tokens
    uint16_t trigram_hit[192]
    uint16_t token_hit[1024]
    uint64_t trigram_map[1024]   # presence bits, all zero between windows
    uint64_t token_map[256]
    uint8_t place[96]
    TextWorst worst
    TextMemo memo[16]
    uint8_t buf_a[8320]
    uint8_t buf_b[8320]
    uint8_t pool[131072]
    uint8_t kept[8192]           # the worst piece, where it stood in the pool: that is used again


cdef struct TextResult:
    float linear                 # of the worst window; NaN where the request has no values
    float features[48]           # TEXT_FEATURES
    uint8_t threat               # Threat number of native/reasons.pxd (1..11), 0 where no values
    uint8_t cut                  # a limit was hit: some of the request was not read
    uint8_t overrun              # the deadline was hit: some was not read, or read in part
    uint8_t spare
    uint16_t place_n
    uint16_t excerpt_n
    char place[96]
    char excerpt[160]
    uint32_t n_values
    uint32_t n_windows
    uint64_t login_key           # hash of the user name of a login form, 0: none
