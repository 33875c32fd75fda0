"""A slower link for tests and benchmarks: TCP whose connections send at a given rate, paced by the Linux kernel."""

import socket
import struct

from baton.clock import Clock
from baton.transfer.tcp import TcpTransport

_SO_MAX_PACING_RATE = 47  # <asm-generic/socket.h>; not in Python's socket module


class PacedTcpTransport(TcpTransport):
    """Like TcpTransport in every other way. The rate holds for each connection that is made here."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        super().__init__(clock)
        self._bytes_per_s = bytes_per_s

    def _socket(self, family: int) -> socket.socket:
        sock = super()._socket(family)
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("Q", int(self._bytes_per_s)))
        return sock
