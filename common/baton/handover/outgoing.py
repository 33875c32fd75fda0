"""Which KV is written but not on its way yet, and how it is cut into pieces. Decisions only: no I/O, no clock.

Blocks fill front to back and layers bottom to top, so what is ready at any time is a staircase:

    layers   |####|####|    |          # written and taken
             |####|####|++++|          + written, in the queue
             |####|####|++++|
    blocks    0    1    2    3 ...

A piece costs either end about a millisecond of CPU time whatever is in it, and that time is taken from the
computation beside it. So less than min_piece_bytes waits for what joins it, until the whole prompt is written.
"""

from collections import deque
from typing import NamedTuple

from baton.kv.block import num_blocks_for
from baton.kv.layout import KVLayout


class Span(NamedTuple):
    """Layers [layer_start, layer_end) of tokens [token_start, token_end) of one request."""

    token_start: int
    token_end: int
    layer_start: int
    layer_end: int


def layer_group_ends(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """Where each group ends; groups differ by one layer at most. Empty for a single group: then nothing leaves in the
    middle of a step."""
    num_groups = min(num_groups, num_layers)
    if num_groups < 2:
        return ()
    return tuple(num_layers * (group + 1) // num_groups for group in range(num_groups))


class Outgoing:
    """The tokens [first_token, num_tokens) of one request. Every (token, layer) is taken exactly once, in pieces that
    end between two blocks of the pool, or with the prompt."""

    def __init__(
        self, layout: KVLayout, first_token: int, num_tokens: int, piece_bytes: int, min_piece_bytes: int = 1
    ) -> None:
        self._layout = layout
        self._piece_bytes = piece_bytes
        self._min_piece_bytes = min_piece_bytes
        self._first_token = first_token
        self._num_tokens = num_tokens
        self._first = first_token // layout.block_size  # blocks below it are queued in all their layers
        num_blocks = num_blocks_for(num_tokens, layout.block_size)
        self._num_queued = [0] * num_blocks  # layers of each block that are queued or taken
        self._spans: deque[Span] = deque()

    def written(self, num_tokens: int, num_layers: int) -> None:
        """Layers [0, num_layers) of the first num_tokens are written. Blocks that are not full may be written again."""
        is_whole = num_tokens >= self._num_tokens
        num_blocks = len(self._num_queued) if is_whole else num_tokens // self._layout.block_size
        start = self._first
        while start < num_blocks:
            done = self._num_queued[start]
            end = start + 1
            while end < num_blocks and self._num_queued[end] == done:
                end += 1
            if done < num_layers:
                self._queue(self._span(start, end, done, num_layers))
                self._num_queued[start:end] = [num_layers] * (end - start)
            start = end
        if num_layers == self._layout.num_layers:
            self._first = max(self._first, num_blocks)

    def take(self) -> Span | None:
        """The next piece: as many blocks as fit in piece_bytes, at least one. None: nothing is ready."""
        if not self.has_ready:
            return None
        span = self._spans.popleft()
        size = self._layout.block_size
        block_bytes = self._layout.group_bytes(span.layer_start, span.layer_end)
        num_blocks = max(1, self._piece_bytes // max(1, block_bytes))
        end = min(span.token_end, (span.token_start // size + num_blocks) * size)
        if end < span.token_end:
            self._spans.appendleft(span._replace(token_start=end))
        return span._replace(token_end=end)

    @property
    def has_ready(self) -> bool:
        is_whole = self._first == len(self._num_queued)
        return bool(self._spans) and (is_whole or self._num_bytes_ready() >= self._min_piece_bytes)

    def _num_bytes_ready(self) -> int:
        per_block = (
            (s.token_end - s.token_start) * self._layout.group_bytes(s.layer_start, s.layer_end)
            for s in self._spans
        )
        return sum(per_block) // self._layout.block_size

    def _span(self, block_start: int, block_end: int, layer_start: int, layer_end: int) -> Span:
        size = self._layout.block_size
        token_start, token_end = max(block_start * size, self._first_token), block_end * size
        return Span(token_start, min(token_end, self._num_tokens), layer_start, layer_end)

    def _queue(self, span: Span) -> None:
        """What waits grows together, so that a sender who is behind sends few large pieces."""
        while self._spans and (joined := _join(self._spans[-1], span)):
            self._spans.pop()
            span = joined
        self._spans.append(span)


def _join(a: Span, b: Span) -> Span | None:
    if a[:2] == b[:2] and a.layer_end == b.layer_start:
        return a._replace(layer_end=b.layer_end)
    if a[2:] == b[2:] and a.token_end == b.token_start:
        return a._replace(token_end=b.token_end)
    return None
