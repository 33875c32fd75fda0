"""What moves KV bytes from one worker's pool into another's: the contract of every transport.

The receiver stays in charge of its memory. A sender never names an address: it names a piece (`PieceHeader`: which
request, attempt, layers and blocks), and the receiver's `PieceSink` says where these bytes may go, or that it does
not want them.

    sender                                     receiver
    connection.push(header, payload) ------->  sink.open(header, transport) -> buffers, or TransferRefused: drained
                                               ... bytes are written into the buffers ...
                                     <-------  sink.close(header, error) -> returns: ack, or raises: refusal
    push returns, or raises TransferRefused / TransferError

Who may touch what, and until when:
- The payload buffers belong to the transport until `push` returns or raises. Cancelling `push` takes effect at once
  for a piece not started; one that is under way is finished or its connection closed before `push` raises.
- The sink's buffers belong to the transport from `open` until `close`, which is called exactly once for every `open`
  that returned buffers, whatever happens to the peer. After `close` no byte is written any more: only then may the
  receiver give the blocks to another request.
- A piece whose bytes are not all there PIECE_TIMEOUT_S after `open` is closed with an error, and its connection with
  it: a sender that hangs does not keep blocks.
- `open` and `close` are called on the event loop, never at the same time, and must not block.
- Pieces on one connection arrive in order; several are in flight at once (`MAX_IN_FLIGHT`).
- Acknowledged means: the bytes are in the sink's buffers and `close` accepted them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from baton.errors import TransferError
from baton.transfer.wire import PieceHeader

MAX_IN_FLIGHT = 4  # pieces per connection that wait for their acknowledgement
PIECE_TIMEOUT_S = 15.0  # longer than a healthy sender waits for the acknowledgement


class PieceSink(Protocol):
    def open(self, header: PieceHeader, transport: str) -> Sequence[memoryview]:
        """Writable buffers whose lengths add up to header.num_bytes. `transport` names what carries them. Raises
        TransferRefused: nothing is written."""
        ...

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        """All bytes are there, or (`error`) they never will be. Raises TransferRefused when they are not what the
        header promised; the sender is told."""
        ...


class Connection(ABC):
    """One sender's way to one receiver. Made by `Transport.connect`; shared by all pushes to that peer."""

    transport: str  # the name of what carries it

    @abstractmethod
    async def push(self, header: PieceHeader, payload: Sequence[memoryview], *, timeout_s: float) -> None:
        """Send one piece and wait until it is acknowledged. `payload` buffers are contiguous bytes, in order.

        Raises TransferRefused when the receiver does not want it, TransferError when the peer is gone, the
        connection broke or `timeout_s` passed; after a timeout the connection is closed, because nobody knows what a
        hung peer still does with it.
        """

    @property
    @abstractmethod
    def closed(self) -> bool:
        """True once broken or closed; make a new one."""

    @abstractmethod
    async def aclose(self) -> None: ...


class Transport(ABC):
    """One per worker process. Built by hand, started by `listen`, closed by its owner."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """What a peer must have one of, best first. Most transports are one; see `transfer.best_of`."""
        return tuple(self.name.split(","))

    @abstractmethod
    async def listen(self, sink: PieceSink) -> str:
        """Accept pieces for `sink`; returns the address that senders pass to `connect`."""

    @abstractmethod
    async def connect(self, address: str, *, timeout_s: float) -> Connection:
        """Raises TransferError when nobody answers in time."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close connections and the listener; every piece still open at the sink is closed with an error first."""
