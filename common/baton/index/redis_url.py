"""Where Redis is, from one URL, and the connections to it.

    redis://[[user]:password@]host[:6379][/db]                              one server; rediss:// for TLS
    unix:///path/of/socket[?db=0]
    redis+sentinel://[[user]:password@]host[:26379],host.../service[/db]    the master that the Sentinels name
    redis+cluster://[[user]:password@]host[:6379],host...                   the primary of the namespace's slot

rediss+sentinel and rediss+cluster are the same over TLS. Options of redis-py may follow as a query
(?ssl_ca_certs=/path); Sentinels have their own sentinel_username and sentinel_password there.

Behind Sentinel and in a Cluster every connection asks first where to go, so a failover needs no more than
connecting again. redis-py's own Cluster client is not used: a call that is cancelled, as our deadlines do it,
leaves its reply on the connection for the next call. All our keys lie in one slot anyway.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import SplitResult, urlsplit

from redis.asyncio import Connection, ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from baton.errors import ConfigError

HINT = (
    "it looks like redis://[[user]:password@]host:port/0, rediss://..., unix:///path/of/socket, "
    "redis+sentinel://host1,host2/service/0 or redis+cluster://host1,host2"
)
PORTS = {"": 6379, "cluster": 6379, "sentinel": 26379}

Kind = Literal["", "sentinel", "cluster"]
Address = tuple[str, int]


@dataclass(frozen=True)
class RedisUrl:
    where: str  # as it may be shown: no user, no password, no options
    kind: Kind
    hosts: tuple[Address, ...]  # whom to ask first; none for a unix socket
    options: dict[str, Any]  # of redis-py's connections
    service: str = ""  # as the Sentinels call it


class Source(NamedTuple):
    pool: ConnectionPool
    others: Sequence[Redis]  # clients to be closed with it


def parse_redis_url(url: str) -> RedisUrl:
    """Raises ConfigError, without repeating the password."""
    scheme, kind, single, hosts = _taken_apart(url)
    try:
        parts = urlsplit(single)
        options: dict[str, Any] = dict(parse_url(single))
        addresses = tuple(_address(host, PORTS[kind]) for host in hosts)
        assert parts.port is None or parts.port  # reading it checks it
    except ValueError:  # its text may quote a part of the password
        raise ConfigError(f"the Redis URL cannot be read: {HINT}") from None
    if "@" in parts.path + parts.query + parts.fragment:
        raise ConfigError("the Redis URL cannot be read: write special characters of the password as %XX")
    if parts.scheme == "unix":
        return RedisUrl(f"unix://{options.get('path', '')}", "", (), options)
    return RedisUrl(*_shown(scheme, kind, parts, addresses, options))


def open_source(url: RedisUrl, key: str, timeout_s: float) -> Source:
    """Connects on first use. `key`: one of those that will be asked for, all of one slot. Raises ConfigError."""
    _check_files(url)
    options = url.options | {
        "protocol": 2,  # the same replies from every server version
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,  # deadlines are ours
        "socket_connect_timeout": timeout_s,
    }
    try:
        if url.kind == "sentinel":
            return _behind_sentinels(url, options, timeout_s)
        if url.kind == "cluster":
            return _in_cluster(url, options, key_slot(key.encode()), timeout_s)
        pool = ConnectionPool(**options)
        pool.make_connection()  # type: ignore[no-untyped-call]  # not connected: it only checks the options
    except (TypeError, ValueError, RedisError):
        why = f"the Redis URL at {url.where} has an option that redis-py does not know"
        raise ConfigError(why) from None
    return Source(pool, ())


def _check_files(url: RedisUrl) -> None:
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        file = url.options.get(name)
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{name} of the Redis URL at {url.where}: there is no file {file}")


# --- reading ---


def _taken_apart(url: str) -> tuple[str, Kind, str, list[str]]:
    """(scheme, kind, the URL of its first host alone, all hosts)."""
    scheme, mark, rest = url.partition("://")
    plain, plus, kind = scheme.partition("+")
    if not plus:
        return scheme, "", url, [_netloc(url).rpartition("@")[2]]
    if plain not in ("redis", "rediss") or kind not in ("sentinel", "cluster") or not mark:
        raise ConfigError(f"the Redis URL cannot be read: {HINT}")
    netloc = rest.partition("/")[0].partition("?")[0]
    login, at, hosts = netloc.rpartition("@")
    listed = hosts.split(",")
    single = f"{plain}://{login}{at}{listed[0]}{rest[len(netloc) :]}"
    return scheme, "sentinel" if kind == "sentinel" else "cluster", single, listed


def _netloc(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        raise ConfigError(f"the Redis URL cannot be read: {HINT}") from None


def _address(host: str, port: int) -> Address:
    parts = urlsplit(f"//{host}")
    return parts.hostname or "", port if parts.port is None else parts.port


def _shown(
    scheme: str, kind: Kind, parts: SplitResult, hosts: tuple[Address, ...], options: dict[str, Any]
) -> tuple[str, Kind, tuple[Address, ...], dict[str, Any], str]:
    service, path = "", parts.path.strip("/")
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if path.isdecimal():
            options["db"] = int(path)
    is_right = all(host for host, _ in hosts) and (not path or path.isdecimal())
    if not is_right or (kind == "sentinel" and not service) or (kind == "cluster" and options.get("db")):
        raise ConfigError(f"the Redis URL cannot be read: {HINT}")
    listed = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts)
    db = "" if kind == "cluster" else f"/{options.get('db', 0)}"
    name = f"/{service}" if service else ""
    return f"{scheme}://{listed}{name}{db}", kind, hosts, options, service


# --- connecting ---


def _asking(options: dict[str, Any], timeout_s: float, num_hosts: int) -> dict[str, Any]:
    """Options of a client that is asked where to go: one that is silent leaves time for the next."""
    own = {
        name: value
        for name, value in options.items()
        if name not in ("db", "connection_class", "host", "port")
    }
    each_s = timeout_s / (num_hosts + 1)
    is_tls = options.get("connection_class") is SSLConnection
    return (
        own | {"socket_timeout": each_s, "socket_connect_timeout": each_s} | ({"ssl": True} if is_tls else {})
    )


def _behind_sentinels(url: RedisUrl, options: dict[str, Any], timeout_s: float) -> Source:
    login = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    asking = _asking(options, timeout_s, len(url.hosts)) | login
    is_tls = options.pop("connection_class", None) is SSLConnection
    for name in ("host", "port"):
        options.pop(name, None)
    sentinel = Sentinel(url.hosts, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    pool = SentinelConnectionPool(url.service, sentinel, ssl=is_tls, **options)  # type: ignore[no-untyped-call]
    pool.make_connection()  # type: ignore[no-untyped-call]
    return Source(pool, tuple(sentinel.sentinels))


def _in_cluster(url: RedisUrl, options: dict[str, Any], slot: int, timeout_s: float) -> Source:
    asking = _asking(options, timeout_s, len(url.hosts))
    nodes = tuple(Redis(host=host, port=port, **asking) for host, port in url.hosts)
    is_tls = options.get("connection_class") is SSLConnection
    options["connection_class"] = _TlsPrimaryConnection if is_tls else _PrimaryConnection
    options.pop("db", None)
    pool = ConnectionPool(**options, locate=_Primary(nodes, url.hosts, slot).locate)
    pool.make_connection()  # type: ignore[no-untyped-call]
    return Source(pool, nodes)


class _Primary:
    """Of one slot."""

    def __init__(self, nodes: Sequence[Redis], addresses: Sequence[Address], slot: int) -> None:
        self._nodes = tuple(zip(nodes, addresses, strict=True))
        self._slot = slot

    async def locate(self) -> Address:
        for node, (asked, _) in self._nodes:
            with suppress(RedisError, OSError):
                slots = await node.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
                for first, last, (host, port, *_), *_ in slots:
                    if first <= self._slot <= last:
                        return host.decode() or asked, port
        raise RedisConnectionError(f"no node of the Cluster knows who has slot {self._slot}")


class _PrimaryConnection(Connection):
    """Goes where the slot is, and leaves when it is told that it is elsewhere."""

    def __init__(self, *, locate: Callable[[], Awaitable[Address]], **options: Any) -> None:
        super().__init__(**options)
        self._locate = locate

    async def connect(self) -> None:
        if not self.is_connected:
            self.host, self.port = await self._locate()
        await super().connect()  # type: ignore[no-untyped-call]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except (AskError, ClusterDownError) as error:
            await self.disconnect()
            raise RedisConnectionError(f"the slot is not here any more: {error}") from None


class _TlsPrimaryConnection(_PrimaryConnection, SSLConnection):
    """The same over TLS."""
