"""`baton probe`: is that process healthy? For container health checks, in images that have no curl."""

import urllib.error
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import TlsConfig
from baton.errors import ConfigError, Unavailable

PLAIN = TlsConfig()


def probe(target: str, timeout_s: float, tls: TlsConfig = PLAIN, peer: str = "worker") -> None:
    """An HTTP URL must answer 2xx; a host:port must be a gRPC server that says SERVING. Raises Unavailable."""
    if target.startswith(("http://", "https://")):
        _probe_http(target, timeout_s)
    else:
        _probe_grpc(target, timeout_s, tls, peer)


def _probe_http(url: str, timeout_s: float) -> None:
    try:
        urllib.request.urlopen(url, timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        with error:
            raise Unavailable(f"{url} answers {error.code}") from error
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url}: {getattr(error, 'reason', error)}") from error


def _channel(address: str, tls: TlsConfig, peer: str) -> grpc.Channel:
    if not (tls.cert and tls.key and tls.ca):
        return grpc.insecure_channel(address)
    try:
        ca, key, cert = (Path(file).read_bytes() for file in (tls.ca, tls.key, tls.cert))
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    name = ("grpc.ssl_target_name_override", f"{peer}.{tls.domain}")
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=[name])


def _probe_grpc(address: str, timeout_s: float, tls: TlsConfig, peer: str) -> None:
    with _channel(address, tls, peer) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise Unavailable(f"{address}: {error.code().name}") from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{address}: {status}")
