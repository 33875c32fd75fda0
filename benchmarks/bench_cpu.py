"""Where the time of a step goes on the CPU: each operation in its versions, then whole steps with and without them.

    python benchmarks/bench_cpu.py ops                       linear layers, attention, pages
    python benchmarks/bench_cpu.py steps --model DIR         decode and prefill steps of a model

Every number is the fastest of several runs in microseconds or milliseconds of this thread's CPU time, with one
thread, so that others on the machine disturb it little; with --threads N it is wall time. --no-native: plain torch;
--int8: rounded weights.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.model.packed import MkldnnLinear
from baton.request import BlockId, RequestId, SamplingParams
from baton_kernels import native, planned
from baton_kernels.native import Native, Steps
from baton_kernels.pages import huge_empty

DTYPE = torch.bfloat16
GREEDY = SamplingParams(temperature=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("ops", "steps"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-native", action="store_true")
    parser.add_argument("--int8", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    with torch.inference_mode():
        if args.what == "ops":
            bench_linear(native.load(), clock)
            bench_attention(native.load(), clock)
        else:
            engine = EngineConfig(
                num_blocks=1200,
                num_threads=args.threads,
                native_ops=not args.no_native,
                quantization="int8" if args.int8 else None,
            )
            bench_steps(load_runner(ModelConfig(args.model, dtype=args.dtype), engine).runner, clock)


def fastest(run: Callable[[], object], clock: Callable[[], float], rounds: int = 10) -> float:
    """Seconds."""
    run()
    times = []
    for _ in range(rounds):
        started = clock()
        run()
        times.append(clock() - started)
    return min(times)


def row(name: str, times: dict[str, float]) -> None:
    print(f"{name:28}" + "".join(f"  {label} {1e6 * t:8.0f}" for label, t in times.items()) + "  us")


def bench_linear(ops: Native, clock: Callable[[], float]) -> None:
    """As many matrices as no cache holds, one after another; `small`: not on huge pages."""
    for num_in, num_out in ((896, 4864), (4864, 896), (896, 1152)):
        weights = [
            torch.randn(num_out, num_in, dtype=DTYPE) for _ in range(80_000_000 // (2 * num_in * num_out))
        ]
        size = native.packed_bytes(weights[0])
        arena = huge_empty(size * len(weights)).view(len(weights), size)
        huge = [ops.pack(*pair) for pair in zip(weights, arena, strict=True)]
        small = [ops.pack(weight, torch.empty(size, dtype=torch.uint8)) for weight in weights]
        onednn = [MkldnnLinear(weight, None) for weight in weights]
        for num_rows in (1, 8, 32, 128, 512):
            x = torch.randn(num_rows, num_in, dtype=DTYPE)

            def each(linear: Callable[..., Tensor], packed: Sequence[object], x: Tensor = x) -> float:
                return fastest(lambda: [linear(x, one) for one in packed], clock, 5) / len(packed)

            row(
                f"[{num_rows} x {num_in}] x [{num_in} x {num_out}]",
                {
                    "F.linear": each(F.linear, weights),
                    "oneDNN": each(lambda x, one: one(x), onednn),
                    "native small": each(ops.linear, small),
                    "native": each(ops.linear, huge),
                },
            )


def bench_attention(ops: Native, clock: Callable[[], float]) -> None:
    """14 query heads over 2 KV heads of 64, the fourth of 24 layers in the pool."""
    for num_seqs, num_tokens, context in (
        (1, 1, 320),
        (8, 1, 320),
        (32, 1, 320),
        (8, 1, 2000),
        (1, 512, 2048),
    ):
        num_blocks = -(-context // 16)
        size = 24 * 2 * 16 * 2 * 64
        pool = huge_empty(num_seqs * num_blocks * size * 2).view(DTYPE).view(-1, 24, 2, 16, 2, 64)
        pool.normal_()
        k_cache, v_cache = pool[:, 3, 0], pool[:, 3, 1]
        tables = torch.randperm(len(pool)).view(num_seqs, num_blocks)
        query = torch.randn(num_seqs * num_tokens, 14, 64, dtype=DTYPE)
        starts = torch.arange(0, num_seqs * num_tokens + 1, num_tokens, dtype=torch.int32)
        lens = torch.full((num_seqs,), context, dtype=torch.int32)
        steps = Steps(tables.int(), starts, lens)
        if num_tokens == 1:
            plan = planned.plan_decode(tables, lens.long(), context, 16, DTYPE)
            plain = lambda: planned.paged_decode_attention(query, k_cache, v_cache, plan, 0.125)  # noqa: E731, B023
        else:
            chunk = planned.plan_prefill(tables[0], context - num_tokens, num_tokens, 16)
            plain = lambda: planned.paged_prefill_attention(query, k_cache, v_cache, chunk, 0.125)  # noqa: E731, B023
        ours = lambda: ops.paged_attention(query, k_cache, v_cache, steps, 0.125)  # noqa: E731, B023
        times = {"torch": fastest(plain, clock), "native": fastest(ours, clock)}
        row(f"{num_seqs} x {num_tokens} tokens of {context}", times)


def bench_steps(runner: TorchModelRunner, clock: Callable[[], float]) -> None:
    for num_seqs, context in ((1, 320), (8, 320), (32, 320), (8, 2000)):
        batch = Batch(tuple(_decoding(index, context) for index in range(num_seqs)))
        _step(runner, f"decode {num_seqs} at {context}", batch, clock)
    for num_tokens, start in ((256, 0), (512, 0), (512, 1536)):
        prompt = _decoding(0, start)._replace(
            token_ids=tuple(range(num_tokens)),
            block_table=tuple(map(BlockId, range(128))),
        )
        _step(runner, f"prefill {num_tokens} from {start}", Batch((prompt,)), clock)


def _decoding(index: int, context: int) -> BatchRow:
    num_blocks = context // 16 + 1
    table = tuple(map(BlockId, range(index * num_blocks, (index + 1) * num_blocks)))
    return BatchRow(RequestId(str(index)), context, (7 + index,), table, True, GREEDY)


def _step(runner: TorchModelRunner, name: str, batch: Batch, clock: Callable[[], float]) -> None:
    seconds = runner._thread.submit(fastest, lambda: runner._run(batch, None), clock).result()
    print(f"{name:28} {1e3 * seconds:8.1f} ms")


if __name__ == "__main__":
    main()
