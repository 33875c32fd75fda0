"""The digest of a piece: XXH3-128 over its payload and the header fields that say what the payload is.

Not cryptographic: it finds corruption, truncation and mix-ups, not an adversary with access to the wire.
"""

from collections.abc import Iterable

import xxhash

from baton.errors import TransferRefused
from baton.transfer.wire import PieceHeader

_MISMATCH = "does not match its digest"


def mismatch(header: PieceHeader) -> TransferRefused:
    """The receiver's answer to a piece whose bytes changed on the way."""
    return TransferRefused(f"piece {header.sequence} {_MISMATCH}")


def is_mismatch(refusal: TransferRefused) -> bool:
    """True for such an answer, which crosses the wire as its message: the same piece may be sent again."""
    return refusal.message.endswith(_MISMATCH)


def piece_digest(header: PieceHeader, payload: Iterable[memoryview]) -> bytes:
    """16 bytes; `header.digest` itself does not count."""
    place = (
        f"{header.request_id}/{header.epoch}/{header.sequence}/{header.layer_start}-{header.layer_end}/"
        f"{header.block_start}+{header.num_blocks}/{header.num_bytes}/{header.num_pieces}/{header.first_token}"
    )
    state = xxhash.xxh3_128(place.encode())
    for part in payload:
        state.update(part)
    return state.digest()
