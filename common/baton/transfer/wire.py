"""The wire format of the hand-over, version 1.

A piece is one contiguous run of blocks of one request and one group of layers:

    header   fixed part (little-endian, see `_FIXED`), then request_id, then the digest
    payload  for each block in [block_start, block_start + num_blocks): its bytes for layers [layer_start, layer_end),
             which lie together in the pool (see kv.layout)

`sequence` numbers the pieces of one attempt from 0; `num_pieces` is 0 except in the last one, where it is their count,
so the receiver knows when it has everything. The last piece also carries the first generated token, with which the
receiver goes on; it may have no blocks at all.
"""

import struct
from dataclasses import dataclass

from baton.errors import TransferError
from baton.request import RequestId

VERSION = 1
MAX_REQUEST_ID_BYTES = 256
MAX_DIGEST_BYTES = 64

# version, epoch, sequence, num_pieces, layer_start, layer_end, block_start, num_blocks, num_bytes, first_token,
# len(request_id), len(digest)
_FIXED = struct.Struct("<HIIIHHIIQqHH")
FIXED_BYTES = _FIXED.size


@dataclass(frozen=True, slots=True)
class PieceHeader:
    request_id: RequestId
    epoch: int
    sequence: int
    layer_start: int
    layer_end: int
    block_start: int  # index into the request's block table, not a block id
    num_blocks: int
    num_bytes: int
    digest: bytes = b""  # of the payload, see transfer.digest
    num_pieces: int = 0  # > 0 marks the last piece
    first_token: int = -1

    @property
    def is_last(self) -> bool:
        return self.num_pieces > 0

    def encode(self) -> bytes:
        request_id = self.request_id.encode()
        fixed = _FIXED.pack(
            VERSION,
            self.epoch,
            self.sequence,
            self.num_pieces,
            self.layer_start,
            self.layer_end,
            self.block_start,
            self.num_blocks,
            self.num_bytes,
            self.first_token,
            len(request_id),
            len(self.digest),
        )
        return fixed + request_id + self.digest

    @classmethod
    def decode(cls, data: bytes | memoryview) -> "PieceHeader":
        """Raises TransferError for a version we do not speak, impossible counts or a truncated header."""
        if len(data) < FIXED_BYTES:
            raise TransferError(f"piece header is {len(data)} bytes long, at least {FIXED_BYTES} are needed")
        (version, epoch, sequence, num_pieces, layer_start, layer_end, block_start, num_blocks, num_bytes,
         first_token, id_bytes, digest_bytes) = _FIXED.unpack_from(data)  # fmt: skip
        if version != VERSION:
            raise TransferError(f"peer speaks wire version {version}, this worker speaks {VERSION}")
        if id_bytes > MAX_REQUEST_ID_BYTES or digest_bytes > MAX_DIGEST_BYTES:
            raise TransferError("piece header with an absurd request id or digest length")
        if len(data) != FIXED_BYTES + id_bytes + digest_bytes:
            raise TransferError("piece header is truncated or has bytes to spare")
        tail = bytes(data[FIXED_BYTES:])
        try:
            request_id = RequestId(tail[:id_bytes].decode())
        except UnicodeDecodeError as error:
            raise TransferError("piece header with a request id that is not UTF-8") from error
        return cls(
            request_id, epoch, sequence, layer_start, layer_end, block_start, num_blocks, num_bytes,
            tail[id_bytes:], num_pieces, first_token,
        )  # fmt: skip
