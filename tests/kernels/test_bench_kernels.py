"""What `make bench-kernels` would run on a GPU, at tiny sizes in the interpreter: it runs, and peers agree."""

import datetime
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAMILIES = ("decode_cases", "prefill_cases", "token_cases", "block_cases", "sampler_cases", "step_cases")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_runs_and_equals_its_peers(load: Any, family: str) -> None:
    cases = load("kernel_cases")
    shapes = cases.Shapes(
        device="cpu",
        dtype=torch.float16,
        heads=4,
        kv_heads=2,
        dim=16,
        hidden=48,
        mlp=40,
        vocab=120,
        layers=2,
        block_size=16,
        scale=256,
    )
    for case in getattr(cases, family)(shapes):
        ours = case.run()
        assert case.num_bytes > 0 or case.num_flops > 0
        for name, peer in case.peers.items():
            torch.testing.assert_close(ours, peer(), rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_and_the_page(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, cases = load("bench_kernels"), load("kernel_cases")
    ticks = iter([2e-3, 4e-3])
    monkeypatch.setattr(bench, "seconds", lambda run, captured: next(ticks))
    ones = torch.ones(3)

    def broken() -> None:
        raise RuntimeError("no such | kernel\nhere")

    case = cases.Case(
        "copy", lambda: ones, num_bytes=2e9, num_flops=5e8, peers={"twice": lambda: 2 * ones, "bad": broken}
    )
    row = bench.measure(case, bench.Machine("card", 3e12, 2e12, 1e12))
    assert (row["us"], row["floor_us"], row["share"]) == pytest.approx((2000, 1000, 0.5))
    assert row["peers"]["twice"] == pytest.approx({"us": 4000, "diff": 1.0})
    assert "2000.0 us" in bench.line(row) and "50.0%" in bench.line(row)
    page = bench.page([row], bench.Machine("card", 3e12, 2e12, 1e12), datetime.date(2026, 1, 2))
    assert (
        "| copy | 2000.0 | 1000.0 | 50% | twice 4000.0 us, diff 1; bad RuntimeError: no such / kernel here |"
        in page
    )
    assert (
        "card: reads 3.00 TB/s, copies 2.00 TB/s, products 1 TFLOP/s." in page
        and "2026-01-02" in page
        and "torch" in page
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_that_it_was_not_run() -> None:
    script = BENCHMARKS / "bench_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "not run" in done.stdout and done.stdout.splitlines()[-1] == '{"bench": "kernels", "run": false}'
