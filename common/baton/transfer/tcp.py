"""KV over plain TCP, straight from the payload's buffers and straight into the sink's.

Without TLS (`transfer.tls`) there is no authentication and no encryption: bind to a network you trust.
"""

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

from baton.certificates import Certificates
from baton.clock import Clock
from baton.errors import ConfigError, TransferError
from baton.transfer.base import PIECE_TIMEOUT_S
from baton.transfer.sockets import Line, SocketTransport, greet
from baton.transfer.stream import Stream
from baton.transfer.tls import TlsStream

# Buffer sizes are left alone: Linux tunes them itself, up to tcp_rmem and tcp_wmem, until somebody sets them.
# Keep-alive: an idle peer whose machine vanished is noticed after a minute.
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class TcpTransport(SocketTransport):
    """`advertise_host` is what peers are told to connect to; needed when `host` binds every interface."""

    name = "tcp"

    def __init__(
        self,
        clock: Clock,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        advertise_host: str | None = None,
        piece_timeout_s: float = PIECE_TIMEOUT_S,
        tls: Certificates | None = None,
    ) -> None:
        if advertise_host is None and host in ("", "0.0.0.0", "::"):
            raise ConfigError(
                f"transfer.host {host!r} binds every interface: set transfer.advertise_host too"
            )
        super().__init__(clock, piece_timeout_s=piece_timeout_s)
        self._host = host
        self._port = port
        self._tls = tls
        self._advertise_host = advertise_host or host

    async def _bind(self) -> tuple[socket.socket, str]:
        listener = None
        try:
            family, _, _, _, address = (await _resolve(self._host, self._port))[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            if listener is not None:
                listener.close()
            raise ConfigError(f"cannot receive KV on {self._host}:{self._port}: {error.strerror}") from None
        return listener, _format(self._advertise_host, listener.getsockname()[1])

    async def _dial(self, address: str) -> socket.socket:
        family, _, _, _, sockaddr = (await _resolve(*_parse(address)))[0]
        sock = self._socket(family)
        try:
            await asyncio.get_running_loop().sock_connect(sock, sockaddr)
        except BaseException:
            sock.close()
            raise
        return sock

    def _socket(self, family: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock

    async def _greet(self, sock: socket.socket, *, is_receiver: bool) -> Line:
        for level, option, value in _OPTIONS:
            sock.setsockopt(level, option, value)
        stream = self._open(sock, is_receiver)
        try:
            await stream.shake_hands()
            await greet(stream)
        except BaseException:
            stream.close()  # which may have taken the socket over
            raise
        return Line(stream)

    def _open(self, sock: socket.socket, is_receiver: bool) -> Stream:
        if self._tls is None:
            return Stream(sock)
        return TlsStream(sock, self._tls, is_receiver=is_receiver)

    def _name_of(self, peer: Any) -> str:
        return _format(peer[0], peer[1])


async def _resolve(host: str, port: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]


def _parse(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "tcp" or not host or not port:
        raise TransferError(f"{address!r} is not an address of the form tcp://host:port")
    return host, port


def _format(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
