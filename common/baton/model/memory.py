"""Memory of the device: how much of it there is, and what it looks like when there is no more."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.errors import OutOfMemory
from baton.kv.pool_size import Memory

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_V1 = _CGROUP / "memory"
_NO_LIMIT = 2**62  # version 1 writes the largest number of pages

# torch's allocator on the CPU has no exception of its own.
_CPU_MESSAGES = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
)


@contextlib.contextmanager
def out_of_memory_as_baton_error() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if any(message in str(error) for message in _CPU_MESSAGES):
            raise OutOfMemory(str(error)) from error
        raise


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The host does not wait for what the device does: a copy of pageable memory has left it when the call returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, which is there once the event has happened; what is in host memory is there."""
    if tensor.device.type == "cpu":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    # Whoever waits for it sleeps.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return copy, event


def measured(device: torch.device) -> Memory:
    """What this process could still take, as of now, and what there is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(free, total, is_gpu=True)
    groups = (_CGROUP, _CGROUP_V1)
    return Memory(host_free_bytes(_MEMINFO, groups), host_total_bytes(_MEMINFO, groups), is_gpu=False)


def host_free_bytes(meminfo: Path, cgroups: tuple[Path, ...]) -> int:
    """What the machine can give without swapping, or less where a container may have less."""
    limits = [limit - used for limit, used in map(_cgroup, cgroups) if limit is not None]
    return max(0, min([_meminfo(meminfo, "MemAvailable"), *limits]))


def host_total_bytes(meminfo: Path, cgroups: tuple[Path, ...]) -> int:
    limits = [limit for limit, _ in map(_cgroup, cgroups) if limit is not None]
    return min([_meminfo(meminfo, "MemTotal"), *limits])


def _meminfo(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _cgroup(directory: Path) -> tuple[int | None, int]:
    """(limit, bytes in use that cannot be dropped) of this container; no limit: None."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),  # version 2
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if not (directory / limit_name).is_file() or not (directory / used_name).is_file():
            continue
        text = (directory / limit_name).read_text().strip()
        if text == "max" or int(text) >= _NO_LIMIT:
            return None, 0
        return int(text), max(0, int((directory / used_name).read_text()) - _page_cache(directory))
    return None, 0


def _page_cache(directory: Path) -> int:
    """Read files count as used, but go when memory is needed."""
    lines = (directory / "memory.stat").read_text().splitlines()
    counts = dict(line.split() for line in lines if line)
    return int(counts.get("inactive_file", counts.get("total_inactive_file", 0)))
