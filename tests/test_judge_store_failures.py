"""The judge's stores when things break: Redis slow, gone, restarted, full, cut off; processes killed; files damaged."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from live_sidecar import free_port
from redis_server import RedisServer, Way
from test_judge_store import Heard, decision, escalation, eventually, judgement

from sidecar.config.judge_store import JudgeStore
from sidecar.judge.store import Store, StoreError, StoreUnavailable, open_store

Made = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """What is to be closed or stopped after the test, last first."""
    things: list[Any] = []
    yield lambda thing: things.append(thing) or thing
    for thing in reversed(things):
        thing.stop() if isinstance(thing, RedisServer) else thing.close()


@pytest.fixture
def server(tmp_path: Path, closing: Made) -> RedisServer:
    return closing(RedisServer(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")).start()


@pytest.fixture
def opened(tmp_path: Path, closing: Made) -> Made:
    def open_one(address: str, spool: str = "spool.db", **more: Any) -> Store:
        given = {"path": str(tmp_path / spool), "timeout": "300ms", **more}
        return closing(open_store(JudgeStore(backend="redis", addresses=(address,), **given)))

    return open_one


def claimed_ids(store: Store, many: int) -> list[str]:
    found: list[str] = []
    until = time.monotonic() + 20
    while len(found) < many and time.monotonic() < until:
        claimed = store.claim("collector", 100, 0.2)
        found += [one.escalation.id for one in claimed]
        while claimed:
            try:
                store.settle([one.receipt for one in claimed])
                break
            except StoreUnavailable:
                assert time.monotonic() < until
                time.sleep(0.1)
    return sorted(found)


# Redis


def test_gone_what_was_taken_waits_and_is_delivered(server: RedisServer, opened: Made) -> None:
    store = opened(server.address)
    assert store.put([escalation("before")]) == 1
    server.stop(signal.SIGKILL)
    assert store.put([escalation(f"during-{n}", client=n + 1) for n in range(20)]) == 20
    assert store.claim("one", 1, 0.1) == []
    stats = store.stats()
    assert (stats["spooled"], stats["spool_depth"], stats["up"]) == (20, 20, 0)
    with pytest.raises(StoreUnavailable, match="Redis"):
        store.settle(["1-1"])
    with pytest.raises(StoreUnavailable):
        store.decide(decision(store, "d"))
    server.start()
    expected = sorted(["before", *(f"during-{n}" for n in range(20))])
    assert claimed_ids(store, 21) == expected
    eventually(lambda: store.stats()["spool_depth"] == 0)
    assert store.stats()["reconnects"] >= 1
    assert store.stats()["errors"] >= 1


def test_gone_from_the_start_and_the_sidecar_killed(server: RedisServer, opened: Made, tmp_path: Path) -> None:
    server.stop()
    script = f"""
        import os
        from sidecar.config.judge_store import JudgeStore
        from sidecar.judge.store import open_store
        from sidecar.judge.types import Escalation
        given = dict(backend="redis", addresses=({server.address!r},), path={str(tmp_path / "spool.db")!r})
        store = open_store(JudgeStore(timeout="300ms", **given))
        made = [Escalation(str(n), 1.0, "shop", "GET", "/", client_key=n) for n in range(10)]
        print(store.put(made), flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip() == b"10"
    server.start()
    store = opened(server.address)
    assert claimed_ids(store, 10) == sorted(map(str, range(10)))


def test_the_spool_has_the_same_bounds(opened: Made) -> None:
    store = opened(f"127.0.0.1:{free_port()}", queue_max=64, per_client_max=8)
    assert store.put([escalation(f"flood-{n}", client=7) for n in range(500)]) == 8 - 1
    assert store.put([escalation(f"other-{n}", client=100 + n) for n in range(500)]) == 64 - 7
    assert store.stats()["shed"] == 1000 - 64


def test_neither_redis_nor_a_disk(opened: Made, tmp_path: Path) -> None:
    store = opened(f"127.0.0.1:{free_port()}", spool="no/such/folder/spool.db")
    assert store.put([escalation("a")]) == 0
    assert store.stats()["shed"] == 1
    assert store.now() > 0


def test_restarted_nothing_is_lost_and_followers_hear_of_the_gap(server: RedisServer, opened: Made) -> None:
    sidecar, judge = opened(server.address), opened(server.address, abandon="500ms")
    heard = Heard()
    sidecar.follow(heard.change, heard.gap)
    sidecar.put([escalation("taken"), escalation("waiting", client=2)])
    assert [one.escalation.id for one in judge.claim("one", 1, 0)] == ["taken"]
    judge.decide(decision(judge, "before", key=1))
    eventually(lambda: heard.ids == ["before"])
    server.stop(signal.SIGKILL)
    server.start()
    eventually(lambda: heard.gaps == 1)
    assert [one.id for one in sidecar.active()] == ["before"]
    judge.decide(decision(judge, "after", key=2))
    eventually(lambda: heard.ids == ["before", "after"])
    assert claimed_ids(judge, 2) == ["taken", "waiting"]


def test_redis_that_lost_everything_is_filled_anew(server: RedisServer, opened: Made) -> None:
    sidecar, judge = opened(server.address), opened(server.address)
    heard = Heard()
    sidecar.follow(heard.change, heard.gap)
    judge.claim("one", 1, 0)
    judge.decide(decision(judge, "a", key=1))
    judge.decide(decision(judge, "b", key=2))
    eventually(lambda: heard.ids == ["a", "b"])
    with server.client() as client:
        client.flushall()
    judge.decide(decision(judge, "c", key=3))
    eventually(lambda: heard.ids == ["a", "b", "c"] and heard.gaps == 1)
    sidecar.put([escalation("new")])
    assert claimed_ids(judge, 1) == ["new"]


def test_a_trimmed_stream_is_a_gap(server: RedisServer, opened: Made, closing: Made) -> None:
    way = closing(Way(server.port))
    sidecar, judge = opened(way.address), opened(server.address)
    heard = Heard()
    sidecar.follow(heard.change, heard.gap)
    judge.decide(decision(judge, "a", key=1))
    eventually(lambda: heard.ids == ["a"])
    way.cut()
    for n in range(10):
        judge.decide(decision(judge, f"d-{n}", key=10 + n))
    with server.client() as client:
        client.xtrim("{outrider:outrider}:changes", maxlen=2, approximate=False)
    way.drop()
    way.heal()
    eventually(lambda: heard.ids[-1:] == ["d-9"] and heard.gaps >= 1)
    assert len(sidecar.active()) == 11


def test_slow_redis_delays_nobody_for_long(server: RedisServer, opened: Made, closing: Made) -> None:
    way = closing(Way(server.port))
    store = opened(way.address, timeout="100ms")
    assert store.put([escalation("quick")]) == 1
    way.delay_s = 0.5
    assert store.put([escalation(f"slow-{n}", client=n + 2) for n in range(10)]) == 10
    assert store.stats()["spooled"] == 10
    way.delay_s = 0.0
    assert claimed_ids(store, 11) == sorted(["quick", *(f"slow-{n}" for n in range(10))])


def test_a_server_that_stands_still(server: RedisServer, opened: Made) -> None:
    store = opened(server.address)
    store.put([escalation("before")])
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        assert store.put([escalation("during")]) == 1
        assert store.claim("one", 1, 0.1) == []
        with pytest.raises(StoreUnavailable):
            store.active()
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert claimed_ids(store, 2) == ["before", "during"]


def test_cut_off_by_a_partition(server: RedisServer, opened: Made, closing: Made) -> None:
    way = closing(Way(server.port))
    near = opened(way.address)
    far = opened(server.address, spool="other.db", abandon="500ms")
    heard = Heard()
    near.follow(heard.change, heard.gap)
    near.put([escalation("a"), escalation("b", client=2)])
    held = near.claim("near", 1, 0)
    assert len(held) == 1
    way.cut()
    assert near.put([escalation("c", client=3)]) == 1
    with pytest.raises(StoreUnavailable):
        near.settle([held[0].receipt], [decision(far, "near")])
    far.decide(decision(far, "said-meanwhile", key=5))
    assert claimed_ids(far, 2) == ["a", "b"]
    way.heal()
    eventually(lambda: "said-meanwhile" in heard.ids)
    # the judge that was cut off settles late: its decision counts, its work is done already
    near.settle([held[0].receipt], [decision(far, "near")], [judgement("a")])
    assert {one.id for one in far.active()} >= {"near", "said-meanwhile"}
    assert claimed_ids(far, 1) == ["c"]


def test_full_redis_takes_nothing_and_loses_nothing(server: RedisServer, opened: Made) -> None:
    store = opened(server.address, abandon="200ms")
    store.put([escalation("before")])
    [work] = store.claim("one", 1, 0)
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        assert store.put([escalation("during", client=2)]) == 1
        assert store.stats()["spooled"] == 1
        with pytest.raises(StoreUnavailable, match="memory"):
            store.settle([work.receipt], [decision(store, "d")])
        assert store.active() == []
        assert store.depth() == 1
        client.config_set("maxmemory", "0")
    store.settle([work.receipt], [decision(store, "d")])
    assert [one.id for one in store.active()] == ["d"]
    assert claimed_ids(store, 1) == ["during"]


def test_a_read_only_replica_is_no_place_to_write(server: RedisServer, opened: Made, closing: Made) -> None:
    store = opened(server.address)
    with server.client() as client:
        client.replicaof("127.0.0.1", free_port())
        assert store.put([escalation("a")]) == 1
        assert store.stats()["spooled"] == 1
        client.replicaof("NO", "ONE")
    assert claimed_ids(store, 1) == ["a"]


@pytest.mark.parametrize("backend", ["sqlite", "redis"])
def test_a_judge_killed_in_the_middle_of_a_batch(
    backend: str, opened: Made, closing: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given: dict[str, Any] = {"backend": backend, "path": str(tmp_path / "judge.db"), "abandon": "1s"}
    if backend == "redis":
        given["addresses"] = (request.getfixturevalue("server").address,)
    store = closing(open_store(JudgeStore(**given)))
    store.put([escalation(str(n), client=n + 1) for n in range(20)])
    script = f"""
        import time
        from sidecar.config.judge_store import JudgeStore
        from sidecar.judge.store import open_store
        from sidecar.judge.types import Decision
        store = open_store(JudgeStore(**{given!r}))
        claimed = store.claim("victim", 12, 5)
        now = store.now()
        made = [Decision(c.escalation.id, "address", c.escalation.client_key, "block", "abuse", 1.0, now, now + 60)
                for c in claimed[:4]]
        store.settle([c.receipt for c in claimed[:4]], made)
        print(len(claimed), flush=True)
        time.sleep(60)
    """
    victim = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=subprocess.PIPE)
    assert victim.stdout is not None
    with victim.stdout:
        assert victim.stdout.readline().strip() == b"12"
        victim.kill()
        victim.wait()
    assert sorted(int(one.id) for one in store.active()) == [0, 1, 2, 3]
    assert claimed_ids(store, 16) == sorted(str(n) for n in range(4, 20))
    assert store.stats()["reclaimed"] == 8
    assert store.dead() == []
    assert store.depth() == 0


def test_clocks_that_differ(server: RedisServer, opened: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    right = opened(server.address)
    made = decision(right, "d", lasts_s=600)
    right.decide(made)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 7200)  # this pod's clock is two hours ahead
    wrong = opened(server.address, spool="other.db")
    assert [one.id for one in wrong.active()] == ["d"]
    assert abs(wrong.remaining_s(made) - right.remaining_s(made)) < 5
    late = decision(wrong, "late", key=5, lasts_s=60)
    assert wrong.decide(late)
    assert 0 < right.remaining_s(late) < 65
    wrong.put([escalation("a")])
    assert [one.escalation.id for one in right.claim("one", 1, 0)] == ["a"]


# ways to reach it


def password_file(folder: Path, password: str, mode: int = 0o400) -> str:
    path = folder / "password"
    path.unlink(missing_ok=True)
    path.write_text(password + "\n")
    path.chmod(mode)
    return str(path)


def test_tls_and_an_acl_user(tmp_path: Path, closing: Made, opened: Made, caplog: pytest.LogCaptureFixture) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    files = {name: str(tmp_path / name) for name in ("ca", "cert", "key", "client", "client-key", "stranger")}
    authority.cert_pem.write_to_path(files["ca"])
    stranger.cert_pem.write_to_path(files["stranger"])
    for cert, chain, key in (
        (authority.issue_cert("127.0.0.1"), "cert", "key"),
        (authority.issue_cert("judge"), "client", "client-key"),
    ):
        cert.private_key_pem.write_to_path(files[key])
        cert.cert_chain_pems[0].write_to_path(files[chain])
    acl = tmp_path / "users.acl"
    acl.write_text(
        "user default off\n"
        "user judge on >sesame-4711 ~{outrider:shop}* resetchannels -@all +@read +@write +@stream +@scripting "
        "+@connection +time +info\n"
        "user admin on >admin ~* &* +@all\n"
    )
    tls = {
        "ssl": True, "ssl_ca_certs": files["ca"], "ssl_certfile": files["client"], "ssl_keyfile": files["client-key"]
    }  # fmt: skip
    options = ["--tls-ca-cert-file", files["ca"], "--tls-cert-file", files["cert"], "--tls-key-file", files["key"]]
    server = closing(RedisServer(tmp_path / "redis", *options, "--aclfile", str(acl), tls=tls))
    try:
        server.start()
    except RuntimeError as error:
        pytest.skip(f"this redis-server has no TLS: {str(error)[-200:]}")
    good = {
        "name": "shop", "tls": True, "tls_ca_file": files["ca"], "tls_cert_file": files["client"],
        "tls_key_file": files["client-key"], "username": "judge",
        "password_file": password_file(tmp_path, "sesame-4711"),
    }  # fmt: skip
    store = opened(server.address, **good)
    heard = Heard()
    store.follow(heard.change, heard.gap)
    store.put([escalation("a")])
    [work] = store.claim("one", 1, 1)
    store.settle([work.receipt], [decision(store, "d")], [judgement("a")])
    eventually(lambda: heard.ids == ["d"])
    assert store.undo("d", "alice") is not None
    store.feedback("a", "benign", "alice")
    assert store.stats()["errors"] == 0
    for wrong in ({"tls_ca_file": files["stranger"]}, {"name": "another"}, {"tls": False, "tls_ca_file": None,
                   "tls_cert_file": None, "tls_key_file": None}):  # fmt: skip
        other = opened(server.address, spool="other.db", **{**good, **wrong})
        with pytest.raises(StoreUnavailable):
            other.depth()
    # a new password is taken from the file at the next connect
    password_file(tmp_path, "wrong-0815")
    rotated = opened(server.address, spool="third.db", **good)
    with pytest.raises(StoreUnavailable):
        rotated.depth()
    with server.client(username="admin", password="admin") as client:
        client.acl_setuser("judge", enabled=True, passwords=["+wrong-0815"])
    assert rotated.depth() == 0
    assert "sesame" not in caplog.text
    assert "0815" not in caplog.text


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [("x", 0o444, "anyone may read"), ("", 0o400, "one line"), ("a\nb", 0o400, "one line"), ("x" * 5000, 0o400, "one")],
)
def test_a_password_file_that_will_not_do(tmp_path: Path, content: str, mode: int, says: str) -> None:
    given = {"backend": "redis", "addresses": ("127.0.0.1:1",), "path": str(tmp_path / "spool.db")}
    with pytest.raises(StoreError, match=says):
        open_store(JudgeStore(**given, password_file=password_file(tmp_path, content, mode)))
    with pytest.raises(StoreError, match="can't be read"):
        open_store(JudgeStore(**given, password_file=str(tmp_path / "none")))


