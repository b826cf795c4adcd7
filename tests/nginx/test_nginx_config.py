"""Directives: what NGINX accepts, and what it says of mistakes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from nginx_stack import ROOT, TEMPORARY, nginx_binary, sanitizer_env

SHIPPED = ROOT / "envoy" / "nginx.conf"


def check(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    config = folder / "nginx.conf"
    config.write_text(text, encoding="utf-8")
    line = [nginx_binary(), "-t", "-p", str(folder), "-c", str(config), "-e", "stderr"]
    env = {**os.environ, **sanitizer_env(folder)}
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=env)


def checked(folder: Path, module: Path, http: str) -> subprocess.CompletedProcess[str]:
    temporary = "\n".join(f"{name}_temp_path {folder / name};" for name in TEMPORARY)
    lines = [
        f"load_module {module};",
        f"pid {folder / 'pid'};",
        "error_log stderr;",
        "events {}",
        f"http {{ {temporary} access_log off;",
        http,
        "}",
    ]
    return check(folder, "\n".join(lines))


def test_the_shipped_file_is_valid(module: Path, tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    temporary = "".join(f"{name}_temp_path {tmp_path / name};" for name in TEMPORARY)
    for what, instead in [
        ("modules/ngx_http_outrider_module.so", str(module)),
        ("/var/log/nginx/", f"{tmp_path}/"),
        ("/run/nginx.pid", str(tmp_path / "pid")),
        ("http {\n", "http {\n" + temporary),
    ]:
        assert what in text
        text = text.replace(what, instead, 1 if what.startswith("http") else -1)
    done = check(tmp_path, text)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "[warn]" in line]
    assert [line for line in warnings if '"user" directive' not in line] == []  # that one is for root only


def test_the_shipped_file_names_every_directive_and_variable(module: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    source = (ROOT / "native" / "plugins" / "nginx" / "ngx_http_outrider_module.c").read_text(encoding="utf-8")
    directives = {part.split('"')[0] for part in source.split('{ngx_string("')[1:] if part.startswith("outrider")}
    variables = {part.split('"')[0] for part in source.split('    VARIABLE("')[1:]}
    assert {"outrider", "outrider_arena", "outrider_failure"} <= directives
    assert len(variables) == 9
    for name in directives - {"outrider_"}:
        assert f"\n    {name} " in text or f" {name} " in text, name
    for name in variables:
        assert f"$outrider_{name}" in text, name


SERVER = "server { listen 127.0.0.1:1; %s location / { %s } }"
WHOLE = "outrider_arena /dev/shm/a; outrider_failure open;"


@pytest.mark.parametrize(
    "http",
    [
        WHOLE + SERVER % ("outrider on;", ""),
        WHOLE + "outrider on;" + SERVER % ("outrider off;", "outrider on;"),
        SERVER % ("", ""),
        SERVER % ("outrider off;", ""),
        "outrider_arena /a;" + SERVER % ("", ""),
    ],
    ids=["server", "everywhere", "unused", "off", "arena-only"],
)
def test_accepted(module: Path, tmp_path: Path, http: str) -> None:
    done = checked(tmp_path, module, http)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("http", "said"),
    [
        (SERVER % ("outrider on;", ""), ['"outrider" is on in ', "conf:10", '"outrider_arena" isn\'t set', "add it"]),
        ("outrider_arena /a;" + SERVER % ("", "outrider on;"), ['"outrider_failure" isn\'t set', '"open"', '"closed"']),
        ("outrider_failure open;" + SERVER % ("outrider on;", ""), ['"outrider_arena" isn\'t set']),
        ("outrider_failure maybe;", ['"outrider_failure" must be "open"', '"closed"', 'not "maybe"', "nginx.conf:10"]),
        ("outrider_failure OPEN;", ['not "OPEN"']),
        ("outrider_arena arena;", ['"outrider_arena" wants an absolute path', "arena.path", "nginx.conf:10"]),
        ('outrider_arena "";', ['"outrider_arena" wants an absolute path']),
        ("outrider_arena /a; outrider_arena /b;", ['"outrider_arena" directive is a duplicate', "keep one"]),
        ("outrider_failure open; outrider_failure open;", ['"outrider_failure" directive is a duplicate']),
        ("outrider perhaps;", ['invalid value "perhaps" in "outrider"', '"on" or "off"']),
        ("outrider on; outrider on;", ['"outrider" directive is duplicate']),
        (SERVER % ("outrider_arena /a;", ""), ['"outrider_arena" directive is not allowed here']),
        (SERVER % ("outrider_failure open;", ""), ['"outrider_failure" directive is not allowed here']),
        (
            f"outrider_arena /{'a' * 1500}; outrider_failure open; outrider on;",
            ['"outrider_arena" can\'t be used: ', "less than 1024 bytes"],
        ),
    ],
)
def test_mistakes_are_named(module: Path, tmp_path: Path, http: str, said: list[str]) -> None:
    done = checked(tmp_path, module, http)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "[emerg]" in line]
    for part in said:
        assert part in line


def test_the_module_is_for_no_other_nginx(module: Path) -> None:
    """NGINX compares this signature, so that a module with other structures is never loaded."""
    installed = subprocess.run([nginx_binary(), "-V"], capture_output=True, text=True, check=True).stderr
    assert "nginx/" in installed
    data = module.read_bytes()
    signature = data[data.index(b"8,4,8,") :].split(b"\0", 1)[0]
    assert len(signature) > 30
    assert signature in Path(nginx_binary()).resolve().read_bytes()


def test_only_what_nginx_looks_up_is_exported(module: Path) -> None:
    done = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=posix", str(module)], capture_output=True, text=True, check=True
    )
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "ngx_modules",
        "ngx_module_names",
        "ngx_module_order",
    }
