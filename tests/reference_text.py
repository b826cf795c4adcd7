"""The text part in plain Python: slow, short, and what the core is checked against.

Written from the contract (native/decode.pxd, ngram.pxd, lexical.pxd and the walkers), not from
the code: strings and dicts instead of cursors and tables.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

_spec = importlib.util.spec_from_file_location(
    "make_keywords", Path(__file__).resolve().parent.parent / "native" / "make_keywords.py"
)
assert _spec
assert _spec.loader
keywords = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(keywords)

KEYWORDS: dict[str, int] = keywords.words()
CLASS = {name: keywords.FIRST + k for k, name in enumerate(keywords.CLASSES)}
WINDOW, STRIDE = 160, 80
M32 = 0xFFFFFFFF

# ---------------------------------------------------------------- decoding

_ENTITIES = {
    "lt": "<",
    "gt": ">",
    "amp": "&",
    "quot": '"',
    "apos": "'",
    "nbsp": " ",
    "tab": "\t",
    "newline": "\n",
    "colon": ":",
    "lpar": "(",
    "rpar": ")",
    "sol": "/",
    "bsol": "\\",
    "num": "#",
    "semi": ";",
    "equals": "=",
    "period": ".",
    "comma": ",",
    "excl": "!",
    "grave": "`",
    "dollar": "$",
    "lbrace": "{",
    "rbrace": "}",
    "lsqb": "[",
    "rsqb": "]",
    "plus": "+",
    "percnt": "%",
    "lowbar": "_",
    "verbar": "|",
    "ast": "*",
}
_ESCAPE = re.compile(
    rb"%(?P<hex>[0-9a-fA-F]{2})|%[uU](?P<pu>[0-9a-fA-F]{4})|\\x(?P<bx>[0-9a-fA-F]{2})"
    rb"|\\u(?P<bu>[0-9a-fA-F]{4})|\\u\{(?P<bb>[0-9a-fA-F]{1,6})\}"
    rb"|&#[xX](?P<ex>[0-9a-fA-F]{1,8});?|&#(?P<ed>[0-9]{1,9});?|&(?P<en>[a-zA-Z]{2,8});|(?P<plus>\+)",
    re.DOTALL,
)


def _utf8(cp: int) -> bytes:
    if 0xFF01 <= cp <= 0xFF5E:
        cp -= 0xFEE0
    return chr(cp).encode("utf-8", "surrogatepass")


def decode(text: bytes, plus: bool = False) -> bytes:
    """One round."""

    def undo(m: re.Match[bytes]) -> bytes:
        if m["plus"]:
            return b" " if plus else b"+"
        if m["hex"]:
            return bytes([int(m["hex"], 16)])
        for name, base in (("pu", 16), ("bx", 16), ("bu", 16), ("bb", 16), ("ex", 16), ("ed", 10)):
            if m[name]:
                cp = int(m[name], base)
                return _utf8(cp) if cp <= 0x10FFFF else m[0]
        known = _ENTITIES.get(m["en"].decode().lower())
        return known.encode() if known else m[0]

    return _ESCAPE.sub(undo, text)


def decode_all(text: bytes, plus: bool = False, rounds: int = 3) -> bytes:
    for k in range(rounds):
        text = decode(text, plus and k == 0)
    return text


_OVERLONG = re.compile(
    rb"[\xc0\xc1](?P<two>[\x80-\xbf])|(?P<skip>[\xc0\xc1])(?=[\x00-\x7f])"
    rb"|(?:\xe0\x80|\xf0\x80{2}|\xf8\x80{3}|\xfc\x80{4})(?P<more>[\xa1-\xbf])"
    rb"|\xe2(?P<slash>\x88\x95|\x88\x96|\x81\x84)|\xef(?P<wide>[\xbc\xbd][\x80-\xbf])",
    re.DOTALL,
)


def fold(text: bytes) -> bytes:
    """Lower case; runs of blanks, line ends and high bytes shortened; hidden ASCII brought out."""

    def ascii_of(m: re.Match[bytes]) -> bytes:
        if m["two"]:
            return bytes([((m[0][0] & 1) << 6) | (m["two"][0] & 63)])
        if m["skip"]:
            return b""
        if m["more"]:
            return bytes([m["more"][0] & 0x3F])
        if m["slash"]:
            return b"\\" if m["slash"] == b"\x88\x96" else b"/"
        cp = 0xF000 | ((m["wide"][0] & 63) << 6) | (m["wide"][1] & 63)
        return bytes([cp - 0xFEE0]) if 0xFF01 <= cp <= 0xFF5E else m[0]

    text = _OVERLONG.sub(ascii_of, text)
    text = re.sub(rb"[\x01-\x08\x0e-\x1f\x7f]", b"\x01", text)
    text = re.sub(rb"[\t\x0b\x0c ]+", b" ", text)
    text = re.sub(rb"[\r\n]+", b"\n", text)
    text = re.sub(rb"[\x80-\xff]+", lambda m: b"\x80" * min(3, len(m[0])), text)
    return text.lower()


# ---------------------------------------------------------------- tokens and buckets


def _word(word: bytes) -> int:
    text = word.decode("ascii")
    if text.isdigit():
        return 20 if len(text) == 1 else 21
    if len(text) <= 20 and text in KEYWORDS:
        return KEYWORDS[text]
    if any(c.isdigit() for c in text):
        if text.startswith("0x") and len(text) > 2:
            return 22
        return 23 if len(text) < 12 else 24
    return 16 if len(text) == 1 else 17 if len(text) < 4 else 18 if len(text) < 16 else 19


def tokens(text: bytes) -> list[int]:
    out: list[int] = []
    for m in re.finditer(
        rb"(?P<w>[a-zA-Z0-9_]+)|(?P<h>[\x80-\xff])|(?P<s> )|(?P<n>\n)|(?P<c>[\x00-\x1f\x7f])|(?P<p>.)",
        text,
        re.DOTALL,
    ):
        if m["w"]:
            out.append(_word(m["w"]))
        elif m["h"]:
            if not out or out[-1] != 5:
                out.append(5)
        elif m["n"]:
            out.append(10)
        elif m["c"]:
            out.append(m["c"][0] if m["c"][0] in (2, 3) else 1)
        elif m["p"]:
            out.append(m["p"][0])
    return out


def _first_seen(items: list[int]) -> list[int]:
    return list(dict.fromkeys(items))


def buckets(text: bytes) -> tuple[list[int], list[int]]:
    digits = re.sub(rb"[0-9]", b"0", text)
    digits = bytes(min(b, 128) for b in digits)
    grams = [int.from_bytes(digits[i : i + 3], "little") for i in range(len(digits) - 2)]
    trigrams = [((x * 0x9E3779B1) & M32) >> 16 for x in grams]
    found = []
    toks = tokens(text)
    for i in range(len(toks)):
        g = 0
        for k in range(min(5, i + 1)):
            g = ((g + toks[i - k] + 1) * 0x9E3779B1) & M32
            g ^= g >> 15
            found.append((((g + k) * 0x85EBCA6B) & M32) >> 18)
    return _first_seen(trigrams), _first_seen(found)


def windows(text: bytes) -> list[bytes]:
    """Windows of a value's folded text between its marks."""
    text = b"\x02" + text + b"\x03"
    out = []
    start = 0
    while True:
        window = text[start : start + WINDOW]
        if not out or window != out[-1]:
            out.append(window)
        if start + WINDOW >= len(text):
            return out
        start += STRIDE


