"""gRPC under TLS with certificates on both sides: what servers and channels are made with, and why there is no
connection, in words.

gRPC itself says "Socket closed" for most of what can be wrong, so `why_no_connection` makes a connection of its own.
"""

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from baton.certificates import Certificates, Loaded, PeerRole
from baton.errors import Unauthenticated
from baton.rpc.base import Caller

DIAGNOSE_S = 1.0  # for the connection that finds out
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "HTTP_REQUEST"}
_SET_ALL = "set tls.cert, tls.key and tls.ca"


@dataclass(frozen=True, slots=True)
class Security:
    """`server`: the role whose certificate a server must show to our channels. `serve_plain`: our own server is without
    TLS; `ask_callers` False: it asks for no certificates."""

    certificates: Certificates
    server: PeerRole = "worker"
    serve_plain: bool = False
    ask_callers: bool = True

    @property
    def server_name(self) -> str:
        return self.certificates.name_of(self.server)

    def server_credentials(self) -> grpc.ServerCredentials:
        """gRPC asks for the certificate before every handshake: a new one is in use from the next connection on."""
        return grpc.dynamic_ssl_server_credentials(self._presented(), self._presented, self.ask_callers)

    def _presented(self) -> Any:
        loaded = self.certificates.current()
        return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.cert)], loaded.ca)

    def check_caller(self, caller: Caller, auth: Mapping[str, Any]) -> None:
        """Raises Unauthenticated. `auth` is a call's authentication context."""
        if caller == "anyone":
            return
        names = [name.decode() for name in auth.get("x509_subject_alternative_name", ())]
        wanted = self.certificates.name_of(caller)
        if wanted not in names:
            shown = ", ".join(names) or "no name"
            raise Unauthenticated(f"only {wanted} may call here; the caller's certificate is for {shown}")


def channel_credentials(loaded: Loaded) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(loaded.ca, loaded.key, loaded.cert)


async def why_no_connection(address: str, security: Security | None) -> str:
    """Empty: nothing that has to do with certificates."""
    context = _unverified() if security is None else security.certificates.current().client
    name = None if security is None else security.server_name
    try:
        async with asyncio.timeout(DIAGNOSE_S):
            await _shake_hands(address, context, name)
    except _Refused as error:
        return _not_accepted(str(error), security)
    except ssl.SSLError as error:
        return _explain(error, name, security)
    except (OSError, TimeoutError):
        return ""
    return "" if name is not None else f"it speaks TLS: {_SET_ALL} here too"


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class _Refused(Exception):
    """After the handshake, which in TLS 1.3 is when a server looks at our certificate."""


async def _shake_hands(address: str, context: ssl.SSLContext, name: str | None) -> None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(
        host.strip("[]"), int(port), ssl=context, server_hostname=name or ""
    )
    try:
        if name is not None and not await reader.read(1):
            raise _Refused("it closed the connection")  # gRPC's servers do not say why
    except ConnectionError as error:
        raise _Refused("it reset the connection") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _explain(error: ssl.SSLError, name: str | None, security: Security | None) -> str:
    reason = error.reason or str(error)
    if reason in _NO_TLS:
        return "" if name is None else f"it speaks no TLS: {_SET_ALL} there too"
    if name is None:
        return f"it speaks TLS: {_SET_ALL} here too"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted here: {_advice(error.verify_message, name)}"
    return _not_accepted(reason.lower(), security)


def _not_accepted(why: str, security: Security | None) -> str:
    if security is not None and security.certificates.has_expired:
        why += "; ours has expired"
    return f"it does not accept our certificate ({why}): compare tls.ca and the dates of tls.cert"


def _advice(message: str, name: str) -> str:
    if "expired" in message:
        return "it has expired, renew it there"
    if "ostname mismatch" in message:
        return f"it is not for {name}, compare tls.domain"
    return f"{message}; both need certificates of one authority, compare tls.ca"
