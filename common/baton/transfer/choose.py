"""Which transports a worker has. Which of them a pair uses shows when it connects (`transfer.best_of`); neither is
decided in silence."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from baton.certificates import Certificates
from baton.clock import Clock
from baton.errors import ConfigError
from baton.telemetry import event
from baton.transfer.base import PIECE_TIMEOUT_S, Transport
from baton.transfer.best_of import BestOf
from baton.transfer.shm import ShmTransport
from baton.transfer.tcp import TcpTransport
from baton.transfer.ucx import UcxTransport

log = logging.getLogger(__name__)

_RDMA_DEVICES = Path("/sys/class/infiniband")
_NO_RDMA_IN_UCX = (
    "this UCX was built without RDMA, or UCX_TLS, UCX_NET_DEVICES or transfer.host keep it from the devices; pip's is "
    "built without, RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true takes the system's"
)


def available() -> list[str]:
    """Names that `make_transport` can make here. Looks only whether UCX is installed: it loads nothing."""
    has_ucx = any(importlib.util.find_spec(library) for library in ("ucxx", "ucp"))
    return [*(["shm"] if _has_shm() else []), *(["ucx"] if has_ucx else []), "tcp"]


def make_transport(
    name: str,
    clock: Clock,
    host: str,
    *,
    port: int = 0,
    advertise_host: str | None = None,
    tls: Certificates | None = None,
    piece_timeout_s: float = PIECE_TIMEOUT_S,
) -> Transport:
    """`auto` is shared memory, UCX where it has a network that is faster than TCP, and TCP. `host` is not of interest
    to shared memory; `port`, `advertise_host` and `tls` are TCP's alone. With `tls` nothing leaves the host in the
    clear, so there is no UCX. Raises ConfigError."""
    makers: dict[str, Callable[[], list[Transport]]] = {
        "shm": lambda: [ShmTransport(clock, piece_timeout_s=piece_timeout_s)],
        "ucx": lambda: [UcxTransport(clock, host, piece_timeout_s=piece_timeout_s)],
        "tcp": lambda: [
            TcpTransport(
                clock, host, port, advertise_host=advertise_host, tls=tls, piece_timeout_s=piece_timeout_s
            )
        ],
    }
    if name == "auto":
        shm = makers["shm"]() if _has_shm() else []
        ucx = makers["ucx"] if tls is None else _cannot_encrypt
        return BestOf(clock, [*shm, *_fast_ucx(ucx), *makers["tcp"]()])
    if name not in makers:
        raise ConfigError(f"transfer.transport {name!r} is not known: choose auto, shm, ucx or tcp")
    if name == "shm" and not _has_shm():
        raise ConfigError("--transport shm needs Linux: choose auto or tcp")
    if name == "ucx" and tls is not None:
        raise ConfigError("--transport ucx cannot encrypt: choose auto or tcp, or transfer.encrypt: false")
    return BestOf(clock, makers[name]())


def _has_shm() -> bool:
    return sys.platform == "linux"


def _cannot_encrypt() -> list[Transport]:
    raise ConfigError("UCX cannot encrypt, and tls.* is set; transfer.encrypt: false lets KV go in the clear")


def _fast_ucx(make: Callable[[], list[Transport]]) -> list[Transport]:
    """None where UCX has nothing but TCP, because ours is faster. Who has an RDMA device expects it to be used."""
    if not _RDMA_DEVICES.is_dir() or not any(_RDMA_DEVICES.iterdir()):
        return []
    why = _NO_RDMA_IN_UCX
    try:
        found = make()
        if all(isinstance(ucx, UcxTransport) and ucx.has_fast_network for ucx in found):
            return found
    except ConfigError as error:
        why = error.message
    event(log, "this host has RDMA, but KV goes over TCP", level=logging.WARNING, why=why)
    return []
