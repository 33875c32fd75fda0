"""What bit-exact mode costs: output tokens a second with and without it, same model, same prompts, one thread.

    python benchmarks/bench_exact.py [--model DIR] [--concurrency 1 8 32] [--prompt 256] [--output 64] [--rounds 3]

Both engines live in this process and take turns, so that other load on the machine hits both. CPU seconds stand
beside wall time; the last line is one JSON object, concurrency -> figures of the median round.
"""

import argparse
import json
import random
import statistics
import time
from typing import NamedTuple

from baton.llm import LLM
from baton.request import SamplingParams


class Round(NamedTuple):
    wall_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    results = {}
    with _engine(args.model, bit_exact=False) as usual, _engine(args.model, bit_exact=True) as exact:
        for concurrency in args.concurrency:
            rounds: dict[str, list[Round]] = {"usual": [], "bit_exact": []}
            for seed in range(args.rounds):
                prompts = _prompts(usual.runner.vocab_size, concurrency, args.prompt, seed)
                rounds["usual"].append(_run(usual, prompts, args.output))
                rounds["bit_exact"].append(_run(exact, prompts, args.output))
            results[concurrency] = _shown(concurrency, rounds, args.output)
    print(json.dumps(results))


def _engine(model: str, *, bit_exact: bool) -> LLM:
    return LLM(model, dtype="float32", bit_exact=bit_exact, enable_prefix_caching=False)


def _prompts(vocab_size: int, number: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(number)]


def _run(llm: LLM, prompts: list[list[int]], num_tokens: int) -> Round:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    llm.generate(prompts, params)
    return Round(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _shown(concurrency: int, rounds: dict[str, list[Round]], num_tokens: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for mode, measured in rounds.items():
        figures[f"{mode}_tok_s"] = round(
            concurrency * num_tokens / statistics.median(each.wall_s for each in measured), 1
        )
        figures[f"{mode}_cpu_s"] = round(statistics.median(each.cpu_s for each in measured), 3)
    figures["times_cpu"] = round(figures["bit_exact_cpu_s"] / figures["usual_cpu_s"], 2)
    print(f"concurrency {concurrency}: " + "  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
    return figures


if __name__ == "__main__":
    main()
