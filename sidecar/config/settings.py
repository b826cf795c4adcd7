"""Everything an operator can set, declared once: name, meaning, default, bounds.

The models are frozen. A field's name carries its unit (`budget_us`), its alias is the key that an
operator writes (`budget: 1ms`). From these models come the JSON Schema, CONFIGURATION.md and the
list of settings that need a restart; there is no second list of settings anywhere.

Load a file with sidecar.config.load; building models by hand checks single values only, not what
holds between them (sidecar/config/checks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from sidecar.config.arena import Arena
from sidecar.config.detectors import Detectors
from sidecar.config.escalation import Escalation, RouteEscalation
from sidecar.config.judge import Judge
from sidecar.config.judge_store import JudgeStore
from sidecar.config.listen import Listen
from sidecar.config.section import (
    BUDGET_MAX,
    LISTED_MAX,
    RESTART,
    ROUTES_MAX,
    ActionName,
    BodyMode,
    Mode,
    Score,
    Section,
    StageName,
)
from sidecar.config.types import (
    Boolean,
    BundlePath,
    ClaimName,
    CookieName,
    Duration,
    FilePath,
    HeaderName,
    Integer,
    LogTarget,
    Method,
    Name,
    NetworkRange,
    OnlyTrue,
    PathPattern,
    Size,
    TcpAddress,
    refused,
)


class Service(Section):
    """What this Outrider guards and how strict it is."""

    name: Name = Field(
        "outrider",
        description="Name of the guarded service, as it stands in the decision log.",
        examples=["orders-api"],
    )
    mode: Mode = Field(
        "enforce",
        description=(
            "observe decides and records but lets everything pass, at most tagged; enforce carries "
            "decisions out."
        ),
    )
    failure: Literal["open", "closed"] = Field(
        "open",
        description=(
            "What is to become of a request that cannot be judged because something broke: open lets it "
            "pass, closed refuses it. Envoy carries this out: set its failure_mode_allow to match (true for "
            "open). Outrider reports a failure to Envoy as an error and never as a refusal; here the setting "
            "is a statement, shown by outrider check and in the log."
        ),
    )


class Admin(Section):
    """Where probes and Prometheus reach Outrider: /healthz, /readyz, /metrics."""

    address: TcpAddress | None = Field(
        "127.0.0.1:9902",
        json_schema_extra=RESTART,
        description=(
            "address:port, or null for none. What it serves names no client and no URL, but needs no "
            "password either: "
            "keep it inside the pod or cluster."
        ),
        examples=["127.0.0.1:9902", "0.0.0.0:9902"],
    )


_GIVEN: dict[str, Any] = {"not": {"type": "null"}}


class PrincipalSource(Section):
    """One place where a request may say who is calling. Exactly one of header, cookie,
    jwt_claim and basic."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["jwt_claim"], "properties": {"jwt_claim": _GIVEN}},
                {"required": ["header"], "properties": {"header": _GIVEN, "jwt_claim": {"type": "null"}}},
                {"required": ["cookie"], "properties": {"cookie": _GIVEN}},
                {"required": ["basic"], "properties": {"basic": _GIVEN}},
            ]
        }
    )

    header: HeaderName | None = Field(
        None,
        description=(
            "The value of this header, as an API key. Beside jwt_claim: the header that carries the token."
        ),
        examples=["x-api-key"],
    )
    cookie: CookieName | None = Field(None, description="The value of this cookie.", examples=["session"])
    jwt_claim: ClaimName | None = Field(
        None,
        description=(
            "This claim of the bearer token in `header` (default authorization). The token is read, not "
            "verified: "
            "verifying is the proxy's work (Envoy: jwt_authn)."
        ),
        examples=["sub"],
    )
    basic: OnlyTrue | None = Field(None, description="true: the user name of HTTP basic authentication.")

    @model_validator(mode="after")
    def _one_kind(self) -> PrincipalSource:
        kinds = [
            name
            for name, value in (("jwt_claim", self.jwt_claim), ("cookie", self.cookie), ("basic", self.basic))
            if value
        ]
        if self.header and not self.jwt_claim:
            kinds.append("header")
        if len(kinds) != 1:
            raise refused(
                f"names {' and '.join(kinds)} at once" if kinds else "names no place to look at",
                "give each list item one of header, cookie, jwt_claim or basic, as - header: x-api-key",
            )
        return self

    @property
    def kind(self) -> Literal["header", "cookie", "jwt_claim", "basic"]:
        if self.jwt_claim:
            return "jwt_claim"
        if self.cookie:
            return "cookie"
        return "basic" if self.basic else "header"

    @property
    def header_name(self) -> str:
        """The header to read, in lower case."""
        if self.kind == "cookie":
            return "cookie"
        return self.header or "authorization"