def whole_round(store: Store) -> None:
    heard = Heard()
    store.follow(heard.change, heard.gap)
    assert store.put([escalation("a"), escalation("b", client=2)]) == 2
    claimed = store.claim("one", 10, 5)
    assert len(claimed) == 2
    store.settle([one.receipt for one in claimed], [decision(store, "d")], [judgement("a"), judgement("b")])
    eventually(lambda: heard.ids == ["d"])
    assert [one.id for one in store.active()] == ["d"]
    assert store.stats()["spooled"] == 0


def test_cluster(tmp_path: Path, closing: Made, opened: Made) -> None:
    # by itself the bus takes the port 10,000 above, which there may not be
    bus = ("--cluster-port", str(free_port()))
    server = closing(RedisServer(tmp_path / "redis", "--cluster-enabled", "yes", *bus)).start()

    def whole() -> None:
        with server.client() as client:
            eventually(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=True))

    with server.client() as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    whole()
    store = opened(server.address, cluster=True, timeout="1s")
    whole_round(store)
    server.stop()
    assert store.put([escalation("during")]) == 1
    server.start()
    whole()
    assert claimed_ids(store, 1) == ["during"]


def test_sentinel_and_a_failover(tmp_path: Path, closing: Made, opened: Made) -> None:
    if shutil.which("redis-sentinel") is None:
        pytest.skip("there is no redis-sentinel (Debian: redis-sentinel)")
    first = closing(RedisServer(tmp_path / "first")).start()
    options = ("--replicaof", f"127.0.0.1 {first.port}", "--repl-diskless-sync-delay", "0")
    second = closing(RedisServer(tmp_path / "second", *options)).start()
    with second.client() as client:
        eventually(lambda: client.info("replication")["master_link_status"] == "up")
    sentinel = closing(RedisServer(tmp_path / "sentinel", "--sentinel", mode="sentinel"))
    (tmp_path / "sentinel" / "sentinel.conf").write_text(
        f"port {sentinel.port}\nbind 127.0.0.1\ndir {tmp_path / 'sentinel'}\n"
        f"sentinel monitor shop 127.0.0.1 {first.port} 1\n"
        "sentinel down-after-milliseconds shop 500\nsentinel failover-timeout shop 3000\n"
    )
    sentinel.start()
    with sentinel.client() as client:
        eventually(lambda: client.sentinel_slaves("shop"))
    store = opened(sentinel.address, sentinel_master="shop", timeout="1s")
    whole_round(store)
    with second.client() as client:
        eventually(lambda: client.exists("{outrider:outrider}:index"))
    first.stop(signal.SIGKILL)
    assert store.put([escalation("during")]) == 1
    with second.client() as client:
        eventually(lambda: client.info("replication")["role"] == "master")
    assert claimed_ids(store, 1) == ["during"]
    assert [one.id for one in store.active()] == ["d"]


