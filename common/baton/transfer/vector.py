"""Scatter and gather: a list of buffers walked as one run of bytes, never joined."""

from collections.abc import Sequence


class Vector:
    """What is left of a list of contiguous buffers: look at the next part, use it, `advance` past it."""

    __slots__ = ("_buffers", "_index", "_offset", "left")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        flat = (buffer.cast("B") for buffer in buffers)
        self._buffers = [buffer for buffer in flat if len(buffer)]
        self._index = 0  # of the first buffer that is not used up
        self._offset = 0  # bytes of it that are
        self.left = sum(map(len, self._buffers))

    def peek(self, max_bytes: int, max_buffers: int) -> list[memoryview]:
        """The next parts, in order, within both limits."""
        parts: list[memoryview] = []
        for buffer in self._buffers[self._index : self._index + max_buffers]:
            part = buffer if parts or not self._offset else buffer[self._offset :]
            parts.append(part[:max_bytes])
            max_bytes -= len(part)
            if max_bytes <= 0:
                break
        return parts

    def advance(self, num_bytes: int) -> None:
        assert 0 <= num_bytes <= self.left
        self.left -= num_bytes
        num_bytes += self._offset
        while self._index < len(self._buffers) and num_bytes >= len(self._buffers[self._index]):
            num_bytes -= len(self._buffers[self._index])
            self._index += 1
        self._offset = num_bytes

    def gather(self, target: memoryview) -> int:
        """Copy the next bytes into `target`, as many as there are or fit; returns how many."""
        end = 0
        for part in self.peek(len(target), len(self._buffers)):
            target[end : end + len(part)] = part
            end += len(part)
        self.advance(end)
        return end

    def scatter(self, source: memoryview) -> None:
        """Copy all of `source`, which is not longer than `left`, into the next buffers."""
        end = 0
        for part in self.peek(len(source), len(self._buffers)):
            part[:] = source[end : end + len(part)]
            end += len(part)
        self.advance(end)
