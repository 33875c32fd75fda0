"""The link that benchmarks slow down: what it carries takes as long as its rate says, and arrives unchanged."""

import os
import time
from collections.abc import Sequence

from baton.clock import SystemClock
from baton.errors import TransferError
from baton.request import RequestId
from baton.transfer.tcp import TcpTransport
from baton.transfer.wire import PieceHeader
from baton_loadtest.paced import PacedTcpTransport


class _Sink:
    def __init__(self, num_bytes: int) -> None:
        self.data = bytearray(num_bytes)

    def open(self, header: PieceHeader, transport: str) -> Sequence[memoryview]:
        return [memoryview(self.data)]

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        assert error is None


async def test_a_piece_takes_as_long_as_the_rate_says() -> None:
    num_bytes, bytes_per_s = 4_000_000, 2e7
    sink, payload, clock = _Sink(num_bytes), os.urandom(num_bytes), SystemClock()
    receiving, sending = TcpTransport(clock), PacedTcpTransport(clock, bytes_per_s)
    connection = await sending.connect(await receiving.listen(sink), timeout_s=10)
    started_s = time.perf_counter()
    header = PieceHeader(RequestId("r"), 0, 0, 0, 1, 0, 1, num_bytes)
    await connection.push(header, [memoryview(payload)], timeout_s=30)
    assert (
        time.perf_counter() - started_s > 0.75 * num_bytes / bytes_per_s
    )  # the kernel lets the first ones through
    assert sink.data == payload
    await sending.aclose()
    await receiving.aclose()