# the file


def file_store(closing: Made, path: Path, **more: Any) -> Store:
    return closing(open_store(JudgeStore(path=str(path), **more)))


def test_the_file_is_its_owners(closing: Made, tmp_path: Path) -> None:
    path = tmp_path / "judge.db"
    path.touch(0o644)
    store = file_store(closing, path)
    store.put([escalation("a")])
    for name in ("judge.db", "judge.db-wal", "judge.db-shm"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "judge.db.wake").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("where", [0, 4096])
def test_a_damaged_file_is_moved_aside(
    closing: Made, tmp_path: Path, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "judge.db"
    store = open_store(JudgeStore(path=str(path)))
    store.put([escalation("lost")])
    store.close()
    with path.open("r+b") as file:
        file.seek(where)
        file.write(b"\xa5" * 65536)
    store = file_store(closing, path)
    eventually(lambda: store.put([escalation("new")]) == 1)
    assert [one.escalation.id for one in store.claim("one", 10, 0)] == ["new"]
    assert store.stats()["replaced"] == 1
    assert len(list(tmp_path.glob("judge.db.damaged-*[0-9]"))) == 1
    assert "is damaged" in caplog.text


def test_a_file_damaged_while_two_use_it(closing: Made, tmp_path: Path) -> None:
    path = tmp_path / "judge.db"
    one, two = file_store(closing, path), file_store(closing, path)
    heard = Heard()
    two.follow(heard.change, heard.gap)
    one.put([escalation("lost")])
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    with path.open("r+b") as file:
        file.write(b"\xa5" * 65536)
    with (tmp_path / "judge.db-wal").open("r+b") as file:
        file.truncate(0)
    # not cut short: SQLite has it mapped, and whoever touches what is missing gets a SIGBUS and is started again
    with (tmp_path / "judge.db-shm").open("r+b") as file:
        file.write(b"\xa5" * os.path.getsize(tmp_path / "judge.db-shm"))
    eventually(lambda: one.put([escalation("new")]) == 1)
    eventually(lambda: [c.escalation.id for c in two.claim("one", 10, 0)] == ["new"])
    eventually(lambda: heard.gaps >= 1)
    one.decide(decision(one, "d"))
    eventually(lambda: heard.ids == ["d"])


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes"
    text.write_text("not a database\n" * 100)
    with pytest.raises(StoreError, match="name another file"):
        open_store(JudgeStore(path=str(text)))
    assert text.read_text().startswith("not a database")
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE orders (id)")
    db.close()
    with pytest.raises(StoreError, match="another program"):
        open_store(JudgeStore(path=str(other)))


def test_a_file_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "judge.db"
    open_store(JudgeStore(path=str(path))).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(StoreError, match="layout 7, this Outrider speaks 1"):
        open_store(JudgeStore(path=str(path)))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be opened"):
        open_store(JudgeStore(path=str(tmp_path / "no" / "judge.db")))
    with pytest.raises(StoreError, match="can't be opened"):
        open_store(JudgeStore(path=str(tmp_path)))


def test_a_file_that_may_only_be_read() -> None:
    folder = Path(tempfile.mkdtemp(prefix="outrider-"))
    try:
        path = folder / "judge.db"
        open_store(JudgeStore(path=str(path))).close()
        path.chmod(0o444)
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                open_store(JudgeStore(path=str(path)))
            except StoreError as error:
                code = 0 if "write permission" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_full_disk_sheds(closing: Made, tmp_path: Path) -> None:
    store = file_store(closing, tmp_path / "judge.db")
    assert store.put([escalation("before")]) == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, hard))  # as a disk without room: writes behind it fail
    try:
        taken = sum(store.put([escalation(str(n), client=n + 2, text="x" * 8000)]) for n in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert taken < 100
    stats = store.stats()
    assert (stats["shed"], stats["put"]) == (100 - taken, taken + 1)
    assert stats["errors"] == stats["shed"]
    assert store.put([escalation("after")]) == 1
    assert len(claimed_ids(store, taken + 2)) == taken + 2


def test_a_lock_held_for_too_long(closing: Made, tmp_path: Path) -> None:
    store = file_store(closing, tmp_path / "judge.db", timeout="100ms")
    other = sqlite3.connect(tmp_path / "judge.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.put([escalation("a")]) == 0
    assert store.claim("one", 1, 0) == []
    with pytest.raises(StoreUnavailable, match="locked"):
        store.decide(decision(store, "d"))
    assert store.active() == []
    other.execute("ROLLBACK")
    other.close()
    assert store.put([escalation("a")]) == 1


def test_killed_right_after_put(closing: Made, tmp_path: Path) -> None:
    script = f"""
        import os
        from sidecar.config.judge_store import JudgeStore
        from sidecar.judge.store import open_store
        from sidecar.judge.types import Escalation
        store = open_store(JudgeStore(path={str(tmp_path / "judge.db")!r}))
        for n in range(50):
            assert store.put([Escalation(str(n), 1.0, "shop", "GET", "/", client_key=n)]) == 1
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = file_store(closing, tmp_path / "judge.db")
    assert claimed_ids(store, 50) == sorted(map(str, range(50)))


def test_a_store_is_not_carried_over_a_fork(closing: Made, tmp_path: Path) -> None:
    store = file_store(closing, tmp_path / "judge.db")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.put([escalation("a")])
        except StoreError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_dead_are_not_woken_forever(closing: Made, tmp_path: Path) -> None:
    one, two = (file_store(closing, tmp_path / "judge.db") for _ in range(2))
    threading.Thread(target=two.claim, args=("two", 1, 0)).start()
    folder = tmp_path / "judge.db.wake"
    eventually(lambda: len(list(folder.iterdir())) == 1)
    stale = folder / "1-dead"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(str(stale))
    one.put([escalation("a")])
    assert not stale.exists()
    assert len(list(folder.iterdir())) == 1
