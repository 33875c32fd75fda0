"""How many pieces of a hand-over came, and whether these are all: each shard's last piece says how many it has sent.

A piece has a name, its shard and its number there, and comes once. One that did not match its digest has not come.
"""

from collections import Counter
from collections.abc import Iterable

from baton.errors import TransferRefused
from baton.transfer.wire import PieceHeader

MAX_SHARDS = 64  # senders of one hand-over

Piece = tuple[int, int]  # shard and sequence number


def name_of(header: PieceHeader) -> Piece:
    return header.shard, header.sequence


class Tally:
    """Of pieces that matched their digest, but for `num_rejected`."""

    def __init__(self, *, is_prefix: bool) -> None:
        self.first_token = -1  # as a last piece says; a prefix has none
        self.done: set[Piece] = set()
        self.num_rejected: Counter[Piece] = Counter()
        self._is_prefix = is_prefix
        self._num_shards = 0  # known once a piece came
        self._num_pieces: dict[int, int] = {}  # of each shard whose last piece came

    def add(self, header: PieceHeader) -> None:
        self._num_shards = header.num_shards
        self.done.add(name_of(header))
        if header.is_last:
            self._num_pieces[header.shard] = header.num_pieces
            self.first_token = header.first_token

    @property
    def is_complete(self) -> bool:
        return len(self._num_pieces) == self._num_shards and len(self.done) == sum(self._num_pieces.values())

    def check(self, header: PieceHeader, under_way: Iterable[Piece]) -> None:
        """May it come, while those under way may yet? Raises TransferRefused."""
        seen = {*self.done, *under_way}
        if name_of(header) in seen:
            raise TransferRefused(f"piece {header.sequence} came twice")
        if not header.shard < header.num_shards <= MAX_SHARDS:
            raise TransferRefused(f"shard {header.shard} of {header.num_shards}")
        if self._num_shards not in (0, header.num_shards):
            raise TransferRefused(f"a piece of {header.num_shards} shards, others were of {self._num_shards}")
        num_pieces = self._num_pieces.get(header.shard)
        if num_pieces is not None and (header.is_last or header.sequence >= num_pieces):
            raise TransferRefused("a piece after the last one")
        self._check_first_token(header)
        highest = max((sequence for shard, sequence in seen if shard == header.shard), default=-1)
        if header.is_last and (header.sequence != header.num_pieces - 1 or highest >= header.num_pieces):
            raise TransferRefused(f"piece {header.sequence} says it is the last of {header.num_pieces}")

    def _check_first_token(self, header: PieceHeader) -> None:
        if header.is_last and not self._is_prefix and header.first_token < 0:
            raise TransferRefused("the last piece carries no first token")
        if self._is_prefix and header.first_token >= 0:
            raise TransferRefused("a prefix with a first token")
        if header.is_last and self.first_token not in (-1, header.first_token):
            raise TransferRefused("two shards say different first tokens")