class Client(Section):
    """How a request is tied to a client."""

    trusted_hops: Integer = Field(
        0,
        ge=0,
        le=16,
        description=(
            "How many trusted proxies stand in front of Envoy (Envoy's xff_num_trusted_hops): that many "
            "entries "
            "of `address_header` are passed over, counted from its right end. With 0 and x-forwarded-for the "
            "address that Envoy reports is taken."
        ),
    )
    address_header: HeaderName = Field(
        "x-forwarded-for",
        description=(
            "The header that names the client's address. Only one that your own proxies write or append to: "
            "anything else can be sent by anyone."
        ),
        examples=["x-forwarded-for", "x-real-ip"],
    )
    principal: tuple[PrincipalSource, ...] = Field(
        (PrincipalSource(header="x-api-key"), PrincipalSource(jwt_claim="sub"), PrincipalSource(basic=True)),
        max_length=8,
        description=(
            "Where to look for who is calling, in this order; the first that the request carries counts. "
            "What is found is "
            "hashed with the key below and never stored in clear."
        ),
    )
    key_file: FilePath | None = Field(
        None,
        json_schema_extra=RESTART,
        description=(
            "File with the secret (16 to 4096 bytes) that principals are hashed with; readable by Outrider "
            "only. "
            "null draws a key for each new arena. Secrets stand in files, never in this configuration; "
            "environment "
            "variables are not substituted."
        ),
        examples=["/run/secrets/outrider/key"],
    )


class Latency(Section):
    """The time a decision may take, and what gives way when it runs out."""

    budget_us: Annotated[int, Duration("10us", BUDGET_MAX)] = Field(
        1000,
        alias="budget",
        description=("Time for one decision. A stage that would overrun it is left out and counted."),
        examples=["250us", "1ms"],
    )
    skip: tuple[StageName, ...] = Field(
        ("random_forest", "xgboost", "text", "behaviour"),
        max_length=4,
        description=(
            "Which stages may be left out, the first to give way first. A stage that isn't named always runs; the "
            "text then still ends when the time is up, with what it has read."
        ),
    )
    shed: Boolean = Field(
        True,
        description=(
            "true: a route of whose decisions more than 1% overrun leaves stages out altogether, in the order of "
            "skip, one more each time, and takes them back one by one when it recovers."
        ),
    )
    recover_s: Annotated[int, Duration("1s", "5m", "s")] = Field(
        1,
        alias="recover",
        description=(
            "How long a route does without a stage before it tries it again. Doubles with each trial that fails, "
            "up to 5 minutes."
        ),
        examples=["1s", "30s"],
    )


class TextSettings(Section):
    """How the text of a request is read."""

    body_mode: BodyMode = Field(
        "buffered",
        description=(
            "How bodies reach Outrider where no route says otherwise: none leaves them unread, buffered "
            "waits for the "
            "body (up to `body`) before the upstream sees any of it, streamed reads along."
        ),
    )
    body_bytes: Annotated[int, Size("0B", "1MiB")] = Field(
        65536,
        alias="body",
        description=(
            "How much of a body is read; a longer one is judged by its first part, and the decision says so."
        ),
    )
    decode_rounds: Integer = Field(
        3,
        ge=0,
        le=5,
        description=(
            "How often a value is decoded again (percent, entities, Unicode escapes), against nested "
            "encodings."
        ),
    )
    values: Integer = Field(1024, ge=1, le=4096, description="Most values of one request that are looked at.")
    windows: Integer = Field(
        2048,
        ge=1,
        le=8192,
        description=(
            "Most windows (160 bytes each, half overlapping) over all values of one request that are scored."
        ),
    )
    headers: tuple[HeaderName, ...] | None = Field(
        None,
        max_length=32,
        description=(
            "Request headers whose values are read, null for every header whose value isn't of a fixed, plain "
            "shape (a number, a date, a token)."
        ),
        examples=[["user-agent", "referer", "cookie"]],
    )


