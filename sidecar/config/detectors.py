"""Settings of the detectors: rules with a number in them, beside the learned scores."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from sidecar.config.section import ActionName, Score, Section
from sidecar.config.types import Boolean, Duration, Integer, refused


WINDOWS_S = (1, 10, 60, 600, 3600)  # the windows that native/clients.pxd keeps of each client


def _kept_window(seconds: int) -> int:
    if seconds not in WINDOWS_S:
        raise refused(
            f"no window of {seconds} s is kept of a client", "use one of those that are: 1s, 10s, 60s, 10m, 1h"
        )
    return seconds


WindowSeconds = Annotated[int, Duration("1s", "1h", "s"), AfterValidator(_kept_window)]


class Detector(Section):
    """A rule on what one client did within a window."""

    enabled: Boolean = Field(True, description="false switches this detector off.")
    window_s: WindowSeconds = Field(
        600, alias="window", description="Length of the sliding window: 1s, 10s, 60s, 10m or 1h."
    )
    action: ActionName = Field(
        "block", description="The least that happens to a client while the rule holds for it."
    )


class BruteForce(Detector):
    """Many failed logins of one client."""

    window_s: WindowSeconds = Field(
        60, alias="window", description="Length of the sliding window: 1s, 10s, 60s, 10m or 1h."
    )
    failures: Integer = Field(
        10,
        ge=2,
        le=10000,
        description=(
            "Failed logins (401 or 403, on routes with login: true or that look like a login) from which "
            "it holds."
        ),
    )
    share: Score = Field(
        0.5, description="It holds only if at least this share of the client's login attempts failed."
    )


class CredentialStuffing(Detector):
    """One client tries many accounts."""

    principals: Integer = Field(
        10, ge=2, le=10000, description="Different accounts tried from which it holds."
    )
    share: Score = Field(0.5, description="It holds only if at least this share of the attempts failed.")


class ObjectEnumeration(Detector):
    """One client walks through the objects of others (BOLA)."""

    objects: Integer = Field(
        25, ge=2, le=10000, description=("Different object ids under the same route from which it holds.")
    )
    share: Score = Field(
        0.3,
        description=(
            "It holds only if at least this share of the requests for them was refused or found nothing."
        ),
    )


class Scanning(Detector):
    """One client probes for paths that don't exist."""

    window_s: WindowSeconds = Field(
        600, alias="window", description="Length of the sliding window: 1s, 10s, 60s, 10m or 1h."
    )
    paths: Integer = Field(
        20, ge=2, le=10000, description="Different paths answered with 4xx from which it holds."
    )
    share: Score = Field(
        0.5, description="It holds only if at least this share of the client's requests failed."
    )


class RequestFlood(Detector):
    """One client sends too much."""

    window_s: WindowSeconds = Field(
        10, alias="window", description="Length of the sliding window: 1s, 10s, 60s, 10m or 1h."
    )
    requests: Integer = Field(
        1000, ge=10, le=1000000, description="Requests within the window from which it holds."
    )
    action: ActionName = Field(
        "throttle", description="The least that happens to a client while the rule holds for it."
    )


class UnusualBehaviour(Section):
    """What the Isolation Forest finds unlike everything it was trained on. Unusual is not hostile: leave the
    action at tag unless your own traffic has been observed for a while."""

    enabled: Boolean = Field(True, description="false switches the Isolation Forest off.")
    action: ActionName = Field(
        "tag", description="The most that an unusual score alone may cause; thresholds apply up to it."
    )


class Detectors(Section):
    """Rules with a number in them, beside the learned scores. They need the response half for statuses."""

    hold_s: Annotated[int, Duration("0s", "1h", "s")] = Field(
        60,
        alias="hold",
        description=(
            "For how long a client stays refused after a detector last spoke. What it is refused no longer "
            "reaches the service, so its windows alone would soon look innocent. 0s: only while the rule holds."
        ),
    )

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
        UnusualBehaviour(), description="What the Isolation Forest finds unlike everything it was trained on."
    )
