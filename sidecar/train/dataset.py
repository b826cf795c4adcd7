"""Assemble labelled requests and texts from data files for the text models.

Files are told apart by their format, not by their name:

    request records (.jsonl[.gz]: method, url, ...)    label 0 or 1, group = meta.site, meta.repo, rule
    access logs     (.jsonl[.gz]: url, ua, ...)        benign requests, group = client
    texts           ({src, kind, text})                benign values, group = src
    payloads        ({src, cls, file, payload})        attack values, group = file
    user agents     ({kind, pattern, ua})              benign User-Agent headers, group = pattern
    CSV             (payload,length,attack_type,label) values of both labels, group = attack type

Labels of attack requests from test suites say nothing about headers and hosts, so only what carries
the attack is taken from them, and put into benign requests. Splits go by group: every site,
repository or payload file is in one split only, never divided at random.
"""
from __future__ import annotations

import copy
import csv
import gzip
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, quote_plus, unquote_plus

from sidecar.train.attack_grammar import attack_texts
from sidecar.train.benign_grammar import benign_texts

Record = dict[str, Any]
Split = Literal["train", "calibrate", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "calibrate", "holdout")


@dataclass(frozen=True, slots=True)
class LabelledRequest:
    """A request record with what is known of it. cls names the attack's class or the benign kind."""

    record: Record
    label: int
    source: str
    group: str
    split: Split
    cls: str = ""


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A single value, decoded as an application would see it. prefix/suffix-free."""

    text: str
    label: int
    source: str
    group: str
    split: Split
    cls: str = ""


@dataclass(slots=True)
class Dataset:
    """Benign requests as recorded, values of both labels, and how to make requests of them."""

    requests: list[LabelledRequest] = field(default_factory=list)
    texts: list[LabelledText] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)   # reason -> entries left out

    def benign(self, split: Split) -> list[LabelledRequest]:
        """Recorded benign requests of a split."""
        return [r for r in self.requests if r.split == split and r.label == 0]

    def hosts(self, split: Split) -> list[Record]:
        """Real traffic of a split, for texts to be put into: no test suite's requests."""
        found = [r.record for r in self.benign(split) if not _is_suite(r.record) and r.cls != "agent"]
        return found or [_PLAIN_HOST]

    def values(self, split: Split, label: int) -> list[LabelledText]:
        """Single values of a split."""
        return [t for t in self.texts if t.split == split and t.label == label]

    def labelled_requests(self, split: Split, seed: int = 0, attacks_max: int = 20000,
                          texts_max: int = 20000) -> list[LabelledRequest]:
        """What a model of whole requests learns from or is measured on: the benign requests, the
        benign texts put into some of them, the attacks put into others (at most so many, drawn
        evenly over their groups)."""
        rng = random.Random(f"{seed}:{split}")
        hosts = self.hosts(split)
        out = self.benign(split)
        for label, limit in ((0, texts_max), (1, attacks_max)):
            for t in evenly(rng, self.values(split, label), limit):
                record = transplant(rng, rng.choice(hosts), t.text)
                out.append(LabelledRequest(record, label, t.source, t.group, split, t.cls))
        return out


_PLAIN_HOST: Record = {"method": "GET", "url": "/", "headers": {"host": "example.test", "accept": "*/*"}}


def evenly(rng: random.Random, items: list[LabelledText], limit: int) -> list[LabelledText]:
    """At most `limit` items, with the large groups cut first."""
    if len(items) <= limit:
        return items
    groups: dict[str, list[LabelledText]] = defaultdict(list)
    for item in items:
        groups[f"{item.source}/{item.group}"].append(item)
    out: list[LabelledText] = []
    left = limit
    for k, name in enumerate(sorted(groups, key=lambda g: len(groups[g]))):
        share = left // (len(groups) - k)
        take = groups[name] if len(groups[name]) <= share else rng.sample(groups[name], share)
        out += take
        left -= len(take)
    return out


# ---------------------------------------------------------------- splits