class Thresholds(Section):
    """From which score (0 harmless, 1 attack) each action applies; null for never. The scores are
    calibrated by the share of benign requests that reach them: 0.5 one in a hundred, 0.8 one in a
    thousand, 0.9 one in two thousand."""

    tag: Score | None = Field(
        0.5, description="Pass on, with x-outrider-score and x-outrider-action for the upstream."
    )
    throttle: Score | None = Field(
        0.8,
        description=(
            "Refuse for now: answers.throttle. For scores of behaviour; a text between this and the next "
            "threshold is tagged: slowing down doesn't make it harmless."
        ),
    )
    challenge: Score | None = Field(
        None,
        description=(
            "Ask for proof that a person or a known client is calling. Not built yet: answered as a block."
        ),
    )
    block: Score | None = Field(0.9, description="Refuse: answers.block.")


class BlockAnswer(Section):
    """What a blocked client is told."""

    status: Integer = Field(
        403, ge=400, le=599, description="HTTP status; the body is problem+json (RFC 9457)."
    )


class ThrottleAnswer(Section):
    """What a throttled client is told."""

    status: Integer = Field(
        429, ge=400, le=599, description="HTTP status; the body is problem+json (RFC 9457)."
    )
    retry_after_s: Annotated[int, Duration("1s", "1h", "s")] = Field(
        30, alias="retry_after", description="The Retry-After header, whole seconds."
    )


Told = Literal["all", "flagged", "none"]


class Answers(Section):
    """How refusals look, and who is told of a decision."""

    block: BlockAnswer = Field(BlockAnswer(), description="The answer of the action block.")
    throttle: ThrottleAnswer = Field(ThrottleAnswer(), description="The answer of the action throttle.")
    headers: Told = Field(
        "flagged",
        description=(
            "Of which decisions the service hears in x-outrider-action, -score and -id: all; flagged, which is all but "
            "the plainly allowed; none. Clients never see them, and never set them. all costs Envoy some 6 "
            "microseconds of CPU per request."
        ),
    )
    metadata: Told = Field(
        "flagged",
        description=(
            "Of which decisions Envoy gets the whole record as dynamic metadata (namespace outrider), for its access "
            "log. all costs Envoy some 10 microseconds of CPU per request; the headers can be logged more cheaply."
        ),
    )


class RouteThresholds(Section):
    """Thresholds of one route; what is left out is taken from `thresholds`, null is never."""

    tag: Score | None = Field(None, description="As thresholds.tag.")
    throttle: Score | None = Field(None, description="As thresholds.throttle.")
    challenge: Score | None = Field(None, description="As thresholds.challenge.")
    block: Score | None = Field(None, description="As thresholds.block.")


class Route(Section):
    """What differs for some paths. The first route that matches a request counts; where none does,
    the service's settings do."""

    name: Name = Field(
        description="Its name in logs and decisions; each name once.", examples=["login"]
    )
    path: PathPattern = Field(
        description=(
            "The path, without query: exact; * for one whole segment; ** as the last segment for all that "
            "follows."
        ),
        examples=["/login", "/users/*/orders", "/api/**"],
    )
    methods: tuple[Method, ...] = Field(
        (),
        max_length=16,
        description=(
            "Only these methods; empty for all. Others than GET HEAD POST PUT PATCH DELETE OPTIONS count "
            "as one."
        ),
        examples=[["POST", "PUT"]],
    )
    mode: Mode | None = Field(None, description="As service.mode; null takes that.")
    budget_us: Annotated[int, Duration("10us", BUDGET_MAX)] | None = Field(
        None, alias="budget", description="As latency.budget; null takes that."
    )
    body: BodyMode | None = Field(None, description="As text.body_mode; null takes that.")
    body_limit_bytes: Annotated[int, Size("0B", "1MiB")] | None = Field(
        None, alias="body_limit", description="As text.body and at most that; null takes that."
    )
    thresholds: RouteThresholds = Field(
        RouteThresholds(), description="As thresholds; what is left out is taken from there."
    )
    escalation: RouteEscalation = Field(
        RouteEscalation(), description="As escalation; what is left out is taken from there."
    )
    exempt: Boolean = Field(False, description="true: requests pass unread. Blocked addresses stay blocked.")
    login: Boolean = Field(
        False, description="true: this is a login; failures count for brute_force and credential_stuffing."
    )


class Lists(Section):
    """Address ranges that are settled beforehand."""

    allow: tuple[NetworkRange, ...] = Field(
        (),
        max_length=LISTED_MAX,
        description="Never refused; wins over everything else.",
        examples=[["10.0.0.0/8", "2001:db8::/32"]],
    )
    block: tuple[NetworkRange, ...] = Field(
        (), max_length=LISTED_MAX, description="Always refused.", examples=[["198.51.100.0/24"]]
    )


