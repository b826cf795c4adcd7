"""What every actor of the simulation has in common: making requests and taking their answers."""
from __future__ import annotations

from collections.abc import Generator
from typing import Any

import orjson

from sidecar.records.model import RequestRecord
from sidecar.simulate.clients import Headers
from sidecar.simulate.draws import Draws
from sidecar.simulate.service import Service

# An actor yields its next request and is sent the status that it got, under the load of that moment.
Actor = Generator[RequestRecord, int, None]
Step = Generator[RequestRecord, int, tuple[float, int]]      # returns (time of the answer, status)
Walk = Generator[RequestRecord, int, float]                  # returns the time at its end

JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "application/x-www-form-urlencoded")


class Caller:
    """One client: its address, headers and principal; makes its records."""

    __slots__ = ("address", "cls", "d", "headers", "label", "principal", "retries", "service", "speed")

    def __init__(self, d: Draws, service: Service, address: str, headers: Headers, cls: str, label: int = 0,
                 retries: int = 0) -> None:
        self.d, self.service, self.address, self.headers = d, service, address, headers
        self.cls, self.label, self.retries = cls, label, retries
        self.principal: str | None = None
        self.speed = d.lognormal(1.0, 0.3)        # of its network

    def call(self, t: float, method: str, url: str, status: int = 200, ms: float = 25.0, json: Any = None,
             form: str | None = None, extra: Headers = ()) -> Step:
        """One request and, when the service fails and this client retries, the next tries."""
        d = self.d
        body, kind = None, ()
        if json is not None:
            body, kind = orjson.dumps(json), (JSON,)        # type: ignore[assignment]
        elif form is not None:
            body, kind = form.encode(), (FORM,)             # type: ignore[assignment]
        attempt = 0
        while True:
            headers = [*self.headers, *kind, *extra]
            if body is not None:
                headers.append(("Content-Length", str(len(body))))
            record = RequestRecord(method, url, None, t, self.address, self.principal, headers, body, status,
                                   d.lognormal(ms, 0.45) * self.speed, self.label, self.cls)
            got = yield record
            t += (record.response_ms or 0.0) / 1000.0
            if got < 500 or attempt >= self.retries or not d.chance(0.85):
                return t, got
            t += d.between(0.5, 1.5) * 2.0 ** attempt
            attempt += 1
