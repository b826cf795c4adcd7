"""Labelled escalations for training and measuring judges, out of request records, payload lists, our own grammars and
the traffic simulator.

A text becomes the value of a recorded benign request, in an encoding that its place takes. The client's story comes
from simulated traffic that was replayed through the core: harmless payloads with a hostile story are `abuse`.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote_plus

from sidecar.judge import injection
from sidecar.judge.redact import path_shape, redact
from sidecar.judge.render import ENTRY_CHARS, atoms, decoded, render
from sidecar.judge.types import LABELS, STORY_MAX, TEXT_CHARS_MAX, Escalation, Label
from sidecar.train.dataset import Dataset, LabelledText, Record, Split, embed, evenly

# classes of the data sets and of our grammars -> labels; what isn't here is no example
CLASSES: dict[str, Label] = {
    **dict.fromkeys(("sqli", "SQL Injection"), "sql_injection"),
    **dict.fromkeys(("xss", "XSS Injection"), "cross_site_scripting"),
    **dict.fromkeys(("lfi", "File Inclusion", "Directory Traversal", "path-traversal"), "path_traversal"),
    **dict.fromkeys(("shell", "shock", "Command Injection", "cmdi", "cmdexe", "shellshock"), "command_injection"),
    **dict.fromkeys(("code", "ssti", "ssi", "jndi", "log4shell", "Server Side Include Injection"), "code_injection"),
    **dict.fromkeys(
        (
            "nosql",
            "mail",
            "crlf",
            "ldap",
            "xxe",
            "ssrf",
            "proto",
            "rfi",
            "XXE Injection",
            "LDAP Injection",
            "NoSQL Injection",
            "CRLF Injection",
        ),
        "other_injection",
    ),
    # the classes of a rule set's tests
    "REQUEST-930-APPLICATION-ATTACK-LFI": "path_traversal",
    "REQUEST-931-APPLICATION-ATTACK-RFI": "other_injection",
    "REQUEST-932-APPLICATION-ATTACK-RCE": "command_injection",
    "REQUEST-933-APPLICATION-ATTACK-PHP": "code_injection",
    "REQUEST-934-APPLICATION-ATTACK-GENERIC": "code_injection",
    "REQUEST-941-APPLICATION-ATTACK-XSS": "cross_site_scripting",
    "REQUEST-942-APPLICATION-ATTACK-SQLI": "sql_injection",
    "REQUEST-944-APPLICATION-ATTACK-JAVA": "code_injection",
}
VALUES_MAX = 64


@dataclass(frozen=True, slots=True)
class Example:
    """An escalation and what it is. core: the payload inside the text, where something was put around it."""

    escalation: Escalation
    label: Label
    source: str
    cls: str = ""
    core: str = ""


@dataclass(slots=True)
class Stories:
    """What simulated clients had been doing when they sent a request: (features by name, recent shapes)."""

    benign: list[tuple[dict[str, float], tuple[str, ...]]] = field(default_factory=list)
    abuse: list[tuple[dict[str, float], tuple[str, ...]]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


# ---------------------------------------------------------------- values of a request


def _leaves(value: Any, name: str, out: list[tuple[str, str]]) -> None:
    if len(out) >= VALUES_MAX:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            _leaves(inner, f"{name}.{str(key)[:40]}", out)
    elif isinstance(value, list):
        for inner in value:
            _leaves(inner, name, out)
    elif isinstance(value, str) and value:
        out.append((name, json.dumps(value)[1:-1]))


def values_of(record: Record) -> list[tuple[str, str]]:
    """(place, value as sent) of the values that the data plane would read, at most VALUES_MAX."""
    path, _, query = str(record.get("url", "")).partition("?")
    headers = {str(k).lower(): str(v) for k, v in dict(record.get("headers") or {}).items()}
    body = record.get("body") or ""
    body = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
    out: list[tuple[str, str]] = [("path", path)]
    for pair in query.split("&") if query else ():
        key, _, value = pair.partition("=")
        out.append((f"query.{unquote_plus(key)[:40]}", value or key))
    kind = headers.get("content-type", "")
    if body and record.get("body_enc") != "b64":
        if "json" in kind:
            try:
                _leaves(json.loads(body), "json", out)
            except (ValueError, RecursionError):
                out.append(("body", body))
        elif "form-urlencoded" in kind:
            for pair in body.split("&"):
                key, _, value = pair.partition("=")
                out.append((f"form.{unquote_plus(key)[:40]}", value or key))
        else:
            out.append(("body", body))
    for name in ("referer", "x-api-version", "x-forwarded-for"):
        if name in headers:
            out.append((f"header.{name}", headers[name]))
    for pair in headers.get("cookie", "").split(";"):
        key, _, value = pair.strip().partition("=")
        if value:
            out.append((f"cookie.{key[:40]}", value))
    if "user-agent" in headers:
        out.append(("agent", headers["user-agent"]))
    return [(place, value[:TEXT_CHARS_MAX]) for place, value in out[:VALUES_MAX] if value]


Score = Callable[[list[str]], Any]


def worst_value(record: Record, score: Score) -> tuple[str, str]:
    """The value that the inline text model finds worst."""
    values = values_of(record)
    if len(values) == 1:
        return values[0]
    scores = list(score([decoded(value, place) for place, value in values]))
    return values[scores.index(max(scores))]


# ---------------------------------------------------------------- escalations

_NAMES = (
    "q",
    "id",
    "name",
    "search",
    "query",
    "text",
    "title",
    "comment",
    "message",
    "filter",
    "url",
    "file",
    "path",
    "user",
    "email",
    "lang",
    "item",
    "data",
    "value",
    "content",
    "note",
    "subject",
    "code",
    "ref",
    "p",
    "page",
)
_CLIENTS = ("203.0.113.", "198.51.100.", "192.0.2.", "10.0.0.", "192.168.1.")


def client_of(rng: random.Random) -> str:
    """An address, mostly public."""
    if rng.random() < 0.1:
        return f"2001:db8::{rng.randrange(65536):x}"
    if rng.random() < 0.7:
        first = rng.choice((5, 23, 45, 81, 93, 104, 142, 185))
        return f"{first}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"
    return f"{rng.choice(_CLIENTS)}{rng.randrange(1, 255)}"


def _status_of(rng: random.Random, recorded: Any) -> int | None:
    if rng.random() < 0.5:
        return None
    return int(recorded) if recorded else rng.choice((200, 200, 200, 200, 201, 204, 302, 400, 403, 404, 500))


def escalation_of(
    rng: random.Random,
    record: Record,
    place: str,
    text: str,
    story: tuple[dict[str, float], tuple[str, ...]] | None = None,
) -> Escalation:
    """An escalation of this value of the record."""
    headers = {str(k).lower(): str(v) for k, v in dict(record.get("headers") or {}).items()}
    features, recent = story or ({}, ())
    return redact(
        Escalation(
            id=f"{rng.getrandbits(64):016x}",
            ts=0.0,
            service="",
            method=str(record.get("method", "GET")),
            path=str(record.get("url", "/")),
            client=client_of(rng),
            user_agent=headers.get("user-agent", ""),
            place=place,
            text=text,
            status=_status_of(rng, record.get("status")),
            story=features,
            recent=recent,
        )
    )


def placed(rng: random.Random, text: str) -> tuple[str, str]:
    """(place, the text as sent there)."""
    name = rng.choice(_NAMES)
    kind = rng.choices(("query", "form", "json", "path", "header", "cookie", "body"), (34, 18, 24, 10, 5, 3, 6))[0]
    if rng.random() < 0.3:
        return (kind if kind in ("path", "body") else f"{kind}.{name}"), text  # decoded by whoever wrote it down
    if kind in ("query", "form"):
        return f"{kind}.{name}", (quote_plus if rng.random() < 0.75 else quote)(text, errors="surrogatepass")
    if kind == "json":
        return f"json.{name}", json.dumps(text, ensure_ascii=rng.random() < 0.5)[1:-1]
    if kind == "path":
        return "path", "/" + quote(text, safe="/", errors="surrogatepass")
    if kind == "cookie":
        return f"cookie.{name}", quote(text, errors="surrogatepass")
    return (f"header.x-{name}" if kind == "header" else "body"), text


def stories(scenarios: Iterable[Any], seed: int, each_max: int = 6000) -> Stories:
    """Replay simulated traffic through the core; a story for each request kept, and examples of both labels.

    Kept are all kinds of requests about equally: those of attackers from their eighth request on, and of the others
    first those of whose clients there is something to say."""
    from native.arenafile import ArenaFile
    from native.engine import BEHAVIOUR_FEATURE_NAMES, Engine
    from sidecar.config import Settings
    from sidecar.judge.render import story_words
    from sidecar.policy import compile_policy
    from sidecar.simulate import simulate

    rng = random.Random(f"{seed}:stories")
    out = Stories()
    for scenario in scenarios:
        rows: dict[str, list[tuple[Any, dict[str, float], tuple[str, ...]]]] = defaultdict(list)
        past: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=STORY_MAX))
        seen: dict[str, int] = defaultdict(int)
        with tempfile.TemporaryDirectory(prefix="outrider-judge-") as scratch:
            arena = ArenaFile.create(str(Path(scratch) / "arena"), clients=65536, key=bytes(16))
            arena.write_policy(compile_policy(Settings()))
            # a busy machine must not change what a seed gives
            engine: Any = Engine(arena, keep_features=True, unhurried=True)
            for r in simulate(scenario):
                decision = engine.decide(
                    r.method, r.url, r.headers, body=r.body, client=r.client, principal=r.principal, ts=r.ts
                )
                client = r.client or ""
                seen[client] += 1
                kind = r.cls or "benign"
                rare = r.label == 1 or rng.random() < 0.25
                if rare and (r.label != 1 or seen[client] >= 8):
                    features = dict(zip(BEHAVIOUR_FEATURE_NAMES, map(float, decision.behaviour), strict=True))
                    if r.label != 1:  # of every kind of client, and of those with a story more
                        kind = f"benign{'+' if len(story_words(features)) > 1 else ''} {kind}"
                    key = kind
                    rows[key].append((r, features, tuple(past[client])))
                if r.status is not None:
                    engine.respond(decision, r.status, response_ms=r.response_ms, ts=r.ts)
                past[client].append(f"{r.method} {path_shape(r.url)} {r.status or ''}".strip())
        hostile = sum(not key.startswith("benign") for key in rows)
        for key, found in sorted(rows.items()):
            label: Label = "benign" if key.startswith("benign") else "abuse"
            share = each_max // 2 // max(1, hostile if label == "abuse" else len(rows) - hostile)
            for r, features, recent in rng.sample(found, min(len(found), share)):
                record = {
                    "method": r.method,
                    "url": r.url,
                    "headers": dict(r.headers),
                    "body": r.body,
                    "status": r.status,
                }
                # what isn't held against its text comes without one, or with a value that says nothing
                place, text = rng.choice(values_of(record)) if rng.random() < 0.5 else ("", "")
                (out.benign if label == "benign" else out.abuse).append((features, recent))
                e = escalation_of(rng, record, place, text, (features, recent))
                out.examples.append(Example(replace(e, status=r.status), label, "simulated", r.cls or ""))
    return out


# ---------------------------------------------------------------- examples


class Maker:
    """Makes examples of one split out of a dataset and of stories."""

    def __init__(self, data: Dataset, split: Split, told: Stories, seed: int) -> None:
        self.rng = random.Random(f"{seed}:examples:{split}")
        self.data, self.split, self.told = data, split, told
        self.hosts = data.hosts(split)

    def story(self, hostile: bool) -> tuple[dict[str, float], tuple[str, ...]] | None:
        rng = self.rng
        if hostile and self.told.abuse and rng.random() < 0.2:
            return rng.choice(self.told.abuse)
        return rng.choice(self.told.benign) if self.told.benign and rng.random() < 0.6 else None

    def text(self, t: LabelledText, disguise: float = 0.0, plain: bool = False) -> Example | None:
        """disguise: share that gets talk or filler around it. plain: nothing around it at all."""
        rng = self.rng
        label = CLASSES.get(t.cls) if t.label else "benign"
        if label is None:
            return None
        text, core = t.text, ""
        if not plain:
            if rng.random() < disguise:
                text, core = injection.wrap(rng, text, "train")[1], t.text
            elif t.label and rng.random() < 0.25:
                text = embed(rng, text, injection.filler(rng, "train", rng.randrange(3, 24)))
        place, sent = placed(rng, text)
        record = rng.choice(self.hosts)
        e = escalation_of(rng, record, place, sent, self.story(bool(t.label)))
        return Example(e, label, t.source, t.cls, core)

    def texts(self, label: int, limit: int, disguise: float = 0.0, plain: bool = False) -> list[Example]:
        found = (self.text(t, disguise, plain) for t in evenly(self.rng, self.data.values(self.split, label), limit))
        return [example for example in found if example is not None]

    def requests(self, score: Score, limit: int, others: float = 0.5) -> list[Example]:
        """Benign requests by their worst value, and some by any other one."""
        rng = self.rng
        found = [r for r in self.data.benign(self.split)]
        out = []
        for r in rng.sample(found, min(limit, len(found))):
            picked = [worst_value(r.record, score)]
            if rng.random() < others:
                picked.append(rng.choice(values_of(r.record)))
            for place, value in picked:
                e = escalation_of(rng, r.record, place, value, self.story(False))
                out.append(Example(e, "benign", r.source, r.group))
        return out


def entries(example: Example, rng: random.Random, chars_max: int = ENTRY_CHARS, most: int = 2) -> list[str]:
    """What a model is trained on: the whole entry, or some of its windows; of an attack those that show its payload."""
    shown = render(example.escalation, chars_max)
    if len(shown) == 1:
        return shown
    if example.label not in ("benign", "abuse"):
        core = "".join(atoms(example.core or decoded(example.escalation.text, example.escalation.place)))
        wanted = core[:40]
        shown = [s for s in shown if wanted in s]
    return rng.sample(shown, min(most, len(shown)))


def label_number(label: Label) -> int:
    return LABELS.index(label)