class Models(Section):
    """The trained models."""

    bundle: BundlePath = Field(
        "default",
        description=(
            "The folder of a model bundle (outrider train), or default for the one that ships with Outrider."
        ),
        examples=["default", "/etc/outrider/bundle"],
    )
    cache: FilePath | None = Field(
        None,
        description=("Where models prepared for this machine are kept; null for $XDG_CACHE_HOME/outrider."),
        examples=["/var/cache/outrider"],
    )
    watch: Boolean = Field(True, description="Load the bundle anew when its folder changes.")


class DecisionLog(Section):
    """Which decisions are written down, one JSON object per line."""

    path: LogTarget | None = Field(
        None,
        description="A file, - for standard output, null for nowhere.",
        examples=["-", "/var/log/outrider/decisions.jsonl"],
    )
    actions: tuple[ActionName, ...] = Field(
        ("tag", "throttle", "challenge", "block"),
        max_length=5,
        description="Only decisions with these actions.",
    )
    sample: Score = Field(1.0, description="The share of them that is written.")


class Log(Section):
    """Outrider's own log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least that is written."
    )
    format: Literal["json", "text"] = Field(
        "json", description="json: one object per line; text: for people."
    )


@dataclass(frozen=True, slots=True)
class EffectiveRoute:
    """A route with nothing left to inherit. Index 0 is the service's default; routes follow in file order."""

    index: int
    name: str
    path: str
    methods: tuple[str, ...]  # empty: all
    mode: Mode
    budget_us: int
    body: BodyMode
    body_limit_bytes: int
    thresholds: Thresholds
    escalation: Escalation
    exempt: bool
    login: bool


class Settings(Section):
    """The configuration of Outrider."""

    service: Service = Field(Service(), description="What this Outrider guards and how strict it is.")
    listen: Listen = Field(Listen(), description="Where proxies reach Outrider.")
    admin: Admin = Field(Admin(), description="Where probes and Prometheus reach Outrider.")
    arena: Arena = Field(
        Arena(), description="The shared-memory file in which clients, decisions and counters live."
    )
    client: Client = Field(Client(), description="How a request is tied to a client.")
    latency: Latency = Field(Latency(), description="The time a decision may take, and what gives way.")
    text: TextSettings = Field(TextSettings(), description="How the text of a request is read.")
    thresholds: Thresholds = Field(
        Thresholds(), description="From which score each action applies; null for never."
    )
    detectors: Detectors = Field(
        Detectors(), description="Rules with a number in them, beside the learned scores."
    )
    escalation: Escalation = Field(Escalation(), description="Which requests are shown to the judge.")
    answers: Answers = Field(Answers(), description="How refusals look.")
    routes: tuple[Route, ...] = Field(
        (),
        max_length=ROUTES_MAX,
        description=("What differs for some paths, tried in this order; the first match counts."),
    )
    lists: Lists = Field(Lists(), description="Address ranges that are settled beforehand.")
    models: Models = Field(Models(), description="The trained models.")
    judge: Judge = Field(
        Judge(),
        description="The language model that reads, off the request's way, what the inline models can't settle.",
    )
    judge_store: JudgeStore = Field(
        JudgeStore(), description="What sidecars and judges share: escalations that wait, and decisions that hold."
    )
    decision_log: DecisionLog = Field(DecisionLog(), description="Which decisions are written down.")
    log: Log = Field(Log(), description="Outrider's own log, on standard error.")

    def effective_routes(self) -> tuple[EffectiveRoute, ...]:
        """Index 0: the service's default ("default", "/**"); then every route with its gaps filled."""
        return tuple(self._effective())

    def _effective(self) -> Iterator[EffectiveRoute]:
        yield EffectiveRoute(
            0,
            "default",
            "/**",
            (),
            self.service.mode,
            self.latency.budget_us,
            self.text.body_mode,
            self.text.body_bytes,
            self.thresholds,
            self.escalation,
            False,
            False,
        )
        for index, route in enumerate(self.routes, 1):
            own = {name: getattr(route.thresholds, name) for name in route.thresholds.model_fields_set}
            shown = {
                name: value
                for name in route.escalation.model_fields_set
                if (value := getattr(route.escalation, name)) is not None or name not in ("enabled", "sample")
            }
            yield EffectiveRoute(
                index,
                route.name,
                route.path,
                route.methods,
                route.mode or self.service.mode,
                self.latency.budget_us if route.budget_us is None else route.budget_us,
                route.body or self.text.body_mode,
                self.text.body_bytes if route.body_limit_bytes is None else route.body_limit_bytes,
                self.thresholds.model_copy(update=own),
                self.escalation.model_copy(update=shown),
                route.exempt,
                route.login,
            )
