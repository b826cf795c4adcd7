"""What the parts of the judge hand to each other. All of it is bounded when it is made, and travels as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal, Self, get_args

import orjson
from pydantic import TypeAdapter, ValidationError

TEXT_CHARS_MAX = 8192
NAME_CHARS_MAX = 256
STORY_MAX = 8
WIRE_BYTES_MAX = 128 * 1024

SHORT = ("id", "service", "method", "client", "authority", "user_agent", "route", "place", "body_type")

Label = Literal[
    "benign",
    "sql_injection",
    "cross_site_scripting",
    "path_traversal",
    "command_injection",
    "code_injection",
    "other_injection",  # XML, LDAP, NoSQL, header, server-side requests
    "abuse",  # what the client does rather than what it sends: guessing, enumerating, scanning
]
LABELS: tuple[Label, ...] = get_args(Label)
Why = Literal["uncertain", "novel", "sampled"]
Scope = Literal["address", "principal", "payload"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class WireError(ValueError):
    """What came from a store or a stream isn't one of ours; says what is wrong with it."""


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


class Wire:
    """What travels: JSON with the fields of a dataclass. Unknown fields are left out, so that pods of two versions can
    speak to each other while one replaces the other."""

    __slots__ = ()

    def to_wire(self) -> bytes:
        return orjson.dumps(asdict(self))  # type: ignore[call-overload]

    @classmethod
    def from_wire(cls, data: bytes) -> Self:
        """Raises WireError."""
        if len(data) > WIRE_BYTES_MAX:
            raise WireError(f"{len(data)} bytes are more than {WIRE_BYTES_MAX}")
        try:
            made: Self = _adapter(cls).validate_json(data)  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise WireError(f"not a {cls.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return made


@dataclass(frozen=True, slots=True)
class Escalation(Wire):
    """One request that the inline models couldn't settle, redacted and cut.

    ts: unix seconds. client: address as text. client_key, principal_key, payload_key: the arena's keyed hashes, 0 for
    none; equal in all pods that share client.key_file. text: the value that looked worst, as sent. story: features of
    the client's windows by name; recent: its last requests' shapes ("GET /users/* 404"), newest last.
    """

    id: str
    ts: float
    service: str
    method: str
    path: str
    why: Why = "uncertain"
    client: str | None = None
    client_key: int = 0
    principal_key: int = 0
    payload_key: int = 0
    authority: str = ""
    user_agent: str = ""
    route: str = ""
    place: str = ""
    text: str = ""
    body_type: str = ""
    status: int | None = None
    score: float = 0.0
    score_text: float = 0.0
    score_behaviour: float = 0.0
    reasons: tuple[str, ...] = ()
    story: dict[str, float] = field(default_factory=dict)
    recent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SHORT:
            value = getattr(self, name)
            if value is not None and len(value) > NAME_CHARS_MAX:
                object.__setattr__(self, name, value[:NAME_CHARS_MAX])
        object.__setattr__(self, "path", self.path[:TEXT_CHARS_MAX])
        object.__setattr__(self, "text", self.text[:TEXT_CHARS_MAX])
        object.__setattr__(self, "recent", tuple(shape[:NAME_CHARS_MAX] for shape in self.recent[-STORY_MAX:]))



@dataclass(frozen=True, slots=True)
class Judgement(Wire):
    """What a model says of one escalation. label None: it abstains. probabilities: calibrated, by label, sum 1. mass:
    the labels' share of the whole vocabulary's probability (of the worst window)."""

    escalation: str
    label: Label | None
    confidence: float
    probabilities: dict[str, float]
    mass: float
    windows: int
    model: str  # hash of the model's folder
    took_ms: float = 0.0

    @property
    def malicious(self) -> float:
        """1 - P(benign)."""
        return 1.0 - self.probabilities.get("benign", 0.0)



@dataclass(frozen=True, slots=True)
class Decision(Wire):
    """An entry for every pod's blocklist. id names it; the same scope and key replace one another. action: block,
    challenge or throttle. expires, decided: unix seconds by the store's clock. undone: it holds no more.

    key: of a payload or principal the arena's keyed hash, equal in pods that share client.key_file; of an address a
    plain hash of its text, as each pod finds its own key for `address`.

    provenance: model (hash), label, probabilities, mass, confidence, event (the escalation's id), who (judge's name or
    the operator's)."""

    id: str
    scope: Scope
    key: int
    action: str
    label: str
    confidence: float
    decided: float
    expires: float
    shown: str = ""  # for people: the address, or the payload's beginning, escaped
    undone: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    address: str = ""
