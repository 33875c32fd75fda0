"""Compiles every kernel in every configuration for sm_90a, without a GPU, and says what came out.

    make kernel-gate [ARGS="--write"]                   python tests/kernels/compile_gate.py [--json | --write]

The launchers run on meta tensors with the launch replaced by a recording of its arguments, so what is compiled is
what would be launched, with the specialisation (alignment, divisibility) that Triton would choose. ptxas and
cuobjdump are in Triton's wheel. `test_compile_gate.py` runs this in a process of its own and judges the rows.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from baton_kernels.cache_write import rope_write_kv
from baton_kernels.copy_blocks import copy_blocks
from baton_kernels.decode_attention import paged_decode_attention
from baton_kernels.naive import Planes
from baton_kernels.prefill_attention import paged_prefill_attention
from baton_kernels.rms_norm import add_rms_norm
from baton_kernels.sample_tokens import sample_tokens
from baton_kernels.silu_mul import silu_mul
from baton_kernels.wire_blocks import pack_blocks, unpack_blocks

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_gate.md"
NUM_BLOCKS = 4096
INSTRUCTIONS = {name: rf"\b{name}\b" for name in ("HGMMA", "HMMA", "LDG", "LDGSTS", "STG", "LDL", "STL")}
INSTRUCTIONS |= {f"{name}.128": rf"\b{name}\.(?:\w+\.)*128\b" for name in ("LDG", "LDGSTS", "STG")}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8"}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Launch:
    function: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Row:
    case: str
    kernel: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int  # stack and local memory
    shared_bytes: int
    counts: dict[str, int]  # of SASS instructions


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def caches(block_size: int, heads: int, dk: int, dv: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer of a pool of 32: a block's layers lie next to each other."""
    layer = block_size * heads * (dk + dv)
    pool = empty(NUM_BLOCKS, 32 * layer, dtype=dtype)
    middle = layer + block_size * heads * dk
    k = pool[:, layer:middle].view(-1, block_size, heads, dk)
    return k, pool[:, middle : 2 * layer].view(-1, block_size, heads, dv)


ATTENTION = (  # block_size, heads, kv_heads, dk, dv, dtype, options
    (16, 32, 8, 128, 128, torch.bfloat16, {}),
    (64, 32, 8, 128, 128, torch.bfloat16, {}),
    (128, 64, 8, 64, 64, torch.bfloat16, {"sinks": empty(64)}),
    (64, 16, 8, 256, 256, torch.bfloat16, {"window": 4096, "softcap": 50.0}),
    (64, 28, 4, 128, 128, torch.bfloat16, {"window": 8192, "chunked": True}),
    (64, 32, 32, 80, 80, torch.bfloat16, {}),
    (64, 16, 16, 192, 128, torch.bfloat16, {}),
    (16, 32, 8, 128, 128, torch.float32, {}),
)


SAMPLING = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)


def attention_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    tables, lens, starts = (empty(*shape, dtype=torch.int32) for shape in ((64, 128), (64,), (65,)))
    for block_size, heads, kv_heads, dk, dv, dtype, options in ATTENTION:
        k, v = caches(block_size, kv_heads, dk, dv, dtype)
        one, many = empty(64, heads, dk, dtype=dtype), empty(8192, heads, dk, dtype=dtype)
        decode = partial(paged_decode_attention, one, k, v, tables, lens, 0.1, **options)
        prefill = partial(paged_prefill_attention, many, k, v, tables, starts, lens, 0.1, **options)
        shape = f"H{heads}/{kv_heads}-D{dk}/{dv}-P{block_size}-{TYPES[dtype]}"
        name = "-".join([shape, *options])
        yield f"decode-{name}", partial(decode, num_splits=8)
        yield f"prefill-{name}", prefill
        if not options and block_size == 64 and dk == dv == 128:
            yield f"decode-{name}-one-split", partial(decode, num_splits=1)


