"""What a person reads: one sentence for each reason of a decision."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LOOKS_LIKE = {
    "suspicious_text": "looks like an attack",
    "sql_injection": "looks like SQL injection",
    "cross_site_scripting": "looks like cross-site scripting",
    "path_traversal": "looks like path traversal",
    "command_injection": "looks like command injection",
    "code_injection": "looks like code or template injection",
    "xml_injection": "looks like XML injection",
    "ldap_injection": "looks like LDAP injection",
    "nosql_injection": "looks like NoSQL injection",
    "header_injection": "smuggles line breaks into a header",
    "server_side_request": "points the server at an address of its own network",
}
_SENTENCES = {
    "brute_force": "guesses passwords: {value:.0f} login attempts failed or in a row",
    "credential_stuffing": "tries stolen credentials: {value:.0f} identities with mostly failed logins",
    "object_enumeration": "walks through object ids: {value:.0f} different ones",
    "scanning": "probes for what is there: {value:.0f} requests for things that are not",
    "repeated_attacks": "keeps attacking: {value:.0f} requests on several paths refused for their text",
    "request_flood": "floods: {value:.0f} requests in the window",
    "unusual_behaviour": "behaves unlike other clients (score {value:.2f})",
    "blocked_address": "is on the shared blocklist for another {value:.0f} s",
    "blocked_principal": "is on the shared blocklist for another {value:.0f} s",
    "blocked_payload": "sends a text that is on the shared blocklist for another {value:.0f} s",
    "blocked_range": "is in an address range that the configuration blocks",
    "allow_listed": "would have been refused, but is on the allow list",
    "exempt_route": "the route is exempt",
    "text_cut": "read in part: its text goes beyond text.values or text.windows ({value:.0f} values read)",
    "body_part": "decided on the first part of a body of {value:.0f} bytes or more",
}


def sentence(reason: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The sentence of one reason ({code, name, value}) of a decision record. Contains the place of the
    value, which a client chooses: escape it for where it is shown."""
    name = str(reason["name"])
    value = float(reason.get("value") or 0)
    if name in _LOOKS_LIKE:
        place = record.get("place") or "the request"
        return f"{place} {_LOOKS_LIKE[name]} (score {value:.2f})"
    if name in _SENTENCES:
        return _SENTENCES[name].format(value=value)
    return name.replace("_", " ")


def sentences(record: Mapping[str, Any]) -> list[str]:
    """All of a record's reasons as sentences, the most telling first."""
    return [sentence(reason, record) for reason in record.get("reasons", ())]
