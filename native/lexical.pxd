"""Describe the worst window in numbers a tree model can split on, and name what it looks like.

The order of the features is FEATURE_NAMES in native/text.pyx; the plain reference is
tests/reference_text.py.
"""
from libc.math cimport log2f
from libc.stdint cimport uint8_t, uint16_t, uint32_t

from native.keywords cimport *
from native.ngram cimport TOKEN_HEX, TOKEN_LONG_MIXED, TOKEN_NEWLINE, tokenize
from native.textdefs cimport KIND_AGENT, KIND_HEADER, KIND_KEY, KIND_PATH, TEXT_FEATURES, TextWorst


cdef inline bint near(const uint8_t *p, uint32_t n, uint32_t i, const char *lit, uint32_t k) noexcept nogil:
    """The k bytes of lit stand at p[i]."""
    cdef uint32_t j
    if i + k > n:
        return False
    for j in range(k):
        if p[i + j] != <uint8_t>lit[j]:
            return False
    return True


cdef inline void lexical_features(const TextWorst *w, float *out, uint8_t *threat) noexcept nogil:
    """Fill out[0..TEXT_FEATURES) and *threat (Threat number, never 0) from the worst window."""
    cdef const uint8_t *p = w.text
    cdef uint32_t n = w.text_n, i, m, run = 0, longest = 0, same = 1, longest_same = 0
    cdef uint32_t alpha = 0, digit = 0, punct = 0, space = 0, high = 0, control = 0, newline = 0
    cdef uint32_t quotes = 0, angles = 0, parens = 0, braces = 0, slashes = 0, backslashes = 0, dots2 = 0
    cdef uint32_t ends = 0, dollars = 0, equals = 0, marks = 0, percents = 0, at = 0, stars = 0, distinct = 0
    cdef uint32_t templates = 0, substitutions = 0, calls = 0, pairs = 0, scheme = 0
    cdef uint16_t seen[256]
    cdef uint16_t kw[TOKEN_CLASSES]
    cdef uint8_t tokens[192]
    cdef uint8_t c, t, last
    cdef float total, entropy = 0, f
    cdef uint32_t keywords = 0, hexes = 0
    for i in range(256):
        seen[i] = 0
    for i in range(TOKEN_CLASSES):
        kw[i] = 0
    for i in range(TEXT_FEATURES):
        out[i] = 0
    last = 0
    for i in range(n):
        c = p[i]
        seen[c] += 1
        if i and c == last:
            same += 1
        else:
            same = 1
        if same > longest_same:
            longest_same = same
        if c'a' <= c <= c'z' or c'0' <= c <= c'9':
            run += 1
            if run > longest:
                longest = run
            if c <= c'9':
                digit += 1
            else:
                alpha += 1
        else:
            run = 0
            if c == c' ':
                space += 1
            elif c == c'\n':
                newline += 1
            elif c >= 0x80:
                high += 1
            elif c < 32 or c == 127:
                if c != 2 and c != 3:
                    control += 1
            else:
                punct += 1
                if c == c"'" or c == c'"' or c == c'`':
                    quotes += 1
                elif c == c'<' or c == c'>':
                    angles += 1
                elif c == c'(' or c == c')':
                    parens += 1
                    if c == c'(' and i and (is_letter(last) or last == c']' or last == c'/'):
                        calls += 1
                elif c == c'{' or c == c'}' or c == c'[' or c == c']':
                    braces += 1
                    if last == c and (c == c'{'):
                        templates += 1
                    if c == c'{' and (last == c'$' or last == c'#' or last == c'@' or last == c'*'):
                        templates += 1
                elif c == c'/':
                    slashes += 1
                    if last == c':':
                        scheme += 1
                elif c == c'\\':
                    backslashes += 1
                elif c == c'.':
                    if last == c'.':
                        dots2 += 1
                elif c == c';' or c == c'|' or c == c'&':
                    ends += 1
                elif c == c'$':
                    dollars += 1
                elif c == c'=':
                    equals += 1
                elif c == c'%':
                    percents += 1
                    if last == c'<' or last == c'{':
                        templates += 1
                elif c == c'@':
                    at += 1
                elif c == c'*':
                    stars += 1
                    if last == c'/':
                        marks += 1
                elif c == c'#':
                    marks += 1
                elif c == c'-':
                    if last == c'-':
                        marks += 1
                if (c == c'(' and last == c'$') or c == c'`':
                    substitutions += 1
                if (c == c'=' or c == c'<' or c == c'>' or c == c'(' or c == c')' or c == c';' or c == c'-') \
                        and (last == c"'" or last == c'"'):
                    pairs += 1
        last = c
    m = tokenize(p, n, tokens)
    for i in range(m):
        t = tokens[i]
        if t >= TOKEN_CLASS_FIRST:
            kw[t - TOKEN_CLASS_FIRST] += 1
            keywords += 1
        elif t == TOKEN_HEX or t == TOKEN_LONG_MIXED:
            hexes += 1
    total = <float>n if n else 1.0
    for i in range(256):
        if seen[i]:
            distinct += 1
            f = <float>seen[i] / total
            entropy -= f * log2f(f)
    out[0] = w.linear
    out[1] = log2f(<float>w.value_bytes + 1)
    out[2] = <float>n
    out[3] = <float>alpha / total
    out[4] = <float>digit / total
    out[5] = <float>punct / total
    out[6] = <float>space / total
    out[7] = <float>high / total
    out[8] = <float>control
    out[9] = <float>newline
    out[10] = entropy
    out[11] = <float>distinct
    out[12] = <float>longest
    out[13] = <float>longest_same
    out[14] = <float>quotes
    out[15] = <float>angles
    out[16] = <float>parens
    out[17] = <float>braces
    out[18] = <float>slashes
    out[19] = <float>backslashes
    out[20] = <float>dots2
    out[21] = <float>ends
    out[22] = <float>dollars
    out[23] = <float>equals
    out[24] = <float>marks
    out[25] = <float>percents
    out[26] = <float>templates
    out[27] = <float>substitutions
    out[28] = <float>calls
    out[29] = <float>pairs
    out[30] = <float>kw[TOKEN_SQL_VERB - TOKEN_CLASS_FIRST] + kw[TOKEN_SQL_META - TOKEN_CLASS_FIRST]
    out[31] = <float>kw[TOKEN_SQL_CLAUSE - TOKEN_CLASS_FIRST] + kw[TOKEN_SQL_LOGIC - TOKEN_CLASS_FIRST]
    out[32] = <float>kw[TOKEN_SQL_FUNC - TOKEN_CLASS_FIRST]
    out[33] = <float>kw[TOKEN_HTML_STRONG - TOKEN_CLASS_FIRST]
    out[34] = <float>kw[TOKEN_EVENT - TOKEN_CLASS_FIRST]
    out[35] = <float>kw[TOKEN_JS_STRONG - TOKEN_CLASS_FIRST] + kw[TOKEN_JS_WEAK - TOKEN_CLASS_FIRST]
    out[36] = <float>kw[TOKEN_SHELL_STRONG - TOKEN_CLASS_FIRST]
    out[37] = <float>kw[TOKEN_SHELL_WEAK - TOKEN_CLASS_FIRST]
    out[38] = <float>kw[TOKEN_PATH_DIR - TOKEN_CLASS_FIRST] + kw[TOKEN_PATH_FILE - TOKEN_CLASS_FIRST]
    out[39] = <float>kw[TOKEN_PHP - TOKEN_CLASS_FIRST] + kw[TOKEN_JAVA - TOKEN_CLASS_FIRST]
    out[40] = <float>kw[TOKEN_TEMPLATE - TOKEN_CLASS_FIRST] + kw[TOKEN_PROTO - TOKEN_CLASS_FIRST]
    out[41] = <float>kw[TOKEN_XML - TOKEN_CLASS_FIRST] + kw[TOKEN_LDAP - TOKEN_CLASS_FIRST]
    out[42] = <float>kw[TOKEN_SCHEME - TOKEN_CLASS_FIRST] + kw[TOKEN_SSRF - TOKEN_CLASS_FIRST] \
        + kw[TOKEN_JNDI - TOKEN_CLASS_FIRST]
    out[43] = <float>kw[TOKEN_STOP - TOKEN_CLASS_FIRST] + kw[TOKEN_TECH - TOKEN_CLASS_FIRST]
    out[44] = <float>m
    out[45] = <float>w.rounds
    out[46] = <float>w.variant
    out[47] = 1.0 if w.kind == KIND_PATH else (2.0 if w.kind == KIND_HEADER or w.kind == KIND_AGENT else 0.0)
    threat[0] = name_threat(p, n, out, kw, dots2, scheme, braces, parens, equals, stars)


