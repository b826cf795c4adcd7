"""The way to Redis: clients by the settings, logins out of files, errors into ours, and a breaker before it all."""

from __future__ import annotations

import os
import random
import stat
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError, NoScriptError, RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from sidecar.config.judge_store import JudgeStore, server_of
from sidecar.judge.store.base import StoreError, StoreUnavailable, log, printable
from sidecar.judge.store.redis_scripts import Script

PASSWORD_BYTES_MAX = 4096
CONNECTIONS_MAX = 64
BLOCK_S = 2.0  # longest blocking read; with timeout_s after it a silent connection is taken for dead
BACKOFF_S, BACKOFF_S_MAX = 0.1, 5.0
T = TypeVar("T")
Client = Any  # Redis or RedisCluster: they have the commands in common, but no type
_Node: Any = ClusterNode  # these two are untyped
_Sentinel: Any = Sentinel


def read_password(path: str) -> str:
    """Raises StoreError, which never has the content in it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise StoreError(f"{path} is not a file")
            if mode & 0o007:
                raise StoreError(f"{path}: anyone may read the password: chmod 0440 it")
            text = file.read(PASSWORD_BYTES_MAX + 1).decode().rstrip("\r\n")
    except OSError as error:
        raise StoreError(f"{path}: the password can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StoreError(f"{path}: the password is not UTF-8 text") from None
    if not text or len(text) > PASSWORD_BYTES_MAX or "\n" in text:
        raise StoreError(f"{path} must hold one line of at most {PASSWORD_BYTES_MAX} bytes")
    return text


class _Login(CredentialProvider):
    """Reads the file on every connect."""

    def __init__(self, username: str | None, path: str) -> None:
        self._username, self._path = username, path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = read_password(self._path)
        except StoreError as error:
            raise ConnectionError(str(error)) from None
        return (password,) if self._username is None else (self._username, password)


class Breaker:
    """After a failure nobody asks for a while, growing from 0.1 to 5 s, by a random share so that pods don't return
    in step; then one may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._until = 0.0

    def wait_s(self) -> float:
        """0: go ahead. Who is told so after failures holds the others off for the time of its try."""
        with self._lock:
            now = time.monotonic()
            if not self._failures or now >= self._until:
                if self._failures:
                    self._until = now + BACKOFF_S
                return 0.0
            return self._until - now

    def open_s(self) -> float:
        """How long nobody will be let through."""
        with self._lock:
            return max(0.0, self._until - time.monotonic()) if self._failures else 0.0

    def failed(self) -> bool:
        """Whether it was the first failure."""
        with self._lock:
            self._failures += 1
            longest = min(BACKOFF_S_MAX, BACKOFF_S * 2 ** min(self._failures - 1, 10))
            self._until = time.monotonic() + longest * random.uniform(0.5, 1.0)
            return self._failures == 1

    def succeeded(self) -> bool:
        """Whether there were failures before."""
        if not self._failures:
            return False
        with self._lock:
            was, self._failures = self._failures > 0, 0
            return was


class Link:
    """One way to Redis with its own connections and its own longest wait for an answer."""

    def __init__(self, settings: JudgeStore, wait_s: float, counted: Callable[[str], None]) -> None:
        self._settings, self._wait_s, self._counted = settings, wait_s, counted
        self._lock = threading.Lock()
        self._client: Client = None
        self._closed = False
        self.breaker = Breaker()

    def ask(self, do: Callable[[Client], T], *, patient: bool = True) -> T:
        """do(client). Raises StoreUnavailable; with patient=False also at once while the breaker is open."""
        wait_s = self.breaker.wait_s()
        if wait_s and not patient:
            raise StoreUnavailable(f"Redis can't be reached; next try in {wait_s:.1f} s")
        client = self._made()
        try:
            found = do(client)
        except (RedisError, RedisClusterException, OSError, ValueError, AttributeError) as error:
            if self._closed:
                raise StoreUnavailable("the store is closed") from None
            if isinstance(error, (ValueError, AttributeError)) and client is self._client:
                raise  # not because another thread closed the connection
            if self._settings.cluster:
                self._drop()  # it may have moved altogether
            raise self._trouble(error) from None
        if self.breaker.succeeded():
            self._counted("reconnects")
            log.warning("Redis answers again")
        return found

    def run(self, script: Script, keys: list[str], values: list[Any], *, patient: bool = True) -> Any:
        def do(client: Client) -> Any:
            try:
                return client.evalsha(script.sha, len(keys), *keys, *values)
            except NoScriptError:
                return client.eval(script.text, len(keys), *keys, *values)

        return self.ask(do, patient=patient)

    def close(self) -> None:
        """Whoever waits for an answer gets an error."""
        self._closed = True
        self._drop()

    def _trouble(self, error: Exception) -> StoreUnavailable:
        self._counted("errors")
        why = printable(f"{type(error).__name__}: {error}")
        if self.breaker.failed():
            log.error("Redis doesn't answer as it should: %s", why)
        return StoreUnavailable(f"Redis: {why}")

    def _made(self) -> Client:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            if self._client is None:
                try:
                    self._client = make_client(self._settings, self._wait_s)
                except (RedisError, RedisClusterException, OSError) as error:
                    raise self._trouble(error) from None
            return self._client

    def _drop(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is None:
            return
        nodes = [client]
        if self._settings.cluster:
            nodes = [node.redis_connection for node in client.get_nodes()]
        for node in nodes:
            if node is not None:
                node.connection_pool.disconnect(inuse_connections=True)


def make_client(settings: JudgeStore, wait_s: float) -> Client:
    """A client; it connects when it is first used, that of a Cluster at once (RedisClusterException)."""
    common: dict[str, Any] = {
        "socket_timeout": wait_s,
        "socket_connect_timeout": settings.timeout_s,
        "socket_keepalive": True,
        "protocol": 2,
        "client_name": "outrider",
    }
    if settings.tls:
        common.update(
            ssl=True,
            ssl_ca_certs=settings.tls_ca_file,
            ssl_certfile=settings.tls_cert_file,
            ssl_keyfile=settings.tls_key_file,
            ssl_check_hostname=True,
        )
    servers = [server_of(address) for address in settings.addresses]
    # a connection that was closed while it lay idle is no failure: once again, at once; but who waits has to hear of it
    retry = Retry(NoBackoff(), 1 if wait_s <= settings.timeout_s else 0, (ConnectionError,))
    ours = {**common, "retry": retry, "max_connections": CONNECTIONS_MAX}
    if settings.password_file is not None:
        ours["credential_provider"] = _Login(settings.username, settings.password_file)
    if settings.cluster:
        return RedisCluster(startup_nodes=[_Node(host, port) for host, port in servers], **ours)
    ours["db"] = settings.database
    if settings.sentinel_master is not None:
        if settings.sentinel_password_file is not None:
            common["credential_provider"] = _Login(settings.sentinel_username, settings.sentinel_password_file)
        common["socket_timeout"] = settings.timeout_s
        common["retry"] = Retry(NoBackoff(), 0)
        return _Sentinel(servers, sentinel_kwargs=common, **ours).master_for(settings.sentinel_master)
    host, port = servers[0]
    if port is None:
        return Redis(unix_socket_path=host, **{k: v for k, v in ours.items() if k != "socket_keepalive"})
    return Redis(host=host, port=port, **ours)
