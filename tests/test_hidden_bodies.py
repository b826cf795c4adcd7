"""Bodies dressed up so that a plain reading misses what they hold; and an arena with nonsense in it."""
from __future__ import annotations

import json
import mmap
import random
from pathlib import Path

import pytest

from native.arenafile import ArenaFile
from native.engine import Engine
from sidecar.config import Settings, loads
from sidecar.core import open_arena, open_core

PAYLOAD = "1' UNION SELECT username,password FROM users--"
PART = f'--b\r\nContent-Disposition: form-data; name="q"\r\n\r\n{PAYLOAD}\r\n--b--\r\n'


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_core(Settings(), private=True).engine()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_letters_are_read(engine: Engine, encoding: str) -> None:
    kind = {"content-type": "application/json"}
    verdict = engine.decide("POST", "/a", kind, json.dumps({"q": PAYLOAD}).encode(encoding))
    assert (verdict.action, verdict.place) == ("block", "json.q")
    plain = engine.decide("POST", "/a", kind, json.dumps({"q": "Zoë, 東京"}, ensure_ascii=False).encode(encoding))
    assert plain.action == "allow"


@pytest.mark.parametrize("boundary", ["zz", "a; boundary=b", ""])
def test_a_wrong_boundary_hides_nothing(engine: Engine, boundary: str) -> None:
    verdict = engine.decide("POST", "/a", {"content-type": f"multipart/form-data; boundary={boundary}"}, PART)
    assert verdict.action == "block"
    assert "q" in verdict.place


def test_nonsense_in_the_arena_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    settings = loads("arena: {clients: 1024, events: 64}", "test")
    made = random.Random(7)
    for _round in range(8):
        core = open_core(settings, private=True, load_models=False)
        arena = ArenaFile.create(path, 1024, 64, 1024)
        arena.write_policy(_compiled(settings))
        decider = Engine(arena)
        for i in range(40):
            decider.decide("POST", "/login?q=x", {"x-api-key": "k"}, "a=b", client=f"192.0.2.{i}")
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            policy = 4096  # the header's page stays: it is checked when a file is opened
            for at in range(policy + 16, len(memory), made.choice((61, 127, 509))):
                if made.random() < 0.5:
                    memory[at] = made.randrange(256)
        fresh = Engine(ArenaFile.open(path))
        for i in range(300):
            headers = {"x-api-key": "k", "cookie": "a=b"}
            verdict = fresh.decide("GET", f"/api/{i}", headers, "x", client=f"192.0.2.{i % 60}")
            fresh.respond(verdict, 404)
            verdict.record()
        arena.drain(1000)
        core.close()


def _compiled(settings: Settings) -> dict[str, object]:
    from sidecar.policy import compile_policy

    return compile_policy(settings)


def test_an_arena_left_half_made_is_cleared_away(tmp_path: Path) -> None:
    settings = loads(f"arena: {{path: {tmp_path}/arena, clients: 1024}}", "test")
    for name in ("arena.1.new", "arena.7-0badcafe.new"):
        (tmp_path / name).write_bytes(b"x")
    open_arena(settings)
    assert [file.name for file in tmp_path.iterdir()] == ["arena"]