cdef inline bint is_letter(uint8_t c) noexcept nogil:
    return c'a' <= c <= c'z' or c'0' <= c <= c'9' or c == c'_'


cdef inline uint8_t name_threat(const uint8_t *p, uint32_t n, const float *f, const uint16_t *kw,
                                uint32_t dots2, uint32_t scheme, uint32_t braces, uint32_t parens,
                                uint32_t equals, uint32_t stars) noexcept nogil:
    """The class of attack the window looks most like. A guess for the reader of a decision: it has
    no part in the score. Numbers as in native/reasons.pxd, 1 where no class stands out."""
    cdef float score[12]
    cdef float best = 1.9
    cdef uint32_t i
    cdef uint8_t threat = 1
    for i in range(12):
        score[i] = 0
    score[2] = 1.5 * f[30] + 0.5 * f[31] + 0.8 * f[32] + (1.0 if f[14] > 0 else 0.0) + 0.5 * f[24] \
        + 0.6 * f[29] - 0.3 * f[43]
    score[3] = 1.5 * f[33] + 3.0 * f[34] + 0.6 * f[15] + 0.5 * f[35] + 0.3 * f[28]
    score[4] = 1.2 * dots2 + 1.0 * f[38] + (0.3 * f[18] if dots2 else 0.0)
    score[5] = 1.4 * f[36] + 0.7 * f[37] + 0.6 * f[21] + 1.2 * f[27] + 0.4 * f[38]
    score[6] = 1.5 * f[39] + 1.2 * f[40] + 1.6 * f[26] + 0.3 * f[28]
    score[7] = 1.2 * kw[TOKEN_XML - TOKEN_CLASS_FIRST]
    score[8] = 1.2 * kw[TOKEN_LDAP - TOKEN_CLASS_FIRST]
    score[9] = 0.0
    score[10] = 0.0
    score[11] = 1.0 * kw[TOKEN_SSRF - TOKEN_CLASS_FIRST] + (0.8 * scheme) \
        + 0.5 * kw[TOKEN_SCHEME - TOKEN_CLASS_FIRST]
    for i in range(n):
        if p[i] == c'<':
            if near(p, n, i, "<!doctype", 9) or near(p, n, i, "<!entity", 8) or near(p, n, i, "<xi:", 4):
                score[7] += 6
            elif near(p, n, i, "<?php", 5):
                score[6] += 4
        elif p[i] == c'$':
            if kw[TOKEN_NOSQL - TOKEN_CLASS_FIRST] + kw[TOKEN_SQL_CLAUSE - TOKEN_CLASS_FIRST] > 0 \
                    and i + 1 < n and c'a' <= p[i + 1] <= c'z':
                score[9] += 2.5
            if near(p, n, i, "${jndi", 6) or near(p, n, i, "${${", 4):
                score[6] += 5
        elif p[i] == c'(' or p[i] == c')':
            if i + 1 < n and (p[i + 1] == c'&' or p[i + 1] == c'|' or p[i + 1] == c'('):
                if equals and (stars or kw[TOKEN_LDAP - TOKEN_CLASS_FIRST]):
                    score[8] += 2
        elif p[i] == c'\n':
            if near(p, n, i, "\nset-cookie:", 12) or near(p, n, i, "\nlocation:", 10) \
                    or near(p, n, i, "\nhost:", 6) or near(p, n, i, "\nhttp/", 6) \
                    or near(p, n, i, "\nbcc:", 5) or near(p, n, i, "\ncc:", 4) \
                    or near(p, n, i, "\nx-", 3) or near(p, n, i, "\ncontent-", 9):
                score[10] += 6
    for i in range(2, 12):
        if score[i] > best:
            best = score[i]
            threat = <uint8_t>i
    return threat
