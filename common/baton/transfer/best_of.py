"""Several transports as one: a receiver listens on all of them, a sender takes the best way that both have.

    address   shm://...,ucx://...,tcp://...     whatever the receiver listens on, best first
    connect   the first of ours that gets through; that a better one did not, although both sides have it, is a warning

Whether two workers share a host is not guessed from names: shared memory is tried, and it gets through or does not.
"""

import logging
from collections.abc import Sequence

from baton.clock import Clock
from baton.errors import TransferError
from baton.telemetry import event
from baton.transfer.base import Connection, PieceSink, Transport
from baton.transfer.shm import is_on_this_host

log = logging.getLogger(__name__)


class BestOf(Transport):
    """Owns its transports, best first. Its name is theirs, with commas."""

    def __init__(self, clock: Clock, transports: Sequence[Transport]) -> None:
        self._clock = clock
        self._transports = {transport.name: transport for transport in transports}
        self.name = ",".join(self._transports)

    async def listen(self, sink: PieceSink) -> str:
        return ",".join([await transport.listen(sink) for transport in self._transports.values()])

    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        ways = self._ways(address)
        failed: dict[str, str] = {}
        deadline_s = self._clock.now() + timeout_s
        for num_tried, (transport, each) in enumerate(ways):
            share_s = (deadline_s - self._clock.now()) / (len(ways) - num_tried)
            try:
                connection = await transport.connect(each, timeout_s=max(0.0, share_s))
            except TransferError as error:
                failed[transport.name] = error.message
                continue
            self._tell(connection, each, failed)
            return connection
        raise TransferError("; ".join(f"{name}: {why}" for name, why in failed.items()))

    def _ways(self, address: str) -> list[tuple[Transport, str]]:
        """What both have, in our order. Shared memory of another host is no way, and nobody expected one."""
        offered = {each.partition("://")[0]: each for each in address.split(",")}
        if not is_on_this_host(offered.get("shm", "")):
            offered.pop("shm", None)
        ways = [(each, offered[name]) for name, each in self._transports.items() if name in offered]
        if not ways:
            theirs, ours = ", ".join(offered), ", ".join(self.names)
            raise TransferError(f"no transport in common: the receiver has {theirs}, this worker {ours}")
        return ways

    def _tell(self, connection: Connection, address: str, failed: dict[str, str]) -> None:
        level = logging.WARNING if failed else logging.INFO
        instead = {f"{name}_failed": why for name, why in failed.items()}
        event(log, "KV goes over", level=level, transport=connection.transport, to=address, **instead)

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()
