"""A connected socket that writes from, and reads into, lists of buffers, without a copy in between.

Non-blocking and driven by the running loop, at most MAX_BYTES_PER_CALL each time, so that whatever else runs on the
loop stays responsive. A few bytes are tried at once, without waiting for the loop to say that the socket is ready.
"""

import asyncio
import os
import socket
from collections.abc import Callable

from baton.errors import TransferError
from baton.transfer.vector import Vector

MAX_BYTES_PER_CALL = 2**20
MAX_BUFFERS_PER_CALL = min(1024, os.sysconf("SC_IOV_MAX"))
MAX_TRIED_BYTES = 2**12
SCRATCH_BYTES = 2**18  # what nobody wants is read into this


class Stream:
    """A connected socket. At most one read and one write at a time; `close` ends both with TransferError."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[asyncio.Future[TransferError | None], Callable[[int], object]] = {}
        self._scratch: bytearray | None = None
        self.closed = False

    async def shake_hands(self) -> None:
        """Nothing to agree upon."""

    async def read_into(self, target: Vector) -> None:
        await self._run(self._read, target, self._loop.add_reader, self._loop.remove_reader)

    async def read(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        await self.read_into(Vector((memoryview(data),)))
        return data

    async def skip(self, num_bytes: int) -> None:
        if self._scratch is None:
            self._scratch = bytearray(SCRATCH_BYTES)
        while num_bytes > 0:
            part = memoryview(self._scratch)[:num_bytes]
            await self.read_into(Vector((part,)))
            num_bytes -= len(part)

    async def write(self, source: Vector) -> None:
        await self._run(self._write, source, self._loop.add_writer, self._loop.remove_writer)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for done, stop_watching in self._waiting.items():
            stop_watching(self._sock.fileno())
            if not done.done():
                done.set_result(TransferError("connection closed"))
        self._sock.close()

    def _read(self, target: Vector) -> None:
        num_bytes = self._sock.recvmsg_into(target.peek(MAX_BYTES_PER_CALL, MAX_BUFFERS_PER_CALL))[0]
        if num_bytes == 0:
            raise TransferError("the peer closed the connection")
        target.advance(num_bytes)

    def _write(self, source: Vector) -> None:
        source.advance(self._sock.sendmsg(source.peek(MAX_BYTES_PER_CALL, MAX_BUFFERS_PER_CALL)))

    async def _run(
        self,
        step: Callable[[Vector], None],
        vector: Vector,
        watch: Callable[..., object],
        stop_watching: Callable[[int], object],
    ) -> None:
        """Repeat `step` whenever the socket is ready, until nothing of the vector is left."""
        if vector.left == 0:
            return
        if self.closed:
            raise TransferError("connection closed")
        if (vector.left <= MAX_TRIED_BYTES or self._has_read_ahead()) and _try(step, vector):
            return
        done: asyncio.Future[TransferError | None] = self._loop.create_future()
        self._waiting[done] = stop_watching
        watch(self._sock.fileno(), self._on_ready, step, vector, done)
        try:
            error = await done
        finally:
            del self._waiting[done]
            if not self.closed:
                stop_watching(self._sock.fileno())
        if error is not None:
            raise error

    def _has_read_ahead(self) -> bool:
        """True when there are bytes to read that the loop does not know of."""
        return False

    def _on_ready(
        self, step: Callable[[Vector], None], vector: Vector, done: asyncio.Future[TransferError | None]
    ) -> None:
        if done.done():
            return
        try:
            if _try(step, vector):
                done.set_result(None)
        except TransferError as error:
            done.set_result(error)


def _try(step: Callable[[Vector], None], vector: Vector) -> bool:
    """True when nothing of the vector is left. Raises TransferError."""
    try:
        step(vector)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError as error:
        raise TransferError(f"connection lost: {error.strerror}") from None
    return vector.left == 0
