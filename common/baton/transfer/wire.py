"""The wire format of the hand-over, version 2, byte by byte.

A piece is a box of one request's KV: tokens [token_start, token_end) x layers [layer_start, layer_end) x KV heads
[head_start, head_end), all counted from the beginning of the prompt and over the whole model, never in blocks of
either side. Sender and receiver may differ in block size, in how KV heads are split over ranks, and in dtype.

Header, little-endian, no padding:

    offset size field
     0     u16  version       2
     2     u8   dtype         of the payload: 0 float32, 1 bfloat16, 2 float16, 3 bytes without a meaning
     3     u8   reserved      0
     4     u32  epoch         the attempt at the request; a receiver refuses pieces of another one
     8     u32  sequence      numbers the pieces of one attempt and one shard from 0
    12     u32  num_pieces    0, except in a shard's last piece: how many it sends
    16     u16  shard         which of num_shards senders this is (ranks of one tensor-parallel prefill worker)
    18     u16  num_shards    at least 1
    20     u16  layer_start
    22     u16  layer_end
    24     u16  head_start
    26     u16  head_end      a layer with fewer KV heads has only those below its own number
    28     u32  token_start
    32     u32  token_end
    36     u32  run_tokens    see the payload; 0: one run
    40     u64  num_bytes     of the payload
    48     i64  first_token   the first generated token, in a last piece; else -1
    56     u16  length of request_id
    58     u16  length of digest
    60          request_id, UTF-8
                digest, see transfer.digest

Payload: run after run. A run is the tokens between two neighbouring multiples of run_tokens, as far as they are in the
piece. Each run holds, layer after layer, first K then V:

    run   := layer_start | layer_start + 1 | ... | layer_end - 1
    layer := K [tokens, heads, k_dim] | V [tokens, heads, v_dim]       row-major, elements little-endian

A sender sets run_tokens to its own block size: then every full block of its pool is a run as it lies in memory, and
nothing is copied before it is sent. A receiver whose pool has the same blocks, heads and dtype takes the bytes where
they belong; any other one converts (transfer.adapt).

The two bytes of the version stay where they are in every version. A release that brings version n writes n - 1 too,
byte for byte as before, for as long as workers of the release before it may be met: while a fleet is upgraded, every
pair speaks the highest version that both sides have.

A last piece may have no tokens at all. The receiver has everything when the boxes of all accepted pieces fill the box
that it waits for and the last piece of every shard is there.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import TransferError
from baton.request import RequestId

VERSION = 2
VERSIONS = (
    VERSION,
)  # that this release reads and writes; a pair uses the highest that both have (handshake)
MAX_REQUEST_ID_BYTES = 256
MAX_DIGEST_BYTES = 64
DTYPES = ("float32", "bfloat16", "float16", "uint8")  # by their number on the wire
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}

_FIXED = struct.Struct("<HBBIIIHHHHHHIIIQqHH")
FIXED_BYTES = _FIXED.size


class Box(NamedTuple):
    """Tokens x layers x KV heads."""

    token_start: int
    token_end: int
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int

    @property
    def volume(self) -> int:
        return (
            (self.token_end - self.token_start)
            * (self.layer_end - self.layer_start)
            * (self.head_end - self.head_start)
        )

    def overlaps(self, other: "Box") -> bool:
        return (
            self.token_start < other.token_end
            and other.token_start < self.token_end
            and self.layer_start < other.layer_end
            and other.layer_start < self.layer_end
            and self.head_start < other.head_end
            and other.head_start < self.head_end
        )

    def contains(self, other: "Box") -> bool:
        return (
            self.token_start <= other.token_start
            and other.token_end <= self.token_end
            and self.layer_start <= other.layer_start
            and other.layer_end <= self.layer_end
            and self.head_start <= other.head_start
            and other.head_end <= self.head_end
        )


@dataclass(frozen=True, slots=True)
class PieceHeader:
    request_id: RequestId
    epoch: int
    sequence: int
    layer_start: int
    layer_end: int
    token_start: int
    token_end: int
    num_bytes: int
    digest: bytes = b""  # see transfer.digest
    num_pieces: int = 0  # > 0 marks the last piece of its shard
    first_token: int = -1
    head_start: int = 0
    head_end: int = 1
    run_tokens: int = 0
    dtype: str = "uint8"
    shard: int = 0
    num_shards: int = 1
    version: int = VERSION

    @property
    def is_last(self) -> bool:
        return self.num_pieces > 0

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def box(self) -> Box:
        return Box(
            self.token_start, self.token_end, self.layer_start, self.layer_end, self.head_start, self.head_end
        )

    def runs(self) -> list[tuple[int, int]]:
        """The (start, end) of every run of the payload."""
        size = self.run_tokens or max(1, self.token_end)
        cuts = range((self.token_start // size + 1) * size, self.token_end, size)
        starts = [self.token_start, *cuts] if self.num_tokens else []
        return list(zip(starts, [*cuts, self.token_end], strict=False))

    def encode(self) -> bytes:
        """Raises TransferError for a version that this release does not write."""
        _check_version(self.version, "is to be sent in")
        request_id = self.request_id.encode()
        fixed = _FIXED.pack(
            self.version,
            DTYPES.index(self.dtype),
            0,
            self.epoch,
            self.sequence,
            self.num_pieces,
            self.shard,
            self.num_shards,
            self.layer_start,
            self.layer_end,
            self.head_start,
            self.head_end,
            self.token_start,
            self.token_end,
            self.run_tokens,
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
        (version, dtype, reserved, epoch, sequence, num_pieces, shard, num_shards, layer_start, layer_end,
         head_start, head_end, token_start, token_end, run_tokens, num_bytes, first_token,
         id_bytes, digest_bytes) = _FIXED.unpack_from(data)  # fmt: skip
        _check_version(version, "comes in")
        if dtype >= len(DTYPES) or reserved:
            raise TransferError(f"piece header with an unknown dtype ({dtype}/{reserved})")
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
            request_id, epoch, sequence, layer_start, layer_end, token_start, token_end, num_bytes,
            tail[id_bytes:], num_pieces, first_token, head_start, head_end, run_tokens, DTYPES[dtype],
            shard, num_shards, version,
        )  # fmt: skip


def _check_version(version: int, what: str) -> None:
    if version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise TransferError(f"a piece {what} wire version {version}, this worker speaks {known}")
