"""KV between two processes of one host, through a ring of slots that both have mapped.

    sender                                             receiver
    hello <------------------------------------------> hello: magic and version; both check the other's user
          <------------------------------------------- shape and descriptor of a new ring
    length of header, header ------------------------> sink.open
    bytes into the next free slot, then how many ----> from the slot into the sink's buffers
          <------------------------------------------- slot free
          <------------------------------------------- answer, in the order of the pieces

The receiver stays in charge of its memory: a sender can write to nothing but the ring, which the receiver has mapped
for reading only, and which nobody can shrink under the other's feet. Wake-ups are the messages on the socket.

Neither ring nor socket has a name in a file system: the ring is an anonymous file that lives for as long as one of
the two has it open, the socket's name is abstract. So nothing is left behind, however the two end. Only processes of
one user, on one kernel and in one network namespace reach each other: that they do is the proof that they share a
host.
"""

import asyncio
import fcntl
import mmap
import os
import secrets
import socket
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

from baton.clock import Clock
from baton.errors import TransferError
from baton.transfer import framing
from baton.transfer.base import PIECE_TIMEOUT_S
from baton.transfer.sockets import Line, SocketTransport, greet
from baton.transfer.stream import Stream
from baton.transfer.vector import Vector

NUM_SLOTS = 2
SLOT_BYTES = 2**21
MAX_RING_BYTES = 2**28
_SHAPE = struct.Struct("<HI")  # slots, bytes of a slot
_CHUNK = struct.Struct("<I")  # bytes in the next slot
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_SCHEME = "shm://"


class Slots:
    """A ring as one side has it mapped, used slot after slot."""

    def __init__(self, fd: int, num_slots: int, slot_bytes: int, protection: int) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # now, and not in the middle of the first pieces
        self._memory = mmap.mmap(fd, num_slots * slot_bytes, flags, protection)
        whole = memoryview(self._memory)
        self._slots = [whole[i * slot_bytes : (i + 1) * slot_bytes] for i in range(num_slots)]
        self._num_used = 0

    def __len__(self) -> int:
        return len(self._slots)

    def next(self) -> memoryview:
        self._num_used += 1
        return self._slots[(self._num_used - 1) % len(self._slots)]

    def close(self) -> None:
        self._slots.clear()
        with suppress(BufferError):  # the frame of an error still has a slot: then it goes with that
            self._memory.close()


