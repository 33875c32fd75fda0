"""Host memory for the KV of sequences that had to give their blocks back: written when they leave, read when they come
again. Plain bytes: what comes back is what left."""

from collections.abc import Callable, Iterable
from typing import NewType

from baton.clock import Clock
from baton.errors import ConfigError
from baton.kv.layout import BlockStorage
from baton.request import BlockId

HostBlockId = NewType("HostBlockId", int)


class HostBlocks:
    """Owns the bytes and which of them are free. A copy is complete when the call returns, so no step may be writing
    to the blocks."""

    def __init__(
        self, storage: BlockStorage, num_bytes: int, clock: Clock, note: Callable[[int, float], None]
    ) -> None:
        """`note` hears of every copy: bytes, seconds. Raises ConfigError."""
        self.block_bytes = storage.layout.block_bytes
        self.num_blocks = num_bytes // self.block_bytes
        if not self.num_blocks:
            raise ConfigError(
                f"swap_space_bytes ({num_bytes}) has no room for one block of {self.block_bytes} bytes"
            )
        try:
            storage.region(BlockId(0), 0, 1)
        except RuntimeError as error:
            raise ConfigError(
                f"swap_space_bytes: {error}; with blocks there, leave it 0: they are computed again"
            ) from error
        self._storage = storage
        self._clock = clock
        self._note = note
        self._bytes = memoryview(bytearray(self.num_blocks * self.block_bytes))
        self._free = [HostBlockId(i) for i in reversed(range(self.num_blocks))]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def store(self, block_ids: Iterable[BlockId]) -> list[HostBlockId]:
        """The caller has checked num_free."""
        started_s = self._clock.now()
        host_ids = []
        for block_id in block_ids:
            host_ids.append(self._free.pop())
            self._host(host_ids[-1])[:] = self._device(block_id)
        self._note(len(host_ids) * self.block_bytes, self._clock.now() - started_s)
        return host_ids

    def load(self, host_ids: list[HostBlockId], block_ids: list[BlockId]) -> None:
        started_s = self._clock.now()
        for host_id, block_id in zip(host_ids, block_ids, strict=True):
            self._device(block_id)[:] = self._host(host_id)
        self._note(len(host_ids) * self.block_bytes, self._clock.now() - started_s)

    def free(self, host_ids: list[HostBlockId]) -> None:
        self._free.extend(host_ids)

    def check_integrity(self, owned: Iterable[HostBlockId]) -> None:
        """Raises AssertionError unless every block is free or owned, once."""
        assert sorted([*owned, *self._free]) == list(range(self.num_blocks))

    def _host(self, host_id: HostBlockId) -> memoryview:
        return self._bytes[host_id * self.block_bytes : (host_id + 1) * self.block_bytes]

    def _device(self, block_id: BlockId) -> memoryview:
        return self._storage.region(block_id, 0, self._storage.layout.num_layers)
