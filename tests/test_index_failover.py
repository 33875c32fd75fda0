"""The index behind Redis Sentinel and in a Redis Cluster, both of real processes, before and after a failover."""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port, free_ports
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError
from redis_server import default_server
from test_index import blocks, join, record_of

from baton.clock import SystemClock
from baton.errors import ConfigError, Unavailable
from baton.index.redis import RedisIndex
from baton.index.redis_url import parse_redis_url
from baton.request import WorkerId

CLOCK, NAMESPACE = SystemClock(), "fleet"
W1 = WorkerId("w1")
CHAIN = blocks(5)
START_S = 30.0
SLOT = key_slot(b"{fleet}:ev")
PASSWORD = "s3cret"


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(RedisError, OSError, IndexError):
            if holds():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def processes(directory: Path, *servers: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    common = ["--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    running = [
        subprocess.Popen([default_server(), *server, *common], stdout=subprocess.DEVNULL)
        for server in servers
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


async def serves(index: RedisIndex) -> bool:
    try:
        await index.renew(record_of(W1), lease_s=30.0)
        return await index.workers() == [record_of(W1)]
    except Unavailable:
        return False


async def until_serving(index: RedisIndex) -> None:
    async with asyncio.timeout(START_S):
        while not await serves(index):
            await asyncio.sleep(0.1)


async def test_sentinels_name_the_master_and_after_a_failover_the_new_one(tmp_path: Path) -> None:
    first, second, sentinel = free_ports(3)
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {sentinel}\nsentinel monitor baton 127.0.0.1 {first} 1\nsentinel auth-pass baton {PASSWORD}\n"
        "sentinel down-after-milliseconds baton 300\nsentinel failover-timeout baton 2000\n"
    )
    login = ["--requirepass", PASSWORD, "--masterauth", PASSWORD]
    replica = ["--port", str(second), "--replicaof", "127.0.0.1", str(first)]
    servers = (["--port", str(first), *login], [*replica, *login], [str(config), "--sentinel"])
    with processes(tmp_path, *servers) as running, Redis(port=sentinel) as asked:
        until(lambda: asked.sentinel_slaves("baton")[0]["master-link-status"] == "ok")
        silent = free_port()  # a Sentinel that is gone is passed over
        url = f"redis+sentinel://:{PASSWORD}@127.0.0.1:{silent},127.0.0.1:{sentinel}/baton/0"
        index = RedisIndex(url, NAMESPACE, CLOCK, timeout_s=5.0)
        await join(index, record_of(W1), CHAIN)
        assert await index.match(CHAIN, [W1]) == {W1: 5}
        running[0].kill()
        await until_serving(index)
        assert asked.sentinel_masters()["baton"]["port"] == second
        await index.publish(W1, record_of(W1).incarnation, CHAIN, [], snapshot=True)
        assert await index.match(CHAIN, [W1]) == {W1: 5}
        assert PASSWORD not in index.where
        await index.aclose()

        unknown = RedisIndex(f"redis+sentinel://127.0.0.1:{sentinel}/other", NAMESPACE, CLOCK, timeout_s=5.0)
        with pytest.raises(Unavailable, match="no Sentinel knows a master"):
            await unknown.workers()
        await unknown.aclose()


async def test_in_a_cluster_the_index_follows_its_slot(tmp_path: Path) -> None:
    ports = [cluster_port(), cluster_port()]
    cluster = ["--cluster-enabled", "yes", "--cluster-config-file"]
    nodes = [["--port", str(port), *cluster, f"nodes-{port}.conf"] for port in ports]
    with processes(tmp_path, *nodes), Redis(port=ports[0]) as a, Redis(port=ports[1]) as b:
        for node, slots in ((a, range(8192)), (b, range(8192, 16384))):
            until(node.ping)
            node.execute_command("CLUSTER ADDSLOTS", *slots)
        a.execute_command("CLUSTER MEET", "127.0.0.1", ports[1])
        until(lambda: all(n.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for n in (a, b)))
        holder, other = (a, b) if SLOT < 8192 else (b, a)
        stranger = ports[1] if holder is a else ports[0]

        index = RedisIndex(f"redis+cluster://127.0.0.1:{stranger}", NAMESPACE, CLOCK, timeout_s=5.0)
        await join(index, record_of(W1), CHAIN)
        await index.publish(W1, record_of(W1).incarnation, blocks(5000), [], snapshot=True)
        assert await index.match(blocks(5000), [W1]) == {W1: 5000}
        assert holder.dbsize() > 0
        assert other.dbsize() == 0

        holder.flushall()
        target = other.execute_command("CLUSTER MYID").decode()
        for node in (other, holder):
            node.execute_command("CLUSTER SETSLOT", SLOT, "NODE", target)
        await until_serving(index)
        assert other.dbsize() > 0
        await index.aclose()


def cluster_port() -> int:
    """A free port whose cluster bus, 10000 above, is a free port, too."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), socket.socket() as bus:
            bus.bind(("127.0.0.1", port + 10_000))
            return port


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis+sentinel://u:p@a,b:26380/main", "redis+sentinel://a:26379,b:26380/main/0"),
        ("rediss+sentinel://a/main/3?ssl_cert_reqs=required", "rediss+sentinel://a:26379/main/3"),
        ("redis+cluster://:p@a:7000,[::1]:7001", "redis+cluster://a:7000,[::1]:7001"),
        ("rediss+cluster://a/0", "rediss+cluster://a:6379"),
        ("rediss://u:p@a/1", "rediss://a:6379/1"),
    ],
)
def test_urls_are_shown_without_secrets(url: str, where: str) -> None:
    assert parse_redis_url(url).where == where
    assert RedisIndex(url, NAMESPACE, CLOCK).where == where


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://a,b",
        "redis+sentinel://:s3cret@a/main/x",
        "redis+sentinel://a,,b/main",
        "redis+sentinel://:s3/cret@a/main",
        "redis+cluster://:s3cret@a/1",
        "redis+cluster://a:port",
        "redis+cluster://",
        "redis+other://a",
        "unix+cluster://a",
        "redis+cluster://a?no_such_option=1",
    ],
)
def test_what_cannot_be_right_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="Redis URL") as caught:
        RedisIndex(url, NAMESPACE, CLOCK)
    assert not any(piece in caught.value.message for piece in ("s3", "cret"))
