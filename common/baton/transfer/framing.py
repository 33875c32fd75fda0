"""What goes around pieces on a byte stream: the greeting, and the receiver's answer to each piece.

hello    magic, oldest and newest wire version: both sides send one, before anything else. It turns away what cannot
         be a neighbour; which version a pair speaks is decided before, from the two workers' lists (transfer.handshake)
answer   status, length of the reason, reason (UTF-8): one per piece, in the order of the pieces; over shared memory
         also one, without a reason, for each slot of the ring that is free again
"""

import enum
import struct

from baton.errors import TransferError, TransferRefused
from baton.transfer.wire import FIXED_BYTES, MAX_DIGEST_BYTES, MAX_REQUEST_ID_BYTES, VERSIONS

MAX_HEADER_BYTES = FIXED_BYTES + MAX_REQUEST_ID_BYTES + MAX_DIGEST_BYTES
MAX_REASON_BYTES = 512
MAX_SKIPPED_BYTES = 2**30  # of a refused piece; more than that is no piece of ours

HELLO = struct.Struct("<4sHH")
ANSWER = struct.Struct("<BH")
START_BYTES = 4  # of a hello; enough to tell TLS apart, whose shortest message is shorter than a hello
_MAGIC = b"BATN"


class Status(enum.IntEnum):
    ACCEPTED = 0
    REFUSED = 1
    SLOT_FREE = 2


SLOT_FREE = ANSWER.pack(Status.SLOT_FREE, 0)


def hello() -> bytes:
    return HELLO.pack(_MAGIC, min(VERSIONS), max(VERSIONS))


def check_hello(data: bytes | bytearray | memoryview) -> None:
    """Raises TransferError when the other side is not Baton, or has no wire version in common with this one."""
    magic, oldest, newest = HELLO.unpack_from(data)
    if magic != _MAGIC:
        raise TransferError("the peer is not a Baton worker")
    if not any(oldest <= version <= newest for version in VERSIONS):
        raise TransferError(
            f"the peer speaks wire versions {oldest} to {newest}, this worker {min(VERSIONS)} to {max(VERSIONS)}"
        )


def check_start(data: bytes | bytearray) -> None:
    """Of the first bytes that a peer says: some say hello in TLS."""
    if data[:2] in (b"\x15\x03", b"\x16\x03"):
        raise TransferError("the peer speaks TLS: set tls.cert, tls.key and tls.ca here too")


def check_header_bytes(num_bytes: int) -> None:
    if not FIXED_BYTES <= num_bytes <= MAX_HEADER_BYTES:
        raise TransferError(f"a piece header of {num_bytes} bytes cannot be")


def encode_answer(refusal: str | None) -> bytes:
    if refusal is None:
        return ANSWER.pack(Status.ACCEPTED, 0)
    reason = refusal.encode()[:MAX_REASON_BYTES]
    return ANSWER.pack(Status.REFUSED, len(reason)) + reason


def decode_answer(fixed: bytes | bytearray | memoryview) -> tuple[Status, int]:
    """(status, length of the reason that follows). Raises TransferError."""
    status, reason_bytes = ANSWER.unpack_from(fixed)
    if status not in list(Status) or reason_bytes > MAX_REASON_BYTES:
        raise TransferError("an answer that makes no sense")
    return Status(status), reason_bytes


def refusal(reason: bytes | bytearray | memoryview) -> TransferRefused:
    return TransferRefused(bytes(reason).decode(errors="replace"))


def check_skipped_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_SKIPPED_BYTES:
        raise TransferError(f"a refused piece of {num_bytes} bytes is too long to be skipped")
