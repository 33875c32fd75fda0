"""The two ends of a connection, as far as all transports share them.

    SenderEnd      waiting ---> under way ---> sent ---> answered        a transport says how a piece is put on the wire
                      |             |            |                       (`_transmit`), how the line is cut
                      +-------------+------------+---> failed            (`_disconnect`), and reports each answer
    ReceiverEnd    open ---> close(None) | abort(error)                  one piece at a time, closed exactly once

At most MAX_IN_FLIGHT pieces are under way or unanswered; the first of them whose answer comes is the oldest.
"""

import asyncio
import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from baton.clock import Clock
from baton.errors import InternalError, TransferError, TransferRefused
from baton.transfer.base import MAX_IN_FLIGHT, Connection, PieceSink
from baton.transfer.vector import Vector
from baton.transfer.wire import PieceHeader

log = logging.getLogger(__name__)


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class _Piece:
    header: bytes
    payload: Vector
    sent: asyncio.Future[None] = field(default_factory=_future)  # the payload is not read any more
    answer: asyncio.Future[TransferError | None] = field(default_factory=_future)  # None: acknowledged


class SenderEnd(Connection):
    """Owned by one event loop. `on_closed` is called when its last task ended."""

    def __init__(self, clock: Clock, peer: str, on_closed: Callable[["SenderEnd"], object]) -> None:
        self.peer = peer
        self._clock = clock
        self._on_closed = on_closed
        self._waiting: deque[_Piece] = deque()
        self._unanswered: deque[_Piece] = deque()
        self._changed = asyncio.Event()
        self._error: TransferError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<{type(self).__name__} {self.peer} {state}: {len(self._waiting)} waiting, {len(self._unanswered)} out>"

    # --- what a transport adds ---

    @abstractmethod
    async def _transmit(self, header: bytes, payload: Vector) -> None:
        """Put one piece on the wire; when it returns the payload is not read any more. Raises TransferError."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Stop at once: no payload is read after this returns."""

    def _start(self, *services: Callable[[], Awaitable[None]]) -> None:
        """Begin to send; `services` run as long as the connection does and end it when they raise."""
        self._tasks = [asyncio.create_task(self._guard(work)) for work in (self._send_pieces, *services)]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _answered(self, refusal: TransferRefused | None) -> None:
        """The receiver's answer to the oldest piece that has none."""
        if not self._unanswered:
            raise TransferError(f"{self.peer} answered a piece that was not sent")
        self._unanswered.popleft().answer.set_result(refusal)
        self._changed.set()

    # --- Connection ---

    async def push(self, header: PieceHeader, payload: Sequence[memoryview], *, timeout_s: float) -> None:
        piece = _Piece(header.encode(), Vector(payload))
        if piece.payload.left != header.num_bytes:
            raise InternalError(
                f"a payload of {piece.payload.left} bytes, its header says {header.num_bytes}"
            )
        if self._error is not None:
            raise TransferError(f"connection to {self.peer} is closed: {self._error.message}")
        deadline_s = self._clock.now() + timeout_s
        self._waiting.append(piece)
        self._changed.set()
        try:
            async with self._clock.timeout(timeout_s):
                await asyncio.wait((piece.sent, piece.answer))
        except TimeoutError:
            # Nobody knows what a hung peer still does with it, so the whole connection goes.
            self._fail(TransferError(f"{self.peer} did not acknowledge a piece within {timeout_s:g} s"))
        except asyncio.CancelledError:
            await self._withdraw(piece, deadline_s)
            raise
        error = piece.answer.result()
        if error is not None:
            raise type(error)(error.message)  # a fresh one: several pushes may fail of the same cause

    @property
    def closed(self) -> bool:
        return self._error is not None

    async def aclose(self) -> None:
        self._fail(TransferError("closed by this side"))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- inside ---

    async def _send_pieces(self) -> None:
        while True:
            while not self._waiting or len(self._unanswered) >= MAX_IN_FLIGHT:
                self._changed.clear()
                await self._changed.wait()
            piece = self._waiting.popleft()
            self._unanswered.append(piece)
            try:
                await self._transmit(piece.header, piece.payload)
            finally:
                piece.sent.set_result(None)

    async def _withdraw(self, piece: _Piece, deadline_s: float) -> None:
        """The push was cancelled: a piece under way is finished, or else the connection is cut."""
        if piece in self._waiting:
            self._waiting.remove(piece)
            return
        with suppress(TimeoutError, asyncio.CancelledError):
            async with self._clock.timeout(max(0.0, deadline_s - self._clock.now())):
                await asyncio.wait((piece.sent,))
        if not piece.sent.done():
            self._fail(TransferError("a push was cancelled in the middle of its piece"))

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except TransferError as error:
            self._fail(error)
        except Exception as error:
            log.exception("connection to %s", self.peer)
            self._fail(TransferError(f"connection to {self.peer} failed: {error!r}"))

    def _fail(self, error: TransferError) -> None:
        """Idempotent: the first error is the one that counts."""
        if self._error is not None:
            return
        self._error = error.with_traceback(None)  # which would keep alive whatever its frames know
        self._disconnect()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for piece in (*self._unanswered, *self._waiting):
            piece.answer.set_result(self._error)
        for piece in self._waiting:
            piece.sent.set_result(None)
        self._unanswered.clear()
        self._waiting.clear()

    def _ended(self, _: asyncio.Task[None]) -> None:
        if all(task.done() for task in self._tasks):
            self._on_closed(self)


class ReceiverEnd:
    """One sender's pieces at the sink: `open`, then `close` or `abort`; after either no buffer may be written."""

    def __init__(self, sink: PieceSink, transport: str) -> None:
        self._sink = sink
        self._transport = transport
        self._open: PieceHeader | None = None
        self._refusal: str | None = None

    def open(self, header: PieceHeader) -> Vector | None:
        """Where the payload goes; None when the sink does not want it and the bytes are to be skipped."""
        assert self._open is None
        self._refusal = None
        try:
            buffers = self._sink.open(header, self._transport)
        except TransferRefused as refusal:
            self._refusal = refusal.message
            return None
        self._open = header
        target = Vector(buffers)
        if target.left != header.num_bytes:
            raise InternalError(f"the sink gave {target.left} bytes of buffers for {header.num_bytes}")
        return target

    def close(self) -> str | None:
        """All bytes are there. Why the piece is refused, or None when it is accepted."""
        header, self._open = self._open, None
        if header is not None:
            try:
                self._sink.close(header, None)
            except TransferRefused as refusal:
                self._refusal = refusal.message
        return self._refusal

    def abort(self, error: TransferError) -> None:
        """The sender is gone, stalled, or talks nonsense. Does nothing when no piece is open."""
        header, self._open = self._open, None
        if header is not None:
            with suppress(TransferRefused):
                self._sink.close(header, error)