def other_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    k, v = caches(64, 8, 128, 128, torch.bfloat16)
    query, new, x = empty(64, 32, 128), empty(64, 8, 128), empty(64, 4096)
    ids, cos = empty(64, dtype=torch.int64), empty(64, 64, dtype=torch.float32)
    planes = Planes(1 << 18, 8, 8, 256)  # of 4 layers
    pool, wire = (empty(n, size, dtype=torch.uint8) for n, size in ((NUM_BLOCKS, 8 << 20), (64, 1 << 20)))
    yield "rope-write-D128", partial(rope_write_kv, query, new, new, k, v, ids, cos, cos)
    yield "write-D128", partial(rope_write_kv, query, new, new, k, v, ids)
    yield "add-rms-norm-4096", partial(add_rms_norm, x, x, x[0], 1e-5)
    yield "rms-norm-4096", partial(add_rms_norm, x, None, x[0], 1e-5)
    yield "silu-mul-14336", partial(silu_mul, empty(64, 2 * 14336))
    yield "copy-blocks", partial(copy_blocks, pool, ids, ids)
    yield "pack-blocks", partial(pack_blocks, pool, ids, ids, 64, planes)
    yield "unpack-blocks", partial(unpack_blocks, pool, ids, ids, 64, planes, wire)
    for dtype in (torch.bfloat16, torch.float32):
        columns = [empty(64, dtype=kind) for kind in SAMPLING]
        yield (
            f"sample-V128256-{TYPES[dtype]}",
            partial(sample_tokens, empty(64, 128256, dtype=dtype), *columns),
        )


def record_launches(call: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def specialise(launch: Launch) -> ASTSource:
    """Signature, constants and attributes as Triton's launcher derives them from the arguments."""
    names = [parameter.name for parameter in launch.function.params]
    values = dict(zip(names, launch.args, strict=False)) | {
        key: value for key, value in launch.options.items() if key in names
    }
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.function.params):
        value, divisible = values[parameter.name], False
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            kind, constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            offset = value.storage_offset() * value.element_size()
            kind, divisible = f"*{TYPES[value.dtype]}", offset % 16 == 0
        elif isinstance(value, int):
            kind, divisible = "i32" if -(2**31) <= value < 2**31 else "i64", special and value % 16 == 0
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.function, signature, constants, attributes)


def disassemble(cubin: bytes) -> str:
    """What the kernel uses, then its SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)


def build(launch: Launch) -> CompiledKernel:
    options = {key: launch.options[key] for key in ("num_warps", "num_stages") if key in launch.options}
    return triton.compile(specialise(launch), target=TARGET, options=options)


def describe(case: str, compiled: CompiledKernel, sass: str) -> Row:
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", sass)}
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    return Row(
        case=case,
        kernel=compiled.metadata.name,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        counts={name: count for name, count in counts.items() if count},
    )


def build_all() -> list[Row]:
    """What is built is disassembled while the next is built; equal code once."""
    built: list[tuple[str, CompiledKernel]] = []
    sass: dict[bytes, Future[str]] = {}
    with ThreadPoolExecutor(1) as pool:
        for case, call in chain(attention_cases(), other_cases()):
            for launch in record_launches(call):
                compiled = build(launch)
                built.append((case, compiled))
                cubin = compiled.asm["cubin"]
                if cubin not in sass:
                    sass[cubin] = pool.submit(disassemble, cubin)
    return [describe(case, compiled, sass[compiled.asm["cubin"]].result()) for case, compiled in built]


def page(rows: list[Row]) -> str:
    head = ("case", "kernel", "warps", "stages", "registers", "spilled bytes", "shared KiB", "instructions")
    cells = [head, ("---",) * len(head)]
    for row in rows:
        counts = " ".join(f"{name}:{count}" for name, count in row.counts.items())
        numbers = (
            row.num_warps,
            row.num_stages,
            row.registers,
            row.spill_bytes,
            f"{row.shared_bytes / 1024:.1f}",
        )
        cells.append((row.case, row.kernel, *map(str, numbers), counts))
    lines = [
        "# What the compiler makes of the kernels",
        "",
        "```",
        'make kernel-gate ARGS="--write"',
        "```",
        "",
        f"For sm_90a by Triton {triton.__version__} and ptxas {knobs.nvidia.ptxas.version}, without a GPU. A case is",
        "`op-heads/KV heads-dims of K/V-positions per block-type-what else`. It may launch two kernels. Nothing here",
        "is a speed: that takes a GPU (`make bench-kernels`).",
        "",
        *(f"| {' | '.join(line)} |" for line in cells),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="rows for a program")
    parser.add_argument("--write", action="store_true", help=f"to {PAGE} instead of the screen")
    args, rows = parser.parse_args(), build_all()
    if args.json:
        json.dump([asdict(row) for row in rows], sys.stdout)
    elif args.write:
        PAGE.write_text(page(rows))
    else:
        print(page(rows), end="")


if __name__ == "__main__":
    main()
