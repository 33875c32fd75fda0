"""Ports for servers that bind them seconds later.

One that the system picks is of the range it gives to outgoing connections, too, and any of these may have taken it by
then. These are below that range.
"""

import contextlib
import random
import socket

_RANGE = range(20_000, 32_000)


def free_ports(number: int) -> list[int]:
    """Different ones, free on every interface."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
            with contextlib.suppress(OSError):
                held.enter_context(socket.socket()).bind(("", port))
                ports.append(port)
            if len(ports) == number:
                return ports
    raise RuntimeError(f"not {number} ports are free")


def free_port() -> int:
    return free_ports(1)[0]
