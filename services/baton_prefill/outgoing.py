"""Which KV is written but not on its way yet, and how it is cut into pieces. Decisions only: no I/O, no clock.

Blocks fill front to back and layers bottom to top, so what is ready at any time is a staircase:

    layers   |####|####|    |          # written and taken
             |####|####|++++|          + written, in the queue
             |####|####|++++|
    blocks    0    1    2    3 ...
"""

from collections import deque
from typing import NamedTuple

from baton.kv.layout import KVLayout


class Span(NamedTuple):
    """Layers [layer_start, layer_end) of blocks [block_start, block_end) of one request."""

    block_start: int
    block_end: int
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
    """The blocks [first_block, num_blocks) of one request. Every (block, layer) is taken exactly once."""

    def __init__(self, layout: KVLayout, first_block: int, num_blocks: int, piece_bytes: int) -> None:
        self._layout = layout
        self._piece_bytes = piece_bytes
        self._first = first_block  # blocks below it are queued in all their layers
        self._num_queued = [0] * num_blocks  # layers of each block that are queued or taken
        self._spans: deque[Span] = deque()

    def written(self, num_blocks: int, num_layers: int) -> None:
        """Layers [0, num_layers) of the blocks below num_blocks will not be written again."""
        start = self._first
        while start < num_blocks:
            done = self._num_queued[start]
            end = start + 1
            while end < num_blocks and self._num_queued[end] == done:
                end += 1
            if done < num_layers:
                self._queue(Span(start, end, done, num_layers))
                self._num_queued[start:end] = [num_layers] * (end - start)
            start = end
        if num_layers == self._layout.num_layers:
            self._first = max(self._first, num_blocks)

    def take(self) -> Span | None:
        """The next piece: as many blocks as fit in piece_bytes, at least one. None: nothing is ready."""
        if not self._spans:
            return None
        span = self._spans.popleft()
        block_bytes = self._layout.group_bytes(span.layer_start, span.layer_end)
        end = min(span.block_end, span.block_start + max(1, self._piece_bytes // max(1, block_bytes)))
        if end < span.block_end:
            self._spans.appendleft(span._replace(block_start=end))
        return span._replace(block_end=end)

    @property
    def has_ready(self) -> bool:
        return bool(self._spans)

    def _queue(self, span: Span) -> None:
        """What waits grows together, so that a sender who is behind sends few large pieces."""
        while self._spans and (joined := _join(self._spans[-1], span)):
            self._spans.pop()
            span = joined
        self._spans.append(span)


def _join(a: Span, b: Span) -> Span | None:
    if a[:2] == b[:2] and a.layer_end == b.layer_start:
        return a._replace(layer_end=b.layer_end)
    if a[2:] == b[2:] and a.block_end == b.block_start:
        return a._replace(block_end=b.block_end)
    return None
