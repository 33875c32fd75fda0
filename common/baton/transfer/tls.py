"""TCP under TLS 1.3: both sides show a certificate of the same authority, made for a worker of this fleet
(`baton.certificates`). A connection keeps what it was made with; the next one takes what the files hold by then.
"""

import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from baton.certificates import Certificates
from baton.errors import TransferError
from baton.transfer.stream import SCRATCH_BYTES, Stream
from baton.transfer.vector import Vector

T = TypeVar("T")

MAX_BYTES_PER_CALL = 2**16  # to encipher takes a few times as long as to copy, and others want their turns
_ALERT = b"\x15\x03\x01\x00\x02\x02\x46"  # protocol_version; OpenSSL sends none to who speaks no TLS
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"}


class TlsStream(Stream):
    """`shake_hands` comes before anything else. There is no `sendmsg` here: buffers go one by one, and copies are
    OpenSSL's own."""

    _sock: ssl.SSLSocket

    def __init__(self, sock: socket.socket, certificates: Certificates, *, is_receiver: bool) -> None:
        loaded = certificates.current()
        self._peer_name = certificates.name_of("worker")
        wrapped = (loaded.server if is_receiver else loaded.client).wrap_socket(
            sock,
            server_side=is_receiver,
            server_hostname=None if is_receiver else self._peer_name,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
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
        self._check_name()

    def _check_name(self) -> None:
        """OpenSSL compares names only for who connects."""
        certificate: Any = self._sock.getpeercert()
        names = [name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"]
        if self._peer_name not in names:
            shown = ", ".join(names) or "no name"
            raise TransferError(f"the peer's certificate is for {shown}, not for {self._peer_name}")

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
        return "the peer speaks no TLS: set tls.cert, tls.key and tls.ca there too"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not accepted here ({error.verify_message}): compare tls.ca and tls.domain"
    if "ALERT" in reason:
        return f"the peer does not accept this worker's certificate ({reason.lower()}): compare tls.ca and tls.domain"
    return f"TLS failed: {reason.lower() or error}"
