"""How many KV blocks a worker has. Torch-free; memory is measured by the caller, with the weights loaded.

num_blocks, else kv_cache_bytes, else a share of the memory: on a GPU gpu_memory_utilization of all there is, less
what is in use already; on a CPU cpu_memory_utilization of what is free, or DEFAULT_BYTES where nothing is asked,
because several workers may share the machine.
"""

from typing import NamedTuple

from baton.config import EngineConfig
from baton.errors import ConfigError
from baton.kv.block import num_blocks_for
from baton.kv.layout import KVLayout

DEFAULT_BYTES = 256 * 2**20


class Memory(NamedTuple):
    """Of the device, in bytes."""

    free: int
    total: int
    is_gpu: bool


def num_blocks(engine: EngineConfig, layout: KVLayout, memory: Memory, wanted_len: int | None = None) -> int:
    """`wanted_len`: the length of a sequence that somebody asked for. Raises ConfigError."""
    num = engine.num_blocks or max(0, _pool_bytes(engine, memory)) // layout.block_bytes
    num_bytes = num * layout.block_bytes
    if num < 2:
        raise ConfigError(
            f"the KV pool has room for {num} of at least 2 blocks: one of {layout.block_size} tokens takes "
            f"{layout.block_bytes} bytes; {_REMEDY}"
        )
    if num_bytes > memory.free:
        raise ConfigError(
            f"the KV pool would take {_size(num_bytes)} ({num} blocks of {layout.block_bytes} bytes), and "
            f"{_size(memory.free)} are free: lower num_blocks or kv_cache_bytes"
        )
    if wanted_len is not None and num * layout.block_size < wanted_len:
        needed = num_blocks_for(wanted_len, layout.block_size) * layout.block_bytes
        raise ConfigError(
            f"one sequence of max_model_len ({wanted_len}) tokens needs {_size(needed)} of KV and the pool has "
            f"{_size(num_bytes)}: lower max_model_len, or {_REMEDY}"
        )
    return num


_REMEDY = "raise num_blocks, kv_cache_bytes or the memory utilization"


def _pool_bytes(engine: EngineConfig, memory: Memory) -> int:
    if engine.kv_cache_bytes is not None:
        return engine.kv_cache_bytes
    if memory.is_gpu:
        return int(engine.gpu_memory_utilization * memory.total) - (memory.total - memory.free)
    if engine.cpu_memory_utilization is not None:
        return int(engine.cpu_memory_utilization * memory.free)
    return DEFAULT_BYTES


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 // 10 else f"{num_bytes / 2**20:.2f} MiB"
