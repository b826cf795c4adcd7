"""Settings of escalation: which requests are shown to the judge."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sidecar.config.section import Score, Section
from sidecar.config.types import Boolean, Integer, Size


class Escalation(Section):
    """Which requests are shown to the judge. Never those of allow-listed clients, those that a list settled, and those
    of exempt routes; and with a text whose place names a secret, not for that text."""

    enabled: Boolean = Field(True, description="false shows it none.")
    uncertain_from: Score | None = Field(
        None,
        description=(
            "The score from which a request that isn't blocked is uncertain; null for the route's thresholds.tag. "
            "The text of one below it has no key under which it could be blocked."
        ),
        examples=[0.4],
    )
    uncertain_to: Score | None = Field(
        None,
        description="The score from which it is no longer; null for the route's thresholds.block.",
        examples=[0.95],
    )
    novel: Score | None = Field(
        0.8,
        description=(
            "How unusual a client's behaviour must be, by the Isolation Forest, for its request to be shown whatever "
            "its text; null for never. 0.8 is one benign request in a thousand."
        ),
    )
    sample: Score = Field(0.0, description="The share of all other requests that is shown, blocked ones among them.")
    client_per_minute: Integer = Field(
        6, ge=1, le=6000, description="Most requests of one client (its address) a minute."
    )
    per_second: Integer = Field(
        50, ge=1, le=10000, description="Most requests of all clients a second, over all processes that decide."
    )
    text_bytes: Annotated[int, Size("256B", "4KiB")] = Field(
        2048,
        alias="text",
        description="How much of the worst value of a request is shown, around what looked worst in it.",
    )


class RouteEscalation(Section):
    """What is shown of one route; what is left out is taken from `escalation`, null is as there."""

    enabled: Boolean | None = Field(None, description="As escalation.enabled; null takes that.")
    uncertain_from: Score | None = Field(None, description="As escalation.uncertain_from.")
    uncertain_to: Score | None = Field(None, description="As escalation.uncertain_to.")
    novel: Score | None = Field(None, description="As escalation.novel.")
    sample: Score | None = Field(None, description="As escalation.sample; null takes that.")
