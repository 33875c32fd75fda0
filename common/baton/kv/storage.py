"""The bytes of all blocks: one tensor, seen by the model as K and V per layer and by the transfer as runs of
bytes."""

from collections.abc import Sequence

import torch

from baton.kv.block import BlockCopy
from baton.kv.layout import KVLayout
from baton.request import BlockId
from baton_kernels.pages import huge_empty

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVStorage:
    """Implements BlockStorage. `data` is [num_blocks, block_bytes] uint8; see kv.layout for what is where in
    a row."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device | str = "cpu",
        *,
        fill_nan: bool = False,
    ) -> None:
        """`fill_nan`, for tests: whoever reads a position that was never written gets NaN."""
        self._layout = layout
        self.data = _zeros(num_blocks, layout.block_bytes, torch.device(device))
        if fill_nan:
            self.data.view(DTYPES[layout.dtype]).fill_(torch.nan)
        self._bytes = self.data.view(-1).numpy().data if self.data.device.type == "cpu" else None

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0]

    def populate(self) -> None:
        """Before anything is written: takes the memory of the whole pool from the system. Otherwise that is done a
        huge page at a time while somebody waits for a token, and memory that is not there after all is missed then."""
        if self.data.device.type == "cpu":
            self.data.zero_()

    def layer_views(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K [num_blocks, block_size, num_kv_heads, k_dim] and V [..., v_dim] of one layer; writing to them
        writes `data`."""
        layer, size = self._layout.layers[index], self._layout.block_size
        start, end = self._layout.layer_offsets[index : index + 2]
        middle = start + size * layer.num_kv_heads * layer.k_dim * self._layout.element_bytes
        dtype = DTYPES[self._layout.dtype]
        k = (
            self.data[:, start:middle]
            .view(dtype)
            .view(self.num_blocks, size, layer.num_kv_heads, layer.k_dim)
        )
        v = self.data[:, middle:end].view(dtype).view(self.num_blocks, size, layer.num_kv_heads, layer.v_dim)
        return k, v

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """No block is both a source and a destination."""
        pairs = torch.tensor(copies).T.contiguous()
        sources, destinations = pairs.to(self.data.device, non_blocking=True)
        if self.data.device.type == "cuda":
            from baton_kernels.copy_blocks import (
                copy_blocks,
            )  # Triton is there with CUDA builds of torch only

            copy_blocks(self.data, sources, destinations)
        else:
            self.data[destinations] = self.data[sources]

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        """Raises RuntimeError for blocks in device memory: they have to be staged in host memory first."""
        if self._bytes is None:
            raise RuntimeError(f"the blocks are in {self.data.device} memory, which has no host address")
        offsets, start = self._layout.layer_offsets, block_id * self._layout.block_bytes
        return self._bytes[start + offsets[layer_start] : start + offsets[layer_end]]


def _zeros(num_blocks: int, block_bytes: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu" or num_blocks * block_bytes == 0:
        return torch.zeros(num_blocks, block_bytes, dtype=torch.uint8, device=device)
    return huge_empty(num_blocks * block_bytes).view(num_blocks, block_bytes)