def linear(weights: dict[str, Any], text: bytes) -> float:
    """Score of one window."""
    tri, tok = buckets(text)
    total = sum(float(weights["trigram"][b]) for b in tri) + sum(float(weights["token"][b]) for b in tok)
    return total / math.sqrt(len(tri) + len(tok) + 4) + float(weights["bias"])


# ---------------------------------------------------------------- taking JSON apart


def json_leaves(doc: Any, place: str = "json") -> list[tuple[str, str]]:
    """(place, text) of the string leaves of a parsed document, in order, with JSON in strings
    taken apart, too."""
    if isinstance(doc, dict):
        return [leaf for k, v in doc.items() for leaf in json_leaves(v, f"{place}.{k}")]
    if isinstance(doc, list):
        return [leaf for k, v in enumerate(doc) for leaf in json_leaves(v, f"{place}[{k}]")]
    if isinstance(doc, str):
        if re.match(r'\{\s*["}]|\[\s*["\[{\]\-0-9]', doc):
            try:
                inner = json.loads(doc)
            except ValueError:
                return [(place, doc)]
            return json_leaves(inner, place)
        return [(place, doc)]
    return []


# ---------------------------------------------------------------- lexical features


def lexical(
    window: bytes, score: float, value_bytes: int, rounds: int, variant: int, kind: str
) -> dict[str, float]:
    """The features of a window by name."""
    text = window.decode("latin-1")
    n = max(len(text), 1)
    counts = {c: text.count(c) for c in set(text)}
    toks = tokens(window)

    def kw(*names: str) -> int:
        return sum(toks.count(CLASS[name]) for name in names)

    def pairs(pattern: str) -> int:
        return len(re.findall(f"(?={pattern})", text))

    def chars(members: str) -> int:
        return sum(counts.get(c, 0) for c in members)

    runs = [len(r) for r in re.findall(r"[a-z0-9]+", text)]
    repeats = [len(m[0]) for m in re.finditer(r"(.)\1*", text, re.DOTALL)]
    return {
        "linear": score,
        "value_length": math.log2(value_bytes + 1),
        "window_length": len(text),
        "letters": sum("a" <= c <= "z" for c in text) / n,
        "digits": sum("0" <= c <= "9" for c in text) / n,
        "punctuation": sum(33 <= ord(c) <= 126 and not c.isalnum() for c in text) / n,
        "blanks": counts.get(" ", 0) / n,
        "high_bytes": sum(ord(c) >= 128 for c in text) / n,
        "control_bytes": sum((ord(c) < 32 or ord(c) == 127) and c not in "\n\x02\x03" for c in text),
        "newlines": counts.get("\n", 0),
        "entropy": -sum(v / n * math.log2(v / n) for v in counts.values()),
        "distinct_bytes": len(counts),
        "longest_word": max(runs, default=0),
        "longest_repeat": max(repeats, default=0),
        "quotes": chars("'\"`"),
        "angles": chars("<>"),
        "parentheses": chars("()"),
        "braces": chars("{}[]"),
        "slashes": chars("/"),
        "backslashes": chars("\\"),
        "double_dots": pairs(r"\.\."),
        "separators": chars(";|&"),
        "dollars": chars("$"),
        "equals": chars("="),
        "comment_marks": pairs(r"/\*") + chars("#") + pairs("--"),
        "percents": chars("%"),
        "template_marks": pairs(r"\{\{") + pairs(r"[$#@*]\{") + pairs("[<{]%"),
        "substitutions": pairs(r"\$\(") + chars("`"),
        "calls": pairs(r"[a-z0-9_\]/]\("),
        "quote_breaks": pairs(r"['\"][=<>();\-]"),
        "sql_verbs": kw("SQL_VERB", "SQL_META"),
        "sql_clauses": kw("SQL_CLAUSE", "SQL_LOGIC"),
        "sql_functions": kw("SQL_FUNC"),
        "html_strong": kw("HTML_STRONG"),
        "event_handlers": kw("EVENT"),
        "js_words": kw("JS_STRONG", "JS_WEAK"),
        "shell_strong": kw("SHELL_STRONG"),
        "shell_weak": kw("SHELL_WEAK"),
        "path_words": kw("PATH_DIR", "PATH_FILE"),
        "php_java_words": kw("PHP", "JAVA"),
        "template_words": kw("TEMPLATE", "PROTO"),
        "xml_ldap_words": kw("XML", "LDAP"),
        "scheme_words": kw("SCHEME", "SSRF", "JNDI"),
        "prose_words": kw("STOP", "TECH"),
        "tokens": len(toks),
        "rounds": rounds,
        "variant": variant,
        "kind": {"path": 1, "header": 2}.get(kind, 0),
    }


def unescape_html(text: str) -> str:
    """An independent opinion on numeric entities."""
    return html.unescape(text)
