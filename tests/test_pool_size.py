"""The pool is as large as asked for, or as memory allows; what cannot be is refused at the start, with what to do."""

import re
import sys
from pathlib import Path

import pytest
import torch
from reference import make_model

from baton.config import EngineConfig, ModelConfig
from baton.engine.model_runner import load_runner
from baton.errors import ConfigError, OutOfMemory
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.pool_size import DEFAULT_BYTES, Memory, num_blocks
from baton.kv.storage import KVStorage
from baton.model import memory

GIB = 2**30
LAYOUT = KVLayout(16, (LayerLayout(2, 64, 64),) * 24, "bfloat16", 2)  # 192 KiB a block
CPU, GPU = Memory(8 * GIB, 16 * GIB, is_gpu=False), Memory(70 * GIB, 80 * GIB, is_gpu=True)


@pytest.mark.parametrize(
    ("engine", "device", "num_bytes"),
    [
        (EngineConfig(), CPU, DEFAULT_BYTES),
        (EngineConfig(cpu_memory_utilization=0.5), CPU, 4 * GIB),
        (EngineConfig(gpu_memory_utilization=0.5), CPU, DEFAULT_BYTES),
        (EngineConfig(), GPU, 0.9 * 80 * GIB - 10 * GIB),
        (EngineConfig(gpu_memory_utilization=0.5, cpu_memory_utilization=0.1), GPU, 30 * GIB),
        (EngineConfig(kv_cache_bytes=GIB, gpu_memory_utilization=0.5, cpu_memory_utilization=0.5), GPU, GIB),
        (EngineConfig(kv_cache_bytes=GIB, cpu_memory_utilization=0.5), CPU, GIB),
    ],
)
def test_what_decides(engine: EngineConfig, device: Memory, num_bytes: float) -> None:
    assert num_blocks(engine, LAYOUT, device) == int(num_bytes) // LAYOUT.block_bytes


def test_a_number_of_blocks_wins() -> None:
    assert num_blocks(EngineConfig(num_blocks=7, kv_cache_bytes=GIB), LAYOUT, CPU) == 7


@pytest.mark.parametrize(
    ("engine", "device", "wanted_len", "message"),
    [
        (EngineConfig(kv_cache_bytes=1000), CPU, None, "room for 0 of at least 2 blocks.*raise num_blocks"),
        (EngineConfig(gpu_memory_utilization=0.1), GPU, None, "room for 0 of at least 2"),
        (EngineConfig(kv_cache_bytes=9 * GIB), CPU, None, r"would take 9.00 GiB .* 8.00 GiB are free: lower"),
        (EngineConfig(num_blocks=10), CPU, 161, r"max_model_len \(161\) tokens needs .* lower max_model_len"),
    ],
)
def test_what_cannot_be_is_refused(
    engine: EngineConfig, device: Memory, wanted_len: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        num_blocks(engine, LAYOUT, device, wanted_len)


def test_one_sequence_of_the_wanted_length_is_enough() -> None:
    assert num_blocks(EngineConfig(num_blocks=10), LAYOUT, CPU, 160) == 10


# --- measured memory -------------------------------------------------------------------------------------


def _meminfo(directory: Path) -> Path:
    path = directory / "meminfo"
    path.write_text("MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\n")
    return path


def _cgroup(directory: Path, names: tuple[str, str], limit: str, used: int, inactive: str) -> Path:
    directory = directory / "cgroup"
    directory.mkdir()
    (directory / names[0]).write_text(limit + "\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(inactive)
    return directory


def test_the_machine_without_a_container(tmp_path: Path) -> None:
    meminfo = _meminfo(tmp_path)
    assert memory.host_free_bytes(meminfo, (tmp_path / "none",)) == 9000 * 1024
    assert memory.host_total_bytes(meminfo, (tmp_path / "none",)) == 16000 * 1024


@pytest.mark.parametrize(
    ("names", "inactive"),
    [
        (("memory.max", "memory.current"), "anon 5\ninactive_file 1024\n"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "cache 7\ntotal_inactive_file 1024\n"),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, names: tuple[str, str], inactive: str) -> None:
    meminfo = _meminfo(tmp_path)
    group = _cgroup(tmp_path, names, str(4000 * 1024), 1001 * 1024, inactive)
    assert memory.host_free_bytes(meminfo, (group,)) == 3000 * 1024  # files that were read can go
    assert memory.host_total_bytes(meminfo, (group,)) == 4000 * 1024


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_no_limit_is_no_limit(tmp_path: Path, limit: str) -> None:
    names = (
        ("memory.max", "memory.current")
        if limit == "max"
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    group = _cgroup(tmp_path, names, limit, 123, "")
    assert memory.host_free_bytes(_meminfo(tmp_path), (group,)) == 9000 * 1024


def test_this_machine() -> None:
    here = memory.measured(torch.device("cpu"))
    assert 0 < here.free <= here.total and not here.is_gpu


async def test_a_worker_takes_the_share_it_is_given(tmp_path: Path) -> None:
    directory = make_model("gqa", tmp_path)
    free = memory.measured(torch.device("cpu")).free
    runner = load_runner(ModelConfig(str(directory)), EngineConfig(cpu_memory_utilization=0.001)).runner
    taken = runner.storage.num_blocks * runner.storage.layout.block_bytes
    assert 0.0005 * free < taken < 0.002 * free
    await runner.aclose()


# --- what running out looks like -------------------------------------------------------------------------


def test_torchs_own_words_for_it_are_understood() -> None:
    with pytest.raises(OutOfMemory), memory.out_of_memory_as_baton_error():
        torch.empty(2**58, dtype=torch.uint8)
    with pytest.raises(OutOfMemory), memory.out_of_memory_as_baton_error():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory), memory.out_of_memory_as_baton_error():
        raise MemoryError
    with pytest.raises(RuntimeError, match="other"), memory.out_of_memory_as_baton_error():
        raise RuntimeError("other")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_takes_the_memory_of_its_pool_before_it_serves() -> None:
    storage = KVStorage(KVLayout(16, (LayerLayout(2, 64, 64),), "float32", 4), 4000)
    address, num_bytes = storage.data.data_ptr(), storage.data.numel()
    before = _resident_bytes(address)  # of neighbours that the system made one mapping with ours
    storage.populate()
    assert _resident_bytes(address) - before >= 0.9 * num_bytes


def _resident_bytes(address: int) -> int:
    """Of the mapping that it is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no such mapping")
