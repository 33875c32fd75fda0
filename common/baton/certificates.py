"""This process's certificate, its key and the authority that it trusts: read from files, and again when they change.

A certificate says by a DNS name among its subjectAltNames which role its holder has in which fleet: `router.DOMAIN` or
`worker.DOMAIN`. Both sides of a connection show one of the same authority, and each looks for the role that it expects.
Addresses play no part: workers come and go under addresses that nobody knows when a certificate is made. Roles do: a
worker's stolen certificate serves no one to call workers, and certificates of another fleet (DOMAIN) of the same
authority are of no use here.

    files --load--> Loaded --files change--> Loaded ...      what cannot be used is not taken: the former one stays
"""

import logging
import math
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from prometheus_client import CollectorRegistry, Gauge

from baton.clock import Clock
from baton.config import TlsConfig
from baton.errors import ConfigError
from baton.telemetry import event

log = logging.getLogger(__name__)

Signature: TypeAlias = tuple[tuple[int, int, int], ...]  # of the files on disk: (inode, size, mtime)
PeerRole: TypeAlias = Literal["router", "worker"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """One reading of the files; never changed. The contexts are TLS 1.3 and want a certificate of the peer."""

    cert: bytes
    key: bytes
    ca: bytes
    server: ssl.SSLContext
    client: ssl.SSLContext  # give it the name that the peer must have as `server_hostname`
    not_after: datetime


class Certificates:
    """Owns the files' latest usable content. `current` may be called from any thread."""

    def __init__(self, config: TlsConfig, own: PeerRole, clock: Clock) -> None:
        """Raises ConfigError for files that cannot be used."""
        self._domain = config.domain
        self._files = _files(config)
        self._own_name = self.name_of(own)
        self._clock = clock
        self._complaint = ""  # the latest, until files could be used again
        self._seen = _signature(self._files)
        self._loaded = self._load()

    def name_of(self, peer: PeerRole) -> str:
        """What the certificate of a peer in that role is for."""
        return f"{peer}.{self._domain}"

    def current(self) -> Loaded:
        """Looks whether the files changed, which costs a few microseconds."""
        seen = self._seen
        try:
            seen = _signature(self._files)
            if seen != self._seen:
                self._take(self._load(), seen)
        except ConfigError as error:
            self._seen = seen  # tried again when they change
            self._complain(error.message)
        return self._loaded

    @property
    def has_expired(self) -> bool:
        """The one in use: nobody renewed it in time."""
        return self._is_past(self._loaded.not_after)

    def _is_past(self, moment: datetime) -> bool:
        return moment <= datetime.fromtimestamp(self._clock.wall(), UTC)

    def _complain(self, why: str) -> None:
        if why != self._complaint:
            event(log, "the certificate stays the former one", level=logging.WARNING, why=why)
        self._complaint = why

    def _take(self, loaded: Loaded, seen: Signature) -> None:
        if _signature(self._files) != seen:
            return  # they are being written; the next call sees the rest
        self._seen, self._loaded, self._complaint = seen, loaded, ""
        event(log, "the certificate was read again", valid_until=loaded.not_after.isoformat())

    def _load(self) -> Loaded:
        cert, key, ca = self._files
        certificate = _first_certificate(cert)
        expires = certificate.not_valid_after_utc
        if self._is_past(expires):
            raise ConfigError(f"tls.cert {cert} expired on {expires:%Y-%m-%d}: renew it (`baton certs` can)")
        names = _dns_names(certificate)
        if self._own_name not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise ConfigError(
                f"tls.cert {cert} must have the DNS name {self._own_name} (see tls.domain); {has}"
            )
        return Loaded(
            cert.read_bytes(),
            key.read_bytes(),
            ca.read_bytes(),
            _context(ssl.PROTOCOL_TLS_SERVER, self._files),
            _context(ssl.PROTOCOL_TLS_CLIENT, self._files),
            expires,
        )


def load_certificates(config: TlsConfig, own: PeerRole, clock: Clock) -> Certificates | None:
    """None: no TLS. Raises ConfigError."""
    return Certificates(config, own, clock) if config.cert or config.key or config.ca else None


def export_expiry(certificates: Certificates | None, registry: CollectorRegistry) -> None:
    """A metric: who renews may be late, or gone."""
    gauge = Gauge(
        "baton_certificate_expiry_timestamp_seconds",
        "When this process's certificate expires, in Unix time; NaN without TLS.",
        registry=registry,
    )
    gauge.set_function(lambda: certificates.current().not_after.timestamp() if certificates else math.nan)


def _files(config: TlsConfig) -> tuple[Path, Path, Path]:
    if not (config.cert and config.key and config.ca):
        raise ConfigError("tls.cert, tls.key and tls.ca: set all three, or none")
    return Path(config.cert), Path(config.key), Path(config.ca)


def _signature(files: tuple[Path, ...]) -> Signature:
    try:
        stats = [file.stat() for file in files]
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _first_certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read tls.cert {file}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"tls.cert {file} holds no certificate in PEM") from None


def _dns_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return names.value.get_values_for_type(x509.DNSName)


def _context(protocol: int, files: tuple[Path, Path, Path]) -> ssl.SSLContext:
    cert, key, ca = map(str, files)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_CLIENT:
        context.set_alpn_protocols(["h2"])  # gRPC's servers close without it; receivers of KV do not look
    try:
        context.load_verify_locations(ca)
        # An encrypted key fails, instead of asking a terminal.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        why = f"cannot use tls.cert {cert}, tls.key {key} and tls.ca {ca}: {error}"
        raise ConfigError(why) from None
    return context
