"""outrider check, schema, version, completion: output, exit codes, hostile text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar.cli import main
from sidecar.commands import version
from sidecar.config.document import EXAMPLE
from sidecar.config.schema import schema


def run(*arguments: str, stdin: str | bytes | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def test_good_file() -> None:
    code, text = run("check", "--elsewhere", str(EXAMPLE))
    assert code == 0
    for word in ("is good", "login", "/users/*/search", "2ms", "buffered 8KiB", "never", "exempt", "250us"):
        assert word in text


def test_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("latency:\n  budget: 5\n  skip: [txt]\n")
    code, text = run("check", str(path))
    assert code == 1
    assert f"{path}:2:11: latency.budget: 5 has no unit\n  2 |   budget: 5\n    |           ^\n" in text
    assert "remedy: write 5us, 5ms or 5s" in text
    assert "did you mean text?" in text
    assert "2 problems found" in text


def test_json(tmp_path: Path) -> None:
    code, text = run("check", "--json", "-", stdin="latency: {budget: 5}")
    assert code == 1
    found = json.loads(text)
    assert found["ok"] is False
    assert found["problems"] == [
        {
            "source": "standard input",
            "line": 1,
            "column": 19,
            "path": "latency.budget",
            "what": "5 has no unit",
            "remedy": "write 5us, 5ms or 5s",
        }
    ]
    code, text = run(
        "check", "--json", "--elsewhere", "-", stdin="routes: [{name: a, path: /a, budget: 2ms}]"
    )
    assert code == 0
    found = json.loads(text)
    assert found["settings"]["latency"]["budget"] == "1ms"
    assert [route["budget"] for route in found["routes"]] == ["1ms", "2ms"]


def test_usage() -> None:
    assert run("check")[0] == 2
    assert run("check", "a", "b")[0] == 2
    assert run("check", "/nonexistent/x.yaml")[0] == 1
    assert "outrider check outrider.yaml" in run("check", "--help")[1]


def test_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("arena: {path: /nonexistent/arena}\n")
    assert run("check", str(path))[0] == 1
    assert run("check", "--elsewhere", str(path))[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        'service: {name: "a\\e[31mb"}',
        '"\\e]0;title\\a": 1',
        "service: {mode: \x1b[31m}",
        "service: {mode: '\u202egpj.exe'}",
        "service: {mode: 'a\u2028b'}",
        "a: !\u202etag b",
        "\u0085x: 1",
    ],
)
def test_nothing_steers_the_terminal(text: str) -> None:
    code, shown = run("check", "-", stdin=text.encode())
    assert code == 1
    assert shown.replace("\n", "").isprintable()


def test_hostile_file_name(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31mb.yaml"
    path.write_text("{}")
    code, text = run("check", "--elsewhere", str(path))
    assert code == 0
    assert "\x1b" not in text


def test_not_utf8() -> None:
    code, text = run("check", "-", stdin=b"service: {name: \xff}")
    assert code == 1
    assert "0xff is not UTF-8" in text


def test_caret_under_wide_escapes() -> None:
    _, text = run("check", "-", stdin="{'\u202e': 1, service: {mode: x}}".encode())
    lines = text.splitlines()
    (excerpt,) = [number for number, line in enumerate(lines) if "mode: x" in line][:1]
    caret = next(
        line
        for line in lines[lines.index(next(one for one in lines if "service.mode" in one)) :]
        if "^" in line
    )
    assert lines[excerpt][caret.index("^")] == "x"


def test_schema() -> None:
    code, text = run("schema")
    assert code == 0
    assert json.loads(text) == schema()
    assert json.loads(run("schema", "--compact")[1]) == schema()


def test_version() -> None:
    code, text = run("version")
    assert code == 0
    for word in ("outrider", "python", "numpy", "treelite", "grpcio", "cpu flags", "compiler", "envoy"):
        assert word in text
    facts = json.loads(run("version", "--json")[1])
    assert facts["libraries"]["numpy"].count(".") == 2


def test_version_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(version.sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(version, "_cpuinfo", lambda *names: "")
    assert version.compiler() is None
    assert version.envoy() is None
    code, text = run("version")
    assert code == 0
    assert "not found" in text


def test_envoy_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "envoy"
    fake.write_text('#!/bin/sh\necho; echo "$0  version: 0a1b/1.40.0/Clean/RELEASE/BoringSSL"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(version.sys, "executable", str(tmp_path / "python"))
    assert version.envoy() == f"{fake}: 1.40.0"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run("completion", shell)
    assert code == 0
    assert "_OUTRIDER_COMPLETE" in text
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    assert run("completion") == (0, text)


def test_completion_of_unknown_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/dash")
    assert run("completion")[0] == 2
    assert run("completion", "tcsh")[0] == 2


def test_completion_lists_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_OUTRIDER_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "outrider ch")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(main, [], prog_name="outrider")
    assert result.output.strip() == "plain,check"
