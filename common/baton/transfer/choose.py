"""Which transport a worker uses. The caller says which one it got (`transport.name`): none is chosen in silence."""

import importlib.util

from baton.clock import Clock
from baton.errors import ConfigError
from baton.transfer.base import Transport
from baton.transfer.shm import ShmTransport
from baton.transfer.tcp import TcpTransport
from baton.transfer.ucx import UcxTransport


def available() -> list[str]:
    """Names that `make_transport` can make here, best first. Looks only whether UCX is installed: it loads nothing."""
    has_ucx = any(importlib.util.find_spec(library) for library in ("ucxx", "ucp"))
    return ["ucx", "tcp"] if has_ucx else ["tcp"]


def make_transport(
    name: str, clock: Clock, host: str, *, port: int = 0, advertise_host: str | None = None
) -> Transport:
    """`auto` is UCX where it is installed and starts, else TCP. `port` and `advertise_host` are TCP's; UCX has neither.
    Raises ConfigError."""
    if name == "shm":
        return ShmTransport(clock)
    if name not in ("auto", "ucx", "tcp"):
        raise ConfigError(f"transfer.transport {name!r} is not known: choose auto, ucx or tcp")
    if name != "tcp":
        try:
            return UcxTransport(clock, host)
        except ConfigError:
            if name == "ucx":
                raise
    return TcpTransport(clock, host, port, advertise_host=advertise_host)
