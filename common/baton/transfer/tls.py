"""TCP under TLS 1.3: both sides show a certificate, and both must be signed by the same authority.

Who has such a certificate may send and receive KV: names in certificates are not compared with addresses, because
workers come and go under addresses that nobody knows in advance. Files are read once, at the start.
"""

import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from baton.errors import ConfigError, TransferError
from baton.transfer.stream import SCRATCH_BYTES, Stream
from baton.transfer.vector import Vector

T = TypeVar("T")

MAX_BYTES_PER_CALL = 2**18  # enciphering takes a few times as long as copying
_ALERT = b"\x15\x03\x01\x00\x02\x02\x46"  # protocol_version; OpenSSL sends none to who speaks no TLS
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"}


@dataclass(frozen=True, slots=True)
class Tls:
    """What both ends of a connection are made from."""

    receiver: ssl.SSLContext
    sender: ssl.SSLContext


def load_tls(cert: str | None, key: str | None, ca: str | None) -> Tls | None:
    """PEM files; None without any. Raises ConfigError."""
    if not (cert or key or ca):
        return None
    if not (cert and key and ca):
        raise ConfigError("transfer.tls_cert, transfer.tls_key and transfer.tls_ca: set all three, or none")
    return Tls(
        _context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca), _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)
    )


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(ca)
        context.load_cert_chain(
            cert, key, password=""
        )  # an encrypted key fails, instead of asking a terminal
    except (OSError, ValueError) as error:
        why = f"cannot read transfer.tls_cert {cert}, tls_key {key} or tls_ca {ca}: {error}"
        raise ConfigError(why) from None
    return context


class TlsStream(Stream):
    """`shake_hands` comes before anything else. There is no `sendmsg` here: buffers go one by one, and copies are
    OpenSSL's own."""

    _sock: ssl.SSLSocket

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_receiver: bool) -> None:
        wrapped = context.wrap_socket(
            sock, server_side=is_receiver, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        super().__init__(wrapped)

    async def shake_hands(self) -> None:
        """Raises TransferError that says what the other side lacks."""

        def step(once: Vector) -> None:
            self._call(
                self._sock.do_handshake
            )  # its messages fit in an empty send buffer: it waits to read only
            once.advance(1)

        once = Vector((memoryview(b"-"),))
        try:
            await self._run(step, once, self._loop.add_reader, self._loop.remove_reader)
        except TransferError:
            with suppress(OSError):  # what stays unread makes the kernel reset the connection
                os.read(self._sock.fileno(), SCRATCH_BYTES)
                os.write(self._sock.fileno(), _ALERT)
            raise

    def _has_read_ahead(self) -> bool:
        return self._sock.pending() > 0

    def _read(self, target: Vector) -> None:
        left = MAX_BYTES_PER_CALL
        while target.left and (left > 0 or self._has_read_ahead()):
            (part,) = target.peek(MAX_BYTES_PER_CALL, 1)
            num_bytes: int = self._call(self._sock.recv_into, part)
            if not num_bytes:
                raise TransferError("the peer closed the connection")
            target.advance(num_bytes)
            left -= num_bytes

    def _write(self, source: Vector) -> None:
        left = MAX_BYTES_PER_CALL
        while source.left and left > 0:
            (part,) = source.peek(MAX_BYTES_PER_CALL, 1)
            num_bytes = self._call(self._sock.send, part)
            source.advance(num_bytes)
            left -= num_bytes

    def _call(self, call: Callable[..., T], *arguments: object) -> T:
        try:
            return call(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLEOFError:
            raise TransferError("the peer closed the connection") from None
        except ssl.SSLError as error:
            raise TransferError(_explain(error)) from None


def _explain(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    if reason in _NO_TLS:
        return "the peer speaks no TLS: set transfer.tls_cert, tls_key and tls_ca there too"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the peer's certificate is not accepted here ({error.verify_message}): compare transfer.tls_ca"
        )
    if "ALERT" in reason:
        return (
            f"the peer does not accept this worker's certificate ({reason.lower()}): compare transfer.tls_ca"
        )
    return f"TLS failed: {reason.lower() or error}"