def split_groups(sizes: dict[str, int], holdout: float = 0.2, calibrate: float = 0.15) -> dict[str, Split]:
    """Assign every group to a split by the hash of its name: groups are taken in that order until the
    hold-out has its share of entries, then calibration, the rest is for training. A group larger than
    the share left is passed over, so that one large group doesn't starve training."""
    total = sum(sizes.values())
    order = sorted(sizes, key=lambda g: hashlib.blake2b(g.encode(), digest_size=8).digest())
    out: dict[str, Split] = {}
    for split, share in (("holdout", holdout), ("calibrate", calibrate)):
        need = share * total
        have = 0
        for g in order:
            if g not in out and have < need and sizes[g] <= max(1.6 * (need - have), 1):
                out[g] = split  # type: ignore[assignment]
                have += sizes[g]
    return {g: out.get(g, "train") for g in order}


# ---------------------------------------------------------------- files

def _lines(path: Path) -> Iterator[str]:
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as f:
        yield from f


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def read_file(path: Path) -> Iterator[Record]:
    """Entries of a JSON Lines or CSV file, compressed or not. ValueError names the line that is wrong."""
    if path.name.removesuffix(".gz").endswith(".csv"):
        yield from csv.DictReader(_lines(path))
        return
    for k, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path}:{k}: not JSON: {e}") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{path}:{k}: expected an object")
            yield entry


_BARE = re.compile(r"[\w .\-]*")
_PLAIN_PATH = re.compile(r"[/\\\w .:~@\-]+")
_TELLING = re.compile(
    r"\.\.|etc/|/proc/|/var/log|boot\.ini|win\.ini|\.ssh|passwd|system32|\.git/|\.env|/self/", re.IGNORECASE)
_UNTOLD = {"Open Redirect", "Insecure Management Interface"}


def attack_text(cls: str, text: str) -> str | None:
    """The payload as an attack's value, None where it is no attack by itself: bare words, file names
    and paths that say nothing, comment lines of the list, classes that are a matter of context."""
    text = text.strip("\r\n").replace("{FILE}", "etc/passwd")
    if cls in _UNTOLD or len(text) < 3 or len(text) > 20000:
        return None
    if text.startswith("# ") or _BARE.fullmatch(text) or text.startswith("convert.iconv"):
        return None
    if _PLAIN_PATH.fullmatch(text) and not _TELLING.search(text):
        return None
    return text


def carried_texts(record: Record) -> list[str]:
    """The values of an attack request that may carry the attack: what is decoded from path, query,
    body and headers, without the parts every client sends."""
    out: list[str] = []
    path, _, query = str(record.get("url", "")).partition("?")
    body = str(record.get("body") or "")
    headers = {str(k).lower(): str(v) for k, v in (record.get("headers") or {}).items()}
    kind = headers.get("content-type", "")
    text = unquote_plus(path, errors="surrogateescape")
    if ".." in text or re.search(r"[^\w/.\-~]", text) or not (query or body):
        # test suites answer under /get and /post
        out.append(re.sub(r"^/(?:get|post)/", "", text))
    pairs = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    if body and "json" not in kind and "xml" not in kind and "multipart" not in kind:
        pairs += parse_qsl(body, keep_blank_values=True, errors="surrogateescape") or [("", body)]
    elif body:
        out.append(body)
    for key, value in pairs:
        out += [key, value] if key and not re.fullmatch(r"[\w.\-]*", key) else [value]
    for name in ("user-agent", "referer", "cookie", "x-forwarded-for", "x-api-version"):
        if name in headers and "Mozilla/5.0" not in headers[name][:12] and "CRS" not in headers[name]:
            out.append(headers[name])
    return [v for v in out if v]


