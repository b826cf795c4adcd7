"""Settings of the detectors: rules with a number in them, beside the learned scores."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sidecar.config.section import ActionName, Score, Section
from sidecar.config.types import Boolean, Duration, Integer, Window


class Detector(Section):
    """A rule on what one client did within a window."""

    enabled: Boolean = Field(True, description="false switches this detector off.")
    window_s: Annotated[int, Window()] = Field(
        600, alias="window", description="Length of the sliding window."
    )
    action: ActionName = Field("block", description="What is asked for while the rule holds.")


class BruteForce(Detector):
    """Many failed logins of one client."""

    window_s: Annotated[int, Window()] = Field(
        60, alias="window", description="Length of the sliding window."
    )
    failures: Integer = Field(
        10,
        ge=2,
        le=10000,
        description=(
            "Failed logins (400, 401, 403, 422, 423 or 429, on routes with login: true or whose path looks "
            "like a login) from which it holds; also 1.5 times as many in a row without a success, and twice "
            "as many attempts where the answers tell nothing."
        ),
    )
    share: Score = Field(
        0.5, description="It holds only if at least this share of the client's login attempts failed."
    )


class CredentialStuffing(Detector):
    """One client tries many accounts."""

    principals: Integer = Field(
        10,
        ge=2,
        le=10000,
        description=(
            "Different accounts tried from which it holds, counted over the last 10 to 20 minutes whatever "
            "the window."
        ),
    )
    share: Score = Field(0.5, description="It holds only if at least this share of the attempts failed.")


class ObjectEnumeration(Detector):
    """One client walks through the objects of others (BOLA)."""

    objects: Integer = Field(
        25,
        ge=2,
        le=10000,
        description=(
            "Object ids from which it holds: so many in even steps, 0.6 times as many different ones where "
            "enough were refused (share), 1.6 times as many where the client asks for little else. Different "
            "ones are counted over the last 10 to 20 minutes whatever the window."
        ),
    )
    share: Score = Field(
        0.3,
        description=(
            "The share of the requests for them that was refused or found nothing from which fewer suffice."
        ),
    )


class Scanning(Detector):
    """One client probes for paths that don't exist, or keeps attacking: half as many requests on at least five
    paths refused for their text."""

    window_s: Annotated[int, Window()] = Field(
        600, alias="window", description="Length of the sliding window."
    )
    paths: Integer = Field(
        20,
        ge=2,
        le=10000,
        description="Requests answered 404 or 410, most of them for different paths, from which it holds.",
    )
    share: Score = Field(
        0.5,
        description="It holds only if at least this share of the client's requests was answered so.",
    )


class RequestFlood(Detector):
    """One client sends too much."""

    window_s: Annotated[int, Window()] = Field(
        10, alias="window", description="Length of the sliding window."
    )
    requests: Integer = Field(
        1000, ge=10, le=1000000, description="Requests within the window from which it holds."
    )
    action: ActionName = Field("throttle", description="What is asked for while the rule holds.")


class UnusualBehaviour(Section):
    """The Isolation Forest's score of what one client does, against thresholds."""

    enabled: Boolean = Field(True, description="false switches this score off.")
    action: ActionName = Field(
        "tag", description="The most that this score alone may ask for: unusual is not yet hostile."
    )


class Detectors(Section):
    """What one client does: rules with a number in them, and a learned score. They need the response half
    for statuses."""

    brute_force: BruteForce = Field(BruteForce(), description="Many failed logins of one client.")
    credential_stuffing: CredentialStuffing = Field(
        CredentialStuffing(), description="One client tries many accounts."
    )
    object_enumeration: ObjectEnumeration = Field(
        ObjectEnumeration(), description="One client walks through the objects of others (BOLA)."
    )
    scanning: Scanning = Field(Scanning(), description="One client probes for paths that don't exist.")
    request_flood: RequestFlood = Field(RequestFlood(), description="One client sends too much.")
    unusual_behaviour: UnusualBehaviour = Field(
        UnusualBehaviour(), description="The Isolation Forest's score of what one client does."
    )
    hold_s: Annotated[int, Duration("0s", "1h", "s")] = Field(
        300,
        alias="hold",
        description=(
            "How long a client that a rule held for (a flood excepted) stays refused; what it is refused "
            "no longer "
            "reaches the service, so its windows alone would soon look innocent. 0s for not at all."
        ),
    )
