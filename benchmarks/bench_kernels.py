"""The Triton kernels on the GPU of this machine: time, share of the floor, and the same work done by others.

    make bench-kernels [ARGS="--only decode"]

Shapes are those of an 8B Llama (32 query heads, 8 KV heads of 128, hidden 4096, MLP 14336) in bfloat16, blocks of 64
positions. Nothing is downloaded or installed: it runs from a source checkout with torch, Triton and transformers. The
floor of a kernel is its bytes or floating-point operations over what this card was just seen to do: 4 GiB read, 2 GiB
copied, and a square matrix product of 8192. Everything is timed inside a CUDA graph, the median of its replays, caches
warm: cases smaller than the L2 cache may beat their floor. For the peers see kernel_cases.py; `diff` is the largest
difference between a peer's result and ours. A whole run writes benchmarks/results/kernels.md.

Without a GPU it says "not run" and succeeds; what it runs is checked at tiny sizes in Triton's interpreter
(tests/kernels/test_bench_kernels.py).
"""

import argparse
import datetime
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case, Run, Shapes, all_cases
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "results" / "kernels.md"
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python")
Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    name: str
    read_bytes_per_s: float
    copied_bytes_per_s: float  # read and written
    flops_per_s: float

    def __str__(self) -> str:
        memory = (
            f"reads {self.read_bytes_per_s / 1e12:.2f} TB/s, copies {self.copied_bytes_per_s / 1e12:.2f} TB/s"
        )
        return f"{self.name}: {memory}, products {self.flops_per_s / 1e12:.0f} TFLOP/s"

    def floor_s(self, case: Case) -> float:
        rate = self.read_bytes_per_s if case.only_reads else self.copied_bytes_per_s
        return max(case.num_bytes / rate, case.num_flops / self.flops_per_s)


def measure_machine() -> Machine:
    numbers = torch.randn(1 << 30, device="cuda")  # 4 GiB
    source, target = numbers.chunk(2)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    # A copy engine and a kernel move at different rates.
    copying = seconds(lambda: target.copy_(source)), seconds(lambda: torch.mul(source, 1.5, out=target))
    return Machine(
        torch.cuda.get_device_name(),
        numbers.nbytes / seconds(lambda: numbers.sum()),
        2 * source.nbytes / min(copying),
        2 * 8192**3 / seconds(lambda: matrix @ matrix),
    )


def seconds(run: Run, *, captured: bool = False) -> float:
    import triton.testing

    if captured:
        return float(triton.testing.do_bench(run, rep=500, return_mode="median")) / 1e3
    return float(triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median")) / 1e3


def measure(case: Case, machine: Machine) -> Row:
    """One row. A peer that fails says why, and does not end the run."""
    taken = seconds(case.run, captured=case.captured)
    floor = machine.floor_s(case)
    row: Row = {
        "case": case.name,
        "us": taken * 1e6,
        "floor_us": floor * 1e6,
        "share": floor / taken,
        "peers": {},
    }
    ours = case.run()
    for name, peer in case.peers.items():
        try:
            theirs = peer()
            found = {"us": seconds(peer, captured=case.captured) * 1e6}
        except Exception as error:
            row["peers"][name] = {"error": f"{type(error).__name__}: {error}"[:80]}
            continue
        if isinstance(theirs, Tensor) and isinstance(ours, Tensor) and theirs.shape == ours.shape:
            found["diff"] = float((theirs.float() - ours.float()).abs().max())
        row["peers"][name] = found
    return row


def line(row: Row) -> str:
    head = f"{row['case']:32} {row['us']:9.1f} us  floor {row['floor_us']:8.1f} us  {row['share']:6.1%}"
    return "  ".join([head, *(f"{name} {_peer(found)}" for name, found in row["peers"].items())])


def _peer(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"]).replace("|", "/").replace("\n", " ")
    diff = f", diff {found['diff']:.2g}" if "diff" in found else ""
    return f"{found['us']:.1f} us{diff}"


def page(rows: Sequence[Row], machine: Machine, today: datetime.date) -> str:
    """The results as a page, with the conditions."""
    table = [
        "| case | us | floor us | share of the floor | peers |",
        "|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['us']:.1f} | {row['floor_us']:.1f} | {row['share']:.0%} | "
            f"{'; '.join(f'{name} {_peer(found)}' for name, found in row['peers'].items())} |"
            for row in rows
        ),
    ]
    return "\n".join(
        [
            "# Kernels",
            "",
            "```",
            "make bench-kernels",
            "```",
            "",
            f"{machine}. {', '.join(versions())}. {today}.",
            "",
            "Floor: bytes over the rate of reads or copies, or operations over that of products, whichever is longer.",
            "Timed in CUDA graphs, median of replays, caches warm. `diff`: the largest difference between a peer's",
            "result and ours.",
            "",
            *table,
            "",
        ]
    )


def versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this; no page is written")
    wanted = parser.parse_args().only
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        print("bench-kernels: not run (it needs an NVIDIA GPU and Triton)")
        print(json.dumps({"bench": "kernels", "run": False}))
        return
    sys.path[:0] = [str(ROOT / "common"), str(ROOT / "kernels")]  # a checkout is enough
    machine = measure_machine()
    print(machine, *versions(), sep="\n")
    rows = []
    for case in all_cases(Shapes()):
        if wanted in case.name:
            rows.append(measure(case, machine))
            print(line(rows[-1]), flush=True)
            if not wanted:  # as far as it is, if it should be stopped
                PAGE.write_text(page(rows, machine, datetime.date.today()))
    print(json.dumps({"bench": "kernels", "run": True, "machine": machine.__dict__, "rows": rows}))


if __name__ == "__main__":
    main()
