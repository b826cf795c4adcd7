"""Why a decision was taken: the codes that travel in Decision.reason, and their names.

The sentence a person reads is made from code + value + place in sidecar/reasons.py.
"""
from libc.stdint cimport uint16_t

cdef enum Reason:
    REASON_NONE = 0
    # language side: what the worst value looks like (same numbers as Threat)
    REASON_SUSPICIOUS_TEXT = 1       # flagged, no class stands out
    REASON_SQL_INJECTION = 2
    REASON_CROSS_SITE_SCRIPTING = 3
    REASON_PATH_TRAVERSAL = 4
    REASON_COMMAND_INJECTION = 5
    REASON_CODE_INJECTION = 6        # server-side templates, PHP/JS/Java expressions, JNDI
    REASON_XML_INJECTION = 7         # external entities, XPath
    REASON_LDAP_INJECTION = 8
    REASON_NOSQL_INJECTION = 9
    REASON_HEADER_INJECTION = 10     # CR/LF smuggled into a value
    REASON_SERVER_SIDE_REQUEST = 11  # SSRF
    # numeric side
    REASON_BRUTE_FORCE = 32
    REASON_CREDENTIAL_STUFFING = 33
    REASON_OBJECT_ENUMERATION = 34
    REASON_SCANNING = 35
    REASON_REQUEST_FLOOD = 36
    REASON_UNUSUAL_BEHAVIOUR = 37    # Isolation Forest
    REASON_REPEATED_ATTACKS = 38     # refused for its text on several paths
    # lists
    REASON_BLOCKED_ADDRESS = 48
    REASON_BLOCKED_PRINCIPAL = 49
    REASON_BLOCKED_RANGE = 50
    REASON_ALLOW_LISTED = 51
    REASON_BLOCKED_PAYLOAD = 52
    # circumstances
    REASON_EXEMPT_ROUTE = 56
    REASON_BODY_PART = 57            # decided on the first part of the body
    REASON_TEXT_CUT = 58             # more values or text than the limits allow: read in part
    REASONS = 59

cdef extern from *:
    """
    static const char *or_reason_names[59] = {
        "none", "suspicious_text", "sql_injection", "cross_site_scripting", "path_traversal",
        "command_injection", "code_injection", "xml_injection", "ldap_injection",
        "nosql_injection", "header_injection", "server_side_request",
        [32] = "brute_force", "credential_stuffing", "object_enumeration", "scanning",
        "request_flood", "unusual_behaviour", "repeated_attacks",
        [48] = "blocked_address", "blocked_principal", "blocked_range", "allow_listed",
        "blocked_payload",
        [56] = "exempt_route", "body_part", "text_cut"};
    static inline const char *or_reason_name(unsigned c) {
        return c < 59 && or_reason_names[c] ? or_reason_names[c] : "unknown"; }
    """
    const char *or_reason_name(unsigned code) noexcept nogil