def load(paths: Iterable[Path], seed: int = 0, grammar_texts: int = 120_000) -> Dataset:
    """Read the files and add texts of our own grammars, split by group. ValueError where a file has
    no known format."""
    data = Dataset()
    for path in paths:
        _load_file(data, path)
    rng = random.Random(f"{seed}:grammar")
    if grammar_texts:
        # templates of a class are shared between splits, so grammar texts are for training only;
        # what they are worth shows on the other sources' hold-outs
        for cls, text in attack_texts(rng, grammar_texts // 2):
            kept = attack_text(cls, text)
            if kept:
                data.texts.append(LabelledText(kept, 1, "attack_grammar", cls, "train", cls))
        for cls, text in benign_texts(rng, grammar_texts // 2):
            data.texts.append(LabelledText(text, 0, "benign_grammar", cls, "train", cls))
    _drop_repeats(data)
    return data


def _drop_repeats(data: Dataset) -> None:
    """One copy of each attack text: the first split that has it keeps it, hold-out first."""
    order = {"holdout": 0, "calibrate": 1, "train": 2}
    seen: set[tuple[int, str]] = set()
    kept: list[LabelledText] = []
    for t in sorted(data.texts, key=lambda t: order[t.split]):
        key = (t.label, re.sub(r"\d+", "0", t.text.lower()))
        if key in seen:
            data.skipped["repeated text"] += 1
            continue
        seen.add(key)
        kept.append(t)
    data.texts = kept


def _load_file(data: Dataset, path: Path) -> None:
    entries = list(read_file(path))
    source = _stem(path)
    if not entries:
        return
    first = entries[0]
    if "payload" in first and "attack_type" in first:
        _texts(data, source, entries, lambda e: (str(e["payload"]), int(e["label"] != "norm"),
                                                 str(e["attack_type"]), str(e["attack_type"])), whole=True)
    elif "payload" in first:
        _texts(data, source, entries, lambda e: (str(e["payload"]), 1, str(e["file"]), str(e["cls"])))
    elif "text" in first and "kind" in first:
        _texts(data, source, entries, lambda e: (str(e["text"]), 0, str(e["src"]), str(e["kind"])))
    elif "pattern" in first and "ua" in first:
        splits = split_groups(Counter(str(e["pattern"]) for e in entries))
        for e in entries:
            g = str(e["pattern"])
            record = {"method": "GET", "url": "/", "headers": {"user-agent": e["ua"]}}
            data.requests.append(LabelledRequest(record, 0, source, g, splits[g], "agent"))
    elif "method" in first and "url" in first:
        _records(data, source, entries)
    else:
        raise ValueError(f"{path}: unknown format (first entry has {', '.join(sorted(first)[:8])})")


def _texts(data: Dataset, source: str, entries: list[Record],
           parts: Callable[[Record], tuple[str, int, str, str]], whole: bool = False) -> None:
    """whole: the file is one source and trains as a whole."""
    rows = [parts(e) for e in entries]
    splits = split_groups(Counter(group for _, _, group, _ in rows))
    for text, label, group, cls in rows:
        kept = attack_text(cls, text) if label else text
        if not kept:
            data.skipped["no attack by itself"] += 1
            continue
        data.texts.append(LabelledText(kept, label, source, group, "train" if whole else splits[group], cls))


def _group_of(e: Record) -> str:
    meta = e.get("meta") or {}
    group = meta.get("site") or meta.get("repo") or meta.get("rule") or e.get("client") or e.get("cls") or ""
    return str(group)


def _is_suite(e: Record) -> bool:
    """From a rule set's test suite."""
    return "rule" in (e.get("meta") or {})


def _about_payloads(e: Record) -> bool:
    """False for tests of rules that are about protocol and limits, not about what a value says."""
    return not _is_suite(e) or 930000 <= int(e["meta"]["rule"]) < 950000


def _records(data: Dataset, source: str, entries: list[Record]) -> None:
    rows = [e for e in entries if e.get("label", 0) in (0, 1) and _about_payloads(e)]
    splits = split_groups(Counter(_group_of(e) for e in rows))
    for e in rows:
        group = _group_of(e)
        split = splits[group]
        label = int(e.get("label") or 0)
        cls = str(e.get("cls") or "")
        if label == 0:
            data.requests.append(LabelledRequest(e, 0, source, group, split, cls))
            continue
        for text in carried_texts(e):
            kept = attack_text(cls, text)
            if kept:
                data.texts.append(LabelledText(kept, 1, source, group, split, cls))
            else:
                data.skipped["no attack by itself"] += 1


# ---------------------------------------------------------------- transplants

def embed(rng: random.Random, text: str, filler: str) -> str:
    """The payload inside a benign value: behind it, in front of it, or in its middle."""
    match rng.randrange(4):
        case 0:
            return filler + text
        case 1:
            return f"{filler} {text}"
        case 2:
            return text + filler
        case _:
            cut = rng.randrange(len(filler) + 1)
            return filler[:cut] + text + filler[cut:]


def _set_header(record: Record, name: str, value: str) -> None:
    headers = {k: v for k, v in record["headers"].items() if str(k).lower() != name.lower()}
    headers[name] = value
    record["headers"] = headers


def _put_query(rng: random.Random, r: Record, text: str) -> None:
    path, _, query = str(r["url"]).partition("?")
    pairs = query.split("&") if query else []
    enc = (quote_plus if rng.random() < 0.8 else quote)(text, errors="surrogatepass")
    if pairs and rng.random() < 0.5:
        k = rng.randrange(len(pairs))
        pairs[k] = f"{pairs[k].partition('=')[0]}={enc}"
    else:
        pairs.insert(rng.randrange(len(pairs) + 1), f"{rng.choice(_NAMES)}={enc}")
    r["url"] = path + "?" + "&".join(pairs)


def _put_path(rng: random.Random, r: Record, text: str) -> None:
    path, mark, query = str(r["url"]).partition("?")
    segments = path.split("/")
    enc = quote(text, safe="/" if rng.random() < 0.5 else "", errors="surrogatepass")
    if rng.random() < 0.3:
        segments = ["", enc]
    else:
        segments.insert(rng.randrange(1, len(segments) + 1), enc)
    r["url"] = "/".join(segments) + mark + query


def _put_form(rng: random.Random, r: Record, text: str) -> None:
    fields = [(rng.choice(_NAMES), rng.choice(_VALUES)) for _ in range(rng.randrange(4))]
    fields.insert(rng.randrange(len(fields) + 1), (rng.choice(_NAMES), text))
    r["method"] = "POST"
    r["body"] = "&".join(f"{k}={quote_plus(v, errors='surrogatepass')}" for k, v in fields)
    r["body_enc"] = "utf8"
    _set_header(r, "content-type", "application/x-www-form-urlencoded")


def _put_json(rng: random.Random, r: Record, text: str) -> None:
    doc: Any = {rng.choice(_NAMES): rng.choice(_VALUES) for _ in range(rng.randrange(4))}
    value: Any = text
    for _ in range(rng.randrange(3)):
        value = {rng.choice(_NAMES): value} if rng.random() < 0.7 else [value]
    doc[rng.choice(_NAMES)] = value
    r["method"] = rng.choice(["POST", "PUT", "PATCH"])
    r["body"] = json.dumps(doc, ensure_ascii=rng.random() < 0.5)
    r["body_enc"] = "utf8"
    _set_header(r, "content-type", "application/json")


def _put_multipart(rng: random.Random, r: Record, text: str) -> None:
    mark = f"----form{rng.randrange(10**12)}"
    r["method"] = "POST"
    r["body"] = (f'--{mark}\r\nContent-Disposition: form-data; name="{rng.choice(_NAMES)}"\r\n\r\n'
                 f"{text}\r\n--{mark}--\r\n")
    r["body_enc"] = "utf8"
    _set_header(r, "content-type", f"multipart/form-data; boundary={mark}")


def _put_header(rng: random.Random, r: Record, text: str) -> None:
    name = rng.choice(_HEADERS)
    _set_header(r, name, text.replace("\r", " ").replace("\n", " "))


def _put_cookie(rng: random.Random, r: Record, text: str) -> None:
    old = next((str(v) for k, v in r["headers"].items() if str(k).lower() == "cookie"), "")
    new = f"{rng.choice(_NAMES)}={quote(text, errors='surrogatepass')}"
    _set_header(r, "cookie", f"{old}; {new}".lstrip("; "))


_HEADERS = ["x-search", "x-api-version", "x-client-info", "x-forwarded-for", "referer", "user-agent"]
_NAMES = [
    "q", "id", "name", "search", "query", "text", "title", "comment", "message", "filter", "sort", "page",
    "url", "file", "path", "user", "email", "lang", "category", "item", "data", "value", "content",
    "description", "note", "subject", "address", "city", "code", "token", "ref",
]
_VALUES = ["1", "true", "en", "summer", "blue shoes", "2024-05-01", "alice@example.test", "Main Street 5"]
_PLACES: list[tuple[int, Callable[[random.Random, Record, str], None]]] = [
    (30, _put_query), (12, _put_path), (20, _put_form), (25, _put_json), (6, _put_multipart),
    (4, _put_header), (3, _put_cookie),
]


def transplant(rng: random.Random, host: Record, text: str) -> Record:
    """A copy of the benign request with the text in one of its values: query (most often), JSON leaf,
    form, path segment, multipart field, header or cookie."""
    r: Record = {k: copy.copy(v) for k, v in host.items() if k not in ("meta", "id", "label", "cls")}
    r["headers"] = dict(r.get("headers") or {})
    put = rng.choices([p for _, p in _PLACES], [w for w, _ in _PLACES])[0]
    put(rng, r, text)
    return r
