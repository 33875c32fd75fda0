"""What `make bench-kernels` would run on a GPU, at tiny sizes in the interpreter: it runs, and peers agree."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"
FAMILIES = ("decode_cases", "prefill_cases", "token_cases", "block_cases")


@pytest.fixture
def bench() -> Iterator[object]:
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_runs_and_equals_its_peers(bench, family: str) -> None:  # type: ignore[no-untyped-def]
    shapes = bench.Shapes(
        device="cpu",
        dtype=torch.float16,
        heads=4,
        kv_heads=2,
        dim=16,
        hidden=48,
        mlp=40,
        block_size=16,
        scale=256,
    )
    for case in getattr(bench, family)(shapes):
        ours = case.run()
        assert case.num_bytes > 0 or case.num_flops > 0
        for name, peer in case.peers.items():
            torch.testing.assert_close(ours, peer(), rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_that_it_was_not_run() -> None:
    done = subprocess.run([sys.executable, BENCH], capture_output=True, text=True, check=True)
    assert "not run" in done.stdout and done.stdout.splitlines()[-1] == '{"bench": "kernels", "run": false}'
