"""Listening addresses: what is refused, and with which words."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.serve import addresses
from sidecar.serve.errors import EXIT_RESOURCE, StartupError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own folders can be too deep for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("unix:/run/outrider/outrider.sock", "unix:/run/outrider/outrider.sock"),
        ("unix:///run/outrider.sock", "unix:/run/outrider.sock"),
        ("127.0.0.1:9901", "127.0.0.1:9901"),
        ("[::1]:9901", "[::1]:9901"),
        ("localhost:0", "localhost:0"),
    ],
)
def test_addresses_are_read_as_they_are_written(text: str, shown: str) -> None:
    assert str(addresses.parse(text)) == shown


@pytest.mark.parametrize(
    "text", ["", "9901", ":9901", "127.0.0.1:", "127.0.0.1:http", "h:70000", "h:-1", "h:९"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="isn't an address"):
        addresses.parse(text)


def test_a_missing_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        StartupError, match=r"folder of the socket, .*gone, doesn't exist: create it"
    ) as caught:
        addresses.check_unix(tmp_path / "gone" / "s.sock")
    assert caught.value.status == EXIT_RESOURCE


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StartupError, match="no permission to create a socket"):
        addresses.check_unix(tmp_path / "s.sock")


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="longer than the 107 bytes"):
        addresses.check_unix(tmp_path / ("x" * 120))
    with pytest.raises(StartupError, match="isn't absolute"):
        addresses.check_unix(Path("s.sock"))


def test_a_socket_left_behind_is_removed_and_a_live_one_is_not(short_folder: Path) -> None:
    path = short_folder / "s.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(StartupError, match="another process already listens"):
            addresses.check_unix(path)
        assert stat.S_ISSOCK(path.lstat().st_mode)
    addresses.check_unix(path)  # the process is gone
    assert not path.exists()


def test_a_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("precious")
    with pytest.raises(StartupError, match="isn't a socket"):
        addresses.check_unix(path)
    assert path.read_text() == "precious"


def test_a_link_to_a_socket_is_not_followed(short_folder: Path) -> None:
    target = short_folder / "t.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(target))
    link = short_folder / "l.sock"
    link.symlink_to(target)
    with pytest.raises(StartupError, match="isn't a socket"):
        addresses.check_unix(link)
    assert target.exists()


def test_a_taken_port_is_refused(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(StartupError, match=f"admin.address: 127.0.0.1:{port} is in use"):
        addresses.check_tcp("127.0.0.1", port, "admin.address")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(StartupError, match=r"listen.address: 192.0.2.77 isn't an address of this machine"):
        addresses.check(addresses.parse("192.0.2.77:9901"), "listen.address")
