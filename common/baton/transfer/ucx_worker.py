"""A UCX worker driven by the event loop: no thread, nothing spins, an idle one costs nothing.

The loop watches the worker's file descriptor and lets it progress a bounded amount per turn, so that gRPC on the same
loop stays responsive. Memory is the delicate part: UCX writes into the buffer of a receive for as long as it is not
completed, even after its endpoint was closed. So an operation and its buffer belong to the `UcxWorker` until UCX is
done with them, whoever still waits for it or does not.
"""

import asyncio
import ctypes
from typing import Any

from baton.errors import TransferError
from baton.transfer.ucx_library import Library, Request

CLOSING_TURNS = 200  # of the loop, for operations to end when the worker closes
MIN_SWEEP = 64  # operations before it is worth to look which of them nobody waits for any more


class Operation:
    """One send or receive; made by `UcxWorker`."""

    __slots__ = ("buffer", "done", "endpoint", "request")

    def __init__(self, request: Request, buffer: memoryview, endpoint: Any | None) -> None:
        self.request = request
        self.buffer = buffer
        self.endpoint = endpoint
        self.done: asyncio.Future[None] | None = None  # there while somebody waits


class UcxWorker:
    """Owned by one event loop, from the first call of `start` on."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._operations: dict[Operation, None] = {}  # not completed, as far as we know
        self._sweep_above = MIN_SWEEP
        self._awaited: dict[Operation, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_scheduled = False
        self.address = library.address

    def start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._library.fd, self._wake)
            self._wake()

    def connect(self, address: bytes) -> Any:
        try:
            return self._library.connect(address)
        except Exception as error:
            raise TransferError(f"UCX cannot make an endpoint: {error}") from None

    def close(self, endpoint: Any) -> None:
        self._library.close(endpoint)
        self._sweep_above = 0
        self._wake()

    def send(self, endpoint: Any, buffer: memoryview, tag: int) -> Operation:
        return self._begin(self._library.send, endpoint, buffer, tag)

    def receive(self, endpoint: Any | None, buffer: memoryview, tag: int) -> Operation:
        return self._begin(self._library.receive, endpoint, buffer, tag)

    async def wait(self, operation: Operation) -> None:
        """Raises TransferError. Who stops waiting loses nothing but the news: the operation goes on."""
        if not operation.request.completed:
            assert self._loop is not None
            operation.done = self._loop.create_future()
            self._awaited[operation] = None
            try:
                await operation.done
            finally:
                self._awaited.pop(operation, None)
        self._operations.pop(operation, None)
        reason = operation.request.error()
        if reason is not None:
            gone = operation.endpoint is not None and not self._library.alive(operation.endpoint)
            raise TransferError(f"the peer is gone ({reason})" if gone else f"UCX failed: {reason}")

    async def aclose(self) -> None:
        """All endpoints are closed by now; receives that wait for nobody in particular end with the worker."""
        if self._loop is None:
            return
        for _ in range(CLOSING_TURNS):
            if not self._sweep():
                break
            self._library.progress()
            await asyncio.sleep(0)
        self._loop.remove_reader(self._library.fd)
        for operation in self._operations:
            # A peer hangs in the middle of a message. UCX may write to this memory as long as the process lives.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(operation.buffer))

    # --- inside ---

    def _begin(self, call: Any, endpoint: Any | None, buffer: memoryview, tag: int) -> Operation:
        try:
            operation = Operation(call(endpoint, buffer, tag), buffer, endpoint)
        except Exception as error:
            raise TransferError(f"UCX failed: {error}") from None
        if not operation.request.completed:
            self._operations[operation] = None
        self._wake()
        return operation

    def _wake(self) -> None:
        if not self._is_scheduled:
            assert self._loop is not None
            self._is_scheduled = True
            self._loop.call_soon(self._drive)

    def _drive(self) -> None:
        self._is_scheduled = False
        is_busy = self._library.progress()
        for operation in [operation for operation in self._awaited if operation.request.completed]:
            del self._awaited[operation]
            assert operation.done is not None
            if not operation.done.done():
                operation.done.set_result(None)
        if not is_busy and len(self._operations) > self._sweep_above:
            self._sweep_above = MIN_SWEEP + 2 * self._sweep()
        if is_busy or not self._library.arm():
            self._wake()

    def _sweep(self) -> int:
        """Let go of what is completed; returns how many operations are not."""
        for operation in [operation for operation in self._operations if operation.request.completed]:
            del self._operations[operation]
        return len(self._operations)
