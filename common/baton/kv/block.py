"""Blocks and the hashes that name their content.

A full block is named by a chained 128-bit hash over (parent hash, its token ids); the chain starts from a root that
holds everything else that decides what the KV bytes are: model fingerprint, block size, tenant salt. Two blocks with
equal hashes hold the same KV, so they may be shared. Positions are implied: a block's place in the chain fixes them.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NewType

from baton.request import BlockId

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES = 16


class BlockCopy(NamedTuple):
    """The whole content of one block, all layers, into another one."""

    source: BlockId
    destination: BlockId


def root_hash(fingerprint: str, block_size: int, cache_salt: str) -> BlockHash:
    seed = f"baton/1\x00{fingerprint}\x00{block_size}\x00{cache_salt}".encode()
    return BlockHash(hashlib.blake2b(seed, digest_size=HASH_BYTES).digest())


def block_hashes(root: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """One hash per full block of `token_ids`; a partial last block has none."""
    return list(extend_hashes(root, token_ids, block_size, 0))


def extend_hashes(
    parent: BlockHash, token_ids: Sequence[int], block_size: int, start_block: int
) -> Iterator[BlockHash]:
    """Hashes of the full blocks from `start_block` on; `parent` is the hash before it."""
    first = start_block * block_size
    packed = struct.pack(f"<{max(0, len(token_ids) - first)}I", *token_ids[first:])
    num_bytes = 4 * block_size
    for start in range(0, len(packed) - num_bytes + 1, num_bytes):
        block = packed[start : start + num_bytes]
        parent = BlockHash(hashlib.blake2b(parent + block, digest_size=HASH_BYTES).digest())
        yield parent


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