def make_ring(num_slots: int = NUM_SLOTS, slot_bytes: int = SLOT_BYTES) -> int:
    """The descriptor of anonymous memory that nobody can resize, not even we."""
    fd = os.memfd_create("baton-kv", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)  # for who opens /proc/PID/fd
    os.ftruncate(fd, num_slots * slot_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def check_ring(fd: int, num_slots: int, slot_bytes: int) -> None:
    """Raises TransferError for memory that could vanish while we write to it."""
    num_bytes = num_slots * slot_bytes
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK or not 0 < num_bytes <= MAX_RING_BYTES:
        raise TransferError("the receiver's shared memory is not sealed, or of no sensible size")
    if os.fstat(fd).st_size < num_bytes:
        raise TransferError("the receiver's shared memory is smaller than it says")


class _RingLine(Line):
    def __init__(self, stream: Stream, slots: Slots) -> None:
        super().__init__(stream)
        self._slots = slots

    def close(self) -> None:
        super().close()
        self._slots.close()


class _SenderLine(_RingLine):
    def __init__(self, stream: Stream, slots: Slots) -> None:
        super().__init__(stream, slots)
        self._num_free = len(slots)
        self._freed = asyncio.Event()

    async def send_payload(self, payload: Vector) -> None:
        while payload.left:
            while not self._num_free:
                self._freed.clear()
                await self._freed.wait()
            self._num_free -= 1
            num_bytes = payload.gather(self._slots.next())
            await self.say(_CHUNK.pack(num_bytes))

    def slot_free(self) -> None:
        if self._num_free == len(self._slots):
            raise TransferError("the receiver freed a slot that was not in use")
        self._num_free += 1
        self._freed.set()


class _ReceiverLine(_RingLine):
    async def receive_payload(self, target: Vector) -> None:
        while target.left:
            target.scatter(await self._chunk(target.left))
            await self.say(framing.SLOT_FREE)

    async def skip_payload(self, num_bytes: int) -> None:
        while num_bytes:
            num_bytes -= len(await self._chunk(num_bytes))
            await self.say(framing.SLOT_FREE)

    async def _chunk(self, max_bytes: int) -> memoryview:
        await asyncio.sleep(0)  # a fast sender leaves nothing to wait for
        (num_bytes,) = _CHUNK.unpack(await self.stream.read(_CHUNK.size))
        slot = self._slots.next()
        if not 0 < num_bytes <= min(max_bytes, len(slot)):
            raise TransferError(f"a chunk of {num_bytes} bytes where {max_bytes} are left")
        return slot[:num_bytes]


class ShmTransport(SocketTransport):
    """Linux only: elsewhere there is no anonymous memory that can be sealed."""

    name = "shm"

    def __init__(self, clock: Clock, *, piece_timeout_s: float = PIECE_TIMEOUT_S) -> None:
        super().__init__(clock, piece_timeout_s=piece_timeout_s)

    async def _bind(self) -> tuple[socket.socket, str]:
        token = secrets.token_hex(16)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_socket_name(token))
        return listener, f"{_SCHEME}{boot_id()}/{token}"

    async def _dial(self, address: str) -> socket.socket:
        name = _socket_name(_parse(address))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, name)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _greet(self, sock: socket.socket, *, is_receiver: bool) -> Line:
        _check_user(sock)
        stream = _RingStream(sock)
        await greet(stream)
        if is_receiver:
            return _ReceiverLine(stream, stream.give_ring())
        return _SenderLine(stream, await stream.take_ring())

    def _name_of(self, peer: object) -> str:
        return "a process of this host"


class _RingStream(Stream):
    """A socket over which the descriptor of a ring goes, once."""

    def give_ring(self) -> Slots:
        fd = make_ring()
        try:
            socket.send_fds(self._sock, [_SHAPE.pack(NUM_SLOTS, SLOT_BYTES)], [fd])
            return Slots(fd, NUM_SLOTS, SLOT_BYTES, mmap.PROT_READ)
        except OSError as error:
            raise TransferError(f"cannot share memory with the sender: {error.strerror}") from None
        finally:
            os.close(fd)

    async def take_ring(self) -> Slots:
        shape, fds = bytearray(_SHAPE.size), list[int]()

        def step(target: Vector) -> None:
            data, received, _, _ = socket.recv_fds(self._sock, target.left, 1, socket.MSG_CMSG_CLOEXEC)
            fds.extend(received)
            if not data:
                raise TransferError("the peer closed the connection")
            target.scatter(memoryview(data))

        try:
            await self._run(
                step, Vector((memoryview(shape),)), self._loop.add_reader, self._loop.remove_reader
            )
            if len(fds) != 1:
                raise TransferError("the receiver shared no memory")
            num_slots, slot_bytes = _SHAPE.unpack(shape)
            check_ring(fds[0], num_slots, slot_bytes)
            return Slots(fds[0], num_slots, slot_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            for fd in fds:
                os.close(fd)


@cache
def boot_id() -> str:
    """Another one after every boot of every machine; the same in all containers of a machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _socket_name(token: str) -> str:
    return f"\0baton-kv-{token}"


def is_on_this_host(address: str) -> bool:
    """Of the receiver with this address; whether it can be reached is another question."""
    return address.startswith(f"{_SCHEME}{boot_id()}/")


def _parse(address: str) -> str:
    boot, _, token = address.removeprefix(_SCHEME).partition("/")
    if not address.startswith(_SCHEME) or not boot or not token:
        raise TransferError(f"{address!r} is not an address of the form {_SCHEME}boot-id/token")
    if not is_on_this_host(address):
        raise TransferError("the receiver is on another host")
    return token


def _check_user(sock: socket.socket) -> None:
    """Abstract names have no permissions: who may connect is checked here, by both sides."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise TransferError(f"the peer runs as user {uid}, this worker as {os.geteuid()}")
