"""`baton probe`: is that process healthy? For container health checks, in images that have no curl."""

import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import Unavailable


def probe(target: str, timeout_s: float) -> None:
    """An HTTP URL must answer 2xx; a host:port must be a gRPC server that says SERVING. Raises Unavailable."""
    if target.startswith(("http://", "https://")):
        _probe_http(target, timeout_s)
    else:
        _probe_grpc(target, timeout_s)


def _probe_http(url: str, timeout_s: float) -> None:
    try:
        urllib.request.urlopen(url, timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        with error:
            raise Unavailable(f"{url} answers {error.code}") from error
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url}: {getattr(error, 'reason', error)}") from error


def _probe_grpc(address: str, timeout_s: float) -> None:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise Unavailable(f"{address}: {error.code().name}") from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{address}: {status}")
