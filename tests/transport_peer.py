"""One end of a KV transport as a process of its own, for tests and benchmarks that kill it, stop it or time it.

python transport_peer.py receive TRANSPORT             prints its address; accepts every piece
python transport_peer.py send TRANSPORT ADDRESS BYTES  pushes pieces of that size until it is stopped
"""

import asyncio
import sys
from collections.abc import Sequence

from baton.clock import SystemClock
from baton.errors import TransferError
from baton.request import RequestId
from baton.transfer.choose import make_transport
from baton.transfer.wire import PieceHeader

HOST = "127.0.0.1"


class AcceptEverything:
    def open(self, header: PieceHeader, transport: str) -> Sequence[memoryview]:
        return [memoryview(bytearray(header.num_bytes))]

    def close(self, header: PieceHeader, error: TransferError | None) -> None:
        pass


async def receive(transport_name: str) -> None:
    transport = make_transport(transport_name, SystemClock(), HOST)
    address = await transport.listen(AcceptEverything())
    print(address, flush=True)  # noqa: T201 - the test reads it
    await asyncio.Event().wait()


async def send(transport_name: str, address: str, num_bytes: int) -> None:
    transport = make_transport(transport_name, SystemClock(), HOST)
    connection = await transport.connect(address, timeout_s=10)
    payload = memoryview(b"x" * num_bytes)
    for sequence in range(10**9):
        header = PieceHeader(RequestId("process"), 0, sequence, 0, 1, 0, 1, num_bytes)
        await connection.push(header, [payload], timeout_s=60)


if __name__ == "__main__":
    role, name, *rest = sys.argv[1:]
    asyncio.run(receive(name) if role == "receive" else send(name, rest[0], int(rest[1])))
