"""Addresses as proxies write them, against Python's ipaddress."""
from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.extproc import address_bytes


def expected(text: str) -> bytes | None:
    try:
        address = ipaddress.ip_address(text.split("%")[0] if not text.endswith("%") else text)
    except ValueError:
        return None
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


@given(st.ip_addresses())
def test_every_address_in_every_dress(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    packed = expected(str(address))
    forms = [str(address), f" {address}\t", f'"{address}"']
    if address.version == 6:
        forms += [address.exploded, str(address).upper(), f"[{address}]", f"[{address}]:65535",
                  f"{address}%eth0", f"[{address}%1]:1", f'"[{address}]:4711"']
    else:
        forms += [f"{address}:1", f"::ffff:{address}", f"[::ffff:{address}]:80"]
    for form in forms:
        assert address_bytes(form.encode()) == packed, form


@settings(max_examples=1000)
@given(st.text(st.sampled_from("0123456789abcdefF:.%g"), max_size=45).filter(lambda t: "%" not in t))
def test_agrees_with_ipaddress_on_what_is_none(text: str) -> None:
    got = address_bytes(text.encode())
    want = expected(text)
    if want is None and text.count(":") == 1:
        host, _, port = text.partition(":")
        if port.isdigit() and len(port) <= 5:
            want = expected(host) if "." in host else None
    assert got == want


@given(st.lists(st.sampled_from(["0", "1", "ffff", "::", ":", "1.2.3.4", "00000", "abcd", "."]), max_size=12))
def test_agrees_with_ipaddress_on_near_misses(parts: list[str]) -> None:
    text = "".join(parts)
    got = address_bytes(text.encode())
    want = expected(text)
    if want is None and text.count(":") == 1:
        host, _, port = text.partition(":")
        if port.isdigit() and len(port) <= 5:
            want = expected(host) if "." in host else None
    assert got == want


@pytest.mark.parametrize("text", [
    b"", b" ", b"unknown", b"_hidden", b"1.2.3", b"1.2.3.4.5", b"01.2.3.4", b"1.2.3.256", b"1.2.3.4:",
    b"1.2.3.4:a", b"1.2.3.4:123456", b"[::1", b"[::1]x", b"[::1]:", b"[]", b"[1.2.3.4]", b"::1]", b":::",
    b"1:2:3:4:5:6:7", b"%eth0", b"::1%", b"1:2:3:4:5:6:7:8::", b"::1.2.3.4.5", b"1:2:3:4:5:6:7:1.2.3.4",
    b'"', b'""', b'"1.2.3.4', b"1.2.3.4\0", b"\xff\xfe", b"::" + b"0" * 200, b"1" * 128,
])
def test_no_address(text: bytes) -> None:
    assert address_bytes(text) is None


@given(st.binary(max_size=140))
def test_any_bytes(text: bytes) -> None:
    assert address_bytes(text) is None or len(text) >= 2
