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
    """One send or receive; made by `UcxWorker`. `request` is None once it is settled."""

    __slots__ = ("buffer", "done", "endpoint", "error", "request")

    def __init__(self, request: Request, buffer: memoryview, endpoint: Any | None) -> None:
        self.request: Request | None = request
        self.buffer = buffer
        self.endpoint = endpoint
        self.error: str | None = None
        self.done: asyncio.Future[None] | None = None  # there while somebody waits


class UcxWorker:
    """Owned by one event loop, from the first call of `start` on."""

    def __init__(self, library: Library) -> None:
        self.address = library.address
        self._library = library
        self._operations: dict[Operation, None] = {}  # not settled
        self._awaited: dict[Operation, None] = {}  # those somebody waits for
        self._sweep_above = MIN_SWEEP
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled: asyncio.Handle | None = None
        self._is_closed = False

    def start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._library.fd, self._wake)
            self._wake()

    def connect(self, address: bytes) -> Any:
        """An endpoint; whether somebody is there shows when it is used. Raises TransferError."""
        if self._is_closed:
            raise TransferError("this worker's transport is closed")
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
        if not self._settle(operation):
            assert self._loop is not None
            operation.done = self._loop.create_future()
            self._awaited[operation] = None
            try:
                await operation.done
            finally:
                self._awaited.pop(operation, None)
        if operation.error is not None:
            raise TransferError(operation.error)

    async def aclose(self, *, abandon: bool = False) -> None:
        """All endpoints are closed by now. Closes the worker, with it its sockets; one to `abandon` only stops."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._scheduled is not None:
            self._scheduled.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._library.fd)
            await self._end_operations()
        self._library.shut_down(abandon=abandon)

    # --- inside ---

    def _begin(self, call: Any, endpoint: Any | None, buffer: memoryview, tag: int) -> Operation:
        try:
            operation = Operation(call(endpoint, buffer, tag), buffer, endpoint)
        except Exception as error:
            raise TransferError(f"UCX failed: {error}") from None
        self._operations[operation] = None
        self._settle(operation)
        self._wake()
        return operation

    def _settle(self, operation: Operation) -> bool:
        """If it is completed: keep the outcome and let go of everything that belongs to UCX."""
        request, endpoint = operation.request, operation.endpoint
        if request is None:
            return True
        if not request.completed:
            return False
        reason = request.error()
        if reason is not None:
            gone = endpoint is not None and not self._library.alive(endpoint)
            operation.error = f"the peer is gone ({reason})" if gone else f"UCX failed: {reason}"
        operation.request = operation.endpoint = None
        del self._operations[operation]
        return True

    def _wake(self) -> None:
        if self._scheduled is None and not self._is_closed:
            assert self._loop is not None
            self._scheduled = self._loop.call_soon(self._drive)

    def _drive(self) -> None:
        self._scheduled = None
        is_busy = self._library.progress()
        for operation in list(self._awaited):
            if self._settle(operation):
                del self._awaited[operation]
                assert operation.done is not None
                if not operation.done.done():
                    operation.done.set_result(None)
        if not is_busy and len(self._operations) > self._sweep_above:
            self._sweep()
        if is_busy or not self._library.arm():
            self._wake()

    def _sweep(self) -> None:
        """Operations nobody waits for end unnoticed; looking at all of them now and then is enough."""
        for operation in list(self._operations):
            self._settle(operation)
        self._sweep_above = MIN_SWEEP + 2 * len(self._operations)

    async def _end_operations(self) -> None:
        # Receives without an endpoint wait for nobody in particular; forgetting a request cancels it.
        buffers = []
        for operation in [o for o in self._operations if o.endpoint is None]:
            del self._operations[operation]
            buffers.append(operation.buffer)
            operation.request = None
        for _ in range(CLOSING_TURNS):
            is_busy = self._library.progress()
            self._sweep()
            if not is_busy and not self._operations:
                break
            await asyncio.sleep(0)
        for operation in self._operations:
            # A peer hangs in the middle of a message. UCX may write to this memory as long as the process lives.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(operation.buffer))
