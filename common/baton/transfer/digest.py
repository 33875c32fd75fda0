"""The digest of a piece: XXH3-128 over its payload and the header fields that say what the payload is.

Not cryptographic: it finds corruption, truncation and mix-ups, not an adversary with access to the wire.
"""

from collections.abc import Iterable

import xxhash

from baton.transfer.wire import PieceHeader


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
