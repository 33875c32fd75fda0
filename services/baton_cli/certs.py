"""`baton certs`: a small authority and what it signs, for machines and clusters that have none.

    ca.crt ca.key        the authority; its key stays with whoever renews
    router/ worker/      tls.crt tls.key ca.crt each, as cert-manager and kubernetes.io/tls name them
    client/              for clients of a gRPC API that asks for a certificate (grpc_tls: mutual)
    up/                  router and worker in one, for `baton up`

Run again, it renews: certificates that have used up two thirds of their time, or all with `renew_all`. The authority is
kept until the same is true of it; then old and new are trusted side by side. Decides on content; where it is kept is
a `Store`: a directory, or the Secrets of a Kubernetes namespace (`cluster_secrets`).
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from baton.errors import ConfigError

CA = "ca"
ROLES: Mapping[str, tuple[str, ...]] = {
    "router": ("router",),
    "worker": ("worker",),
    "client": ("client",),
    "up": ("router", "worker"),
}
CA_LIFE = timedelta(days=3650)
RENEW_AT = 2 / 3  # of a certificate's time
SKEW = timedelta(minutes=5)  # clocks that are behind

Files = dict[str, bytes]  # tls.crt, tls.key, ca.crt


class Store(Protocol):
    def read(self, name: str) -> Files:
        """Empty: nothing is there."""
        ...

    def write(self, name: str, files: Files) -> None:
        """All of it, or nothing: who reads meanwhile may see old and new side by side, but no half of a file."""
        ...


@dataclass(frozen=True)
class Directory:
    root: Path

    def read(self, name: str) -> Files:
        found = {key: self._path(name, key) for key in ("tls.crt", "tls.key", "ca.crt")}
        return {key: path.read_bytes() for key, path in found.items() if path.exists()}

    def write(self, name: str, files: Files) -> None:
        for key, content in files.items():
            path = self._path(name, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.new")
            with suppress(FileNotFoundError):
                partial.unlink()
            mode = 0o600 if key == "tls.key" else 0o644
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
                out.write(content)
            partial.replace(path)

    def _path(self, name: str, key: str) -> Path:
        return self.root / (key.replace("tls.", "ca.") if name == CA else f"{name}/{key}")


def make_certificates(
    store: Store, roles: tuple[str, ...], domain: str, days: int, now: datetime, *, renew_all: bool = False
) -> list[str]:
    """What was made, in words; empty when all is fresh."""
    made = []
    authority = store.read(CA)
    if not authority or _is_due(authority["tls.crt"], now):
        old = authority.get("tls.crt", b"")
        authority = _new_authority(domain, now)
        # The newest first: it is the one that signs.
        store.write(
            CA, {"tls.key": authority["tls.key"], "tls.crt": authority["tls.crt"] + _living(old, now)}
        )
        authority = store.read(CA)
        made.append(f"an authority for {domain}")
    for role in roles:
        have, names = store.read(role), [f"{name}.{domain}" for name in ROLES[role]]
        if renew_all or _must_make(have, authority["tls.crt"], names, now):
            store.write(role, _signed(authority, names, now, now + timedelta(days=days)))
            made.append(f"{role}: {', '.join(names)}")
    return made


def _must_make(have: Files, trusted: bytes, names: list[str], now: datetime) -> bool:
    if set(have) != {"tls.crt", "tls.key", "ca.crt"} or have["ca.crt"] != trusted:
        return True
    certificate = x509.load_pem_x509_certificate(have["tls.crt"])
    said = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return _is_due(have["tls.crt"], now) or said.value.get_values_for_type(x509.DNSName) != names


def _is_due(cert: bytes, now: datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(cert)
    except ValueError:
        raise ConfigError("what is there holds no certificate: move it away, or name another place") from None
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= start + RENEW_AT * (end - start)


def _living(cert: bytes, now: datetime) -> bytes:
    """Of a former authority: what its certificates are still accepted by."""
    found = x509.load_pem_x509_certificates(cert) if cert else []
    return b"".join(_pem(certificate) for certificate in found if certificate.not_valid_after_utc > now)


def _new_authority(domain: str, now: datetime) -> Files:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"baton authority of {domain}")
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key.public_key(), now, now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return {"tls.crt": _pem(certificate), "tls.key": _key_pem(key)}


def _signed(authority: Files, names: list[str], now: datetime, until: datetime) -> Files:
    issuer = x509.load_pem_x509_certificate(authority["tls.crt"])
    issuer_key = serialization.load_pem_private_key(authority["tls.key"], password=None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(until, issuer.not_valid_after_utc)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(_name(names[0]), issuer.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    return {"tls.crt": _pem(certificate), "tls.key": _key_pem(key), "ca.crt": authority["tls.crt"]}


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def utc_now() -> datetime:
    return datetime.now(UTC)
