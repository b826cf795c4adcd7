"""The tour without a person: sends the traffic, compares each answer with its promise, prints a table."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.demo.show import STYLES, Record, Tail, harmless, why
from sidecar.demo.stack import Stack
from sidecar.demo.traffic import BENIGN, HOSTILE, Case, Reply, orders, send, wrong_logins

ATTEMPTS_MAX = 50  # within so many requests a hostile client must be refused
REFUSALS = (403, 429)


@dataclass
class Row:
    what: str
    promised: str
    got: str
    kept: bool
    record: Record
    round_trip_ms: float


class Tour:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.tail = Tail(stack.decisions)
        self.rows: list[Row] = []
        self._client = 0

    def run(self) -> bool:
        """Send everything; whether every promise was kept."""
        list(self.tail.new())
        for case in (*BENIGN, *HOSTILE):
            self.single(case)
        self.headers()
        self.hostile_client("a brute-forcing client", "203.0.113.50", wrong_logins())
        self.hostile_client("an enumerating client", "203.0.113.60", orders())
        self.single(BENIGN[8], "another client's login meanwhile")
        return all(row.kept for row in self.rows)

    def ask(self, case: Case, client: str) -> tuple[Reply | None, str]:
        """The reply, or None and what went wrong."""
        try:
            return send(self.stack.ports["envoy"], case, client), ""
        except (OSError, http.client.HTTPException) as error:
            return None, f"no answer: {error}"

    def next_client(self) -> str:
        self._client += 1
        return f"198.51.100.{self._client}"

    def single(self, case: Case, name: str = "") -> None:
        reply, fault = self.ask(case, self.next_client())
        found = self.tail.wait()
        record = found[-1] if found else {}
        promised = f"passes ({case.status})" if case.passes else "refused (403)"
        expected = case.status if case.passes else 403
        kept = reply is not None and reply.status == expected and len(found) == 1
        got = fault or (str(reply.status) if reply else "")
        if not found:
            got += ", no decision"
        self.rows.append(
            Row(name or case.name, promised, got, kept, record, reply.seconds * 1e3 if reply else 0.0)
        )

    def headers(self) -> None:
        """The service sees Outrider's headers, and only Outrider's; the client never does."""
        forged = Case(
            "a forged x-outrider-action",
            True,
            target="/echo",
            headers={"x-outrider-action": "trust-me", "x-outrider-extra": "1"},
        )
        reply, fault = self.ask(forged, self.next_client())
        found = self.tail.wait()
        seen: dict[str, str] = {}
        if reply is not None and reply.status == 200:
            seen = json.loads(reply.body)["headers"]
        inside = {name: value for name, value in seen.items() if name.startswith("x-outrider-")}
        outside = [name for name in reply.headers if name.startswith("x-outrider-")] if reply else []
        kept = (
            inside.get("x-outrider-action") in ("allow", "tag")
            and "x-outrider-score" in inside
            and "x-outrider-extra" not in inside
            and not outside
        )
        got = fault or (
            "service sees " + ", ".join(f"{k}: {v}" for k, v in sorted(inside.items()))
            if inside
            else "service sees none"
        )
        if outside:
            got += "; client sees " + ", ".join(outside)
        self.rows.append(
            Row(
                forged.name,
                "overwritten, and kept from the client",
                got,
                kept,
                found[-1] if found else {},
                reply.seconds * 1e3 if reply else 0.0,
            )
        )

    def hostile_client(self, name: str, client: str, cases: Iterator[Case]) -> None:
        """One client that goes on until it is refused; then it must stay refused."""
        first, served, record, total = 0, 0, Record(), 0.0
        fault = ""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            reply, fault = self.ask(next(cases), client)
            found = self.tail.wait()
            if reply is None:
                break
            total += reply.seconds * 1e3
            if reply.status in REFUSALS:
                first, record = attempt, found[-1] if found else {}
                break
            served += 1
        again, _ = self.ask(next(cases), client)
        self.tail.wait()
        held = again is not None and again.status in REFUSALS
        got = fault or (f"refused at request {first}" if first else f"{served} requests served")
        if first and not held:
            got += ", then served again"
        # a client that is refused at its first request was never given a chance
        kept = 3 <= first <= ATTEMPTS_MAX and held
        self.rows.append(
            Row(name, f"refused within {ATTEMPTS_MAX} requests", got, kept, record, total / max(1, served))
        )

    def table(self) -> Table:
        table = Table(title="What was promised, what was answered, and why", show_lines=False, expand=True)
        for heading, justify in (
            ("", "left"),
            ("request", "left"),
            ("promised", "left"),
            ("answered", "left"),
            ("action", "left"),
            ("score", "right"),
            ("why", "left"),
            ("decided in", "right"),
            ("round trip", "right"),
        ):
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            record = row.record
            action = str(record.get("action", "-"))
            spent = record.get("spent_us")
            table.add_row(
                Text("ok" if row.kept else "NOT", "green" if row.kept else "bold red"),
                Text(row.what),
                Text(row.promised),
                Text(harmless(row.got)),
                Text(harmless(action, 10), STYLES.get(action, "")),
                Text(f"{float(record['score']):.2f}" if "score" in record else "-"),
                Text(why(record)),
                Text(f"{float(spent):.0f} us" if spent is not None else "-"),
                Text(f"{row.round_trip_ms:.1f} ms"),
            )
        return table

    def report(self, console: Console) -> None:
        console.print(self.table())
        broken = [row for row in self.rows if not row.kept]
        if broken:
            console.print(
                Text(
                    f"{len(broken)} of {len(self.rows)} answers were not as promised: "
                    + ", ".join(row.what for row in broken),
                    "bold red",
                )
            )
        else:
            console.print(Text(f"All {len(self.rows)} answers were as promised.", "green"))
