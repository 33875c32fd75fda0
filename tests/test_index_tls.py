"""The registry and the prefix index in a Redis that speaks TLS under an authority of its own, and who is refused there.

Redis itself ends the TLS where the installed server can (Debian's), a proxy in front of it always.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from free_ports import free_port
from redis_server import RedisServer, default_server
from test_index import blocks, join, record_of

from baton.clock import SystemClock
from baton.errors import ConfigError, Unavailable
from baton.index.base import WorkerJoined
from baton.index.redis import RedisIndex
from baton.request import WorkerId

CLOCK, W1, CHAIN = SystemClock(), WorkerId("w1"), blocks(5)
START_S = 20.0


class Authority:
    """Its certificate and what it issued, as PEM files."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._ca, self._directory = trustme.CA(), directory
        self.file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for this host name, and its key."""
        issued = self._ca.issue_cert(name)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def plain() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@asynccontextmanager
async def proxied(plain: RedisServer, authority: Authority, clients: bool) -> AsyncIterator[int]:
    """A port where TLS ends and `plain` goes on."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.file)
    context.load_cert_chain(*authority.issue("localhost"))
    context.verify_mode = ssl.CERT_REQUIRED if clients else ssl.CERT_NONE

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", plain.port)
        await asyncio.gather(forward(reader, behind[1]), forward(behind[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def native(plain: RedisServer, authority: Authority, clients: bool) -> AsyncIterator[int]:
    certificate, key = authority.issue("localhost")
    port = free_port()
    files = ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", authority.file]
    asked = ["--tls-auth-clients", "yes" if clients else "no", "--save", "", "--bind", "127.0.0.1"]
    process = await asyncio.create_subprocess_exec(
        default_server(),
        "--port",
        "0",
        "--tls-port",
        str(port),
        *files,
        *asked,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(START_S):
            while not await listens(port):
                if process.returncode is not None:
                    pytest.skip("this redis-server is built without TLS")
                await asyncio.sleep(0.05)
        yield port
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


FRONTS = pytest.mark.parametrize("front", [proxied, native], ids=["proxy", "redis"])


def index_at(port: int, host: str = "localhost", **options: Path) -> RedisIndex:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return RedisIndex(f"rediss://{host}:{port}/0?{query}", "fleet", CLOCK, timeout_s=5.0)


async def refusal(index: RedisIndex) -> str:
    async with aclosing(index):
        with pytest.raises(Unavailable) as refused:
            await index.workers()
    return str(refused.value)


@FRONTS
async def test_registry_and_index_work_under_an_authority_of_their_own(
    front: Any, plain: RedisServer, authority: Authority
) -> None:
    async with (
        front(plain, authority, clients=False) as port,
        aclosing(index_at(port, ssl_ca_certs=authority.file)) as index,
    ):
        await join(index, record_of(W1), CHAIN)
        assert await index.workers() == [record_of(W1)]
        assert await index.match(CHAIN, [W1]) == {W1: 5}
        async with aclosing(index.watch()) as watched:
            assert await anext(watched) == WorkerJoined(record_of(W1))


async def test_the_authority_may_be_in_the_url(plain: RedisServer, authority: Authority) -> None:
    """As a Secret holds it: no file has to be where the process runs."""
    async with proxied(plain, authority, clients=False) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_data={quote(authority.file.read_text())}"
        async with aclosing(RedisIndex(url, "fleet", CLOCK, timeout_s=5.0)) as index:
            await join(index, record_of(W1), CHAIN)
            assert await index.match(CHAIN, [W1]) == {W1: 5}
            assert "CERTIFICATE" not in index.where


@FRONTS
async def test_a_server_that_asks_for_certificates_gets_ours(
    front: Any, plain: RedisServer, authority: Authority
) -> None:
    certificate, key = authority.issue("worker")
    async with front(plain, authority, clients=True) as port:
        own = {"ssl_certfile": certificate, "ssl_keyfile": key}
        async with aclosing(index_at(port, ssl_ca_certs=authority.file, **own)) as index:
            await join(index, record_of(W1), CHAIN)
            assert await index.match(CHAIN, [W1]) == {W1: 5}
        assert f"localhost:{port}" in await refusal(index_at(port, ssl_ca_certs=authority.file))


@FRONTS
async def test_who_is_not_the_server_that_was_meant_is_refused_and_said_so(
    front: Any, plain: RedisServer, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    async with front(plain, authority, clients=False) as port:
        for index in (index_at(port, ssl_ca_certs=other.file), index_at(port)):
            why = await refusal(index)
            assert "its certificate is refused (self-signed certificate in certificate chain)" in why
            assert "ssl_ca_certs in the URL names" in why
        why = await refusal(index_at(port, host="127.0.0.1", ssl_ca_certs=authority.file))
        assert "certificate is not valid for '127.0.0.1'" in why


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_files_that_are_not_there_are_named_at_once(option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option} of the Redis URL .*: there is no file /nowhere/a.pem$"):
        index_at(6379, **{option: Path("/nowhere/a.pem")})
