"""Hash a window of folded text into the buckets of the linear model, and score it.

Features are the distinct byte trigrams (digits folded to '0') and the distinct 1- to 5-grams of
tokens. The score is sum(weights) / sqrt(count + 4) + bias, so that long windows don't win by
their length.

Tokens: a punctuation character is itself; a run of letters, digits and '_' is its keyword class
(native/keywords.pxd) or one of the shapes below; blanks separate and are no token.
"""
from libc.math cimport sqrtf
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from native.keywords cimport or_keyword
from native.textdefs cimport TextModel, TextScratch

cdef extern from *:
    """
    #ifndef OR_NGRAM_TABLES
    #define OR_NGRAM_TABLES
    #include <stdint.h>
    /* 0 letter or '_', 1 digit, 2 punctuation, 3 space, 4 newline, 5 high, 6 control and the ends */
    static const uint8_t or_token_shape[256] = {
        [0 ... 9] = 6, ['\\n'] = 4, [11 ... 31] = 6, [' '] = 3, ['!' ... '/'] = 2, ['0' ... '9'] = 1,
        [':' ... '@'] = 2, ['[' ... '^'] = 2, ['`'] = 2, ['{' ... '~'] = 2, [127] = 6, [128 ... 255] = 5};
    static const uint8_t or_digit_fold[256] = {
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27,
        28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, ['0' ... '9'] = '0',
        58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82,
        83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105,
        106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125,
        126, 127, [128 ... 255] = 128};
    #endif
    """
    const uint8_t or_token_shape[256]
    const uint8_t or_digit_fold[256]

cdef enum:
    TOKEN_CONTROL = 1            # also 2 and 3: begin and end of the value
    TOKEN_BEGIN = 2
    TOKEN_END = 3
    TOKEN_HIGH = 5
    TOKEN_NEWLINE = 10
    TOKEN_LETTER = 16            # one letter
    TOKEN_SHORT = 17             # 2-3 letters
    TOKEN_WORD = 18              # 4-15 letters
    TOKEN_LONG = 19              # 16 letters and more
    TOKEN_DIGIT = 20             # one digit
    TOKEN_NUMBER = 21
    TOKEN_HEX = 22               # 0x...
    TOKEN_MIXED = 23             # letters and digits, up to 11
    TOKEN_LONG_MIXED = 24


cdef inline uint8_t word_token(const uint8_t *p, uint32_t n, uint32_t digits) noexcept nogil:
    """Token of a run of n letters, digits and '_', of which `digits` are digits."""
    cdef uint32_t i, h = 2166136261u
    cdef uint8_t t
    if digits == n:
        return TOKEN_DIGIT if n == 1 else TOKEN_NUMBER
    if n <= 20:
        for i in range(n):
            h = (h ^ p[i]) * 16777619u
        t = or_keyword(h)
        if t:
            return t
    if digits:
        if n > 2 and p[0] == c'0' and p[1] == c'x':
            return TOKEN_HEX
        return TOKEN_MIXED if n < 12 else TOKEN_LONG_MIXED
    if n == 1:
        return TOKEN_LETTER
    if n < 4:
        return TOKEN_SHORT
    return TOKEN_WORD if n < 16 else TOKEN_LONG


cdef inline uint32_t tokenize(const uint8_t *p, uint32_t n, uint8_t *tokens) noexcept nogil:
    """Tokens of p[0..n); at most n of them. Returns their number."""
    cdef uint32_t i = 0, j, k = 0, digits
    cdef uint8_t f
    while i < n:
        f = or_token_shape[p[i]]
        if f <= 1:
            j = i
            digits = 0
            while j < n and or_token_shape[p[j]] <= 1:
                digits += or_token_shape[p[j]]
                j += 1
            tokens[k] = word_token(p + i, j - i, digits)
            k += 1
            i = j
            continue
        if f == 2:
            tokens[k] = p[i]
            k += 1
        elif f == 4:
            tokens[k] = TOKEN_NEWLINE
            k += 1
        elif f == 5:
            # a run of other scripts is one token
            if k == 0 or tokens[k - 1] != TOKEN_HIGH:
                tokens[k] = TOKEN_HIGH
                k += 1
        elif f == 6:
            tokens[k] = p[i] if (p[i] == TOKEN_BEGIN or p[i] == TOKEN_END) else TOKEN_CONTROL
            k += 1
        i += 1
    return k


cdef inline void window_hash(TextScratch *s, const uint8_t *p, uint32_t n) noexcept nogil:
    """Fill s.trigram_hit and s.token_hit with the distinct buckets of p[0..n), n <= WINDOW_BYTES + 2."""
    cdef uint32_t i, k, x, g, b, hits = 0, m, back
    cdef uint64_t word, bit
    cdef uint8_t tokens[192]
    if n > 176:
        n = 176
    if n >= 3:
        x = (<uint32_t>or_digit_fold[p[0]] << 8) | (<uint32_t>or_digit_fold[p[1]] << 16)
        for i in range(2, n):
            x = (x >> 8) | (<uint32_t>or_digit_fold[p[i]] << 16)
            b = (x * 0x9E3779B1u) >> 16
            word = s.trigram_map[b >> 6]
            bit = <uint64_t>1 << (b & 63)
            s.trigram_hit[hits] = <uint16_t>b
            hits += (word & bit) == 0
            s.trigram_map[b >> 6] = word | bit
    s.n_trigrams = hits
    hits = 0
    m = tokenize(p, n, tokens)
    for i in range(m):
        g = 0
        back = 5 if i >= 4 else i + 1
        for k in range(back):
            g = (g + tokens[i - k] + 1) * 0x9E3779B1u
            g ^= g >> 15
            b = ((g + k) * 0x85EBCA6Bu) >> 18
            word = s.token_map[b >> 6]
            bit = <uint64_t>1 << (b & 63)
            s.token_hit[hits] = <uint16_t>b
            hits += (word & bit) == 0
            s.token_map[b >> 6] = word | bit
    s.n_tokens = hits
    for i in range(s.n_trigrams):
        s.trigram_map[s.trigram_hit[i] >> 6] = 0
    for i in range(hits):
        s.token_map[s.token_hit[i] >> 6] = 0


cdef inline float window_score(const TextScratch *s) noexcept nogil:
    """Linear score of the buckets in s."""
    cdef const TextModel *m = s.model
    cdef int32_t a = 0, b = 0
    cdef uint32_t i
    for i in range(s.n_trigrams):
        a += m.trigram[s.trigram_hit[i]]
    for i in range(s.n_tokens):
        b += m.token[s.token_hit[i]]
    return (<float>a * m.trigram_scale + <float>b * m.token_scale) \
        / sqrtf(<float>(s.n_trigrams + s.n_tokens + 4)) + m.bias
