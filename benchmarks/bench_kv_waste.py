"""How much of the KV pool is taken and holds nothing, and how much of the prompts is found in it.

    python benchmarks/bench_kv_waste.py [--block-size 16] [--requests 3000] [--prompt LENGTHS] [--output LENGTHS] ...

The real engine (scheduler, block pool, prefix cache) runs a mixed load on a virtual clock; the model is only a duration
per step, because slots are counted here and nothing else. The figures are the same on every machine, busy or not.

    waste      slots of blocks in use that no token of a sequence is for, over all slots of blocks in use; those of a
               prompt count as taken from its admission on, as in vLLM
    hit rate   prompt tokens found in the prefix cache, over all prompt tokens

Half of the prompts begin with one of a few system prompts. Arrivals are Poisson at a rate that keeps the pool under
pressure: sequences are preempted now and then. Prints one line per block size; the last line is one JSON object.
"""

import argparse
import asyncio
import json
import random
from dataclasses import dataclass, replace

from baton.clock import VirtualClock
from baton.config import EngineConfig
from baton.engine.batch import Batch
from baton.engine.engine import Engine
from baton.engine.sequence import Sequence
from baton.kv.layout import KVLayout, LayerLayout
from baton.request import BlockId, Request, RequestId, SamplingParams
from baton_loadtest.lengths import Lengths, parse_lengths

VOCAB_SIZE = 32_000
STEP_S, TOKEN_S = 0.020, 0.0002


class NoStorage:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.layout = KVLayout(block_size, (LayerLayout(1, 1, 0),), "uint8", 1)
        self.num_blocks = num_blocks

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        raise RuntimeError("slots are counted here, not written")


class DurationRunner:
    """A model that takes its time and answers with token 1."""

    def __init__(self, num_blocks: int, block_size: int, clock: VirtualClock) -> None:
        self.storage = NoStorage(num_blocks, block_size)
        self.vocab_size = VOCAB_SIZE
        self.max_model_len = 2**31
        self.grammars = None
        self._clock = clock
        self._device = asyncio.Lock()

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        async with self._device:
            seconds = STEP_S + TOKEN_S * batch.num_tokens
            await self._clock.sleep(0.75 * seconds)
            batch.prepare_next()
            await self._clock.sleep(0.25 * seconds)
            return (1,) * sum(row.sample for row in batch.rows)

    async def aclose(self) -> None:
        pass


@dataclass
class Slots:
    """Time-weighted. `highest` counts only while at least eight sequences run: a short prompt alone wastes most of
    its block, and of nothing else."""

    used: float = 0.0
    empty: float = 0.0
    highest: float = 0.0
    seconds: float = 0.0
    used_share: float = 0.0

    def note(self, engine: Engine, block_size: int, seconds: float) -> None:
        used = engine.num_used_blocks * block_size
        owners = list(engine.owners())
        # Shared blocks are full, so what is empty is at the end of a sequence's own.
        empty = sum(len(s.block_table) * block_size - len(s.token_ids) - s.num_tokens_pending for s in owners)
        self.used += used * seconds
        self.empty += empty * seconds
        self.seconds += seconds
        self.used_share += seconds * engine.num_used_blocks / engine.num_blocks
        if used and len(owners) >= 8:
            self.highest = max(self.highest, empty / used)


def requests(args: argparse.Namespace) -> list[tuple[float, Request]]:
    rng = random.Random(args.seed)
    prompts: Lengths = parse_lengths(args.prompt)
    outputs: Lengths = parse_lengths(args.output)
    systems = [_tokens(rng, rng.randint(100, 600)) for _ in range(args.system_prompts)]
    arrival_s, made = 0.0, []
    for number in range(args.requests):
        arrival_s += rng.expovariate(args.rate)
        system = rng.choice(systems) if rng.random() < 0.5 else ()
        prompt = (*system, *_tokens(rng, prompts.sample(rng)))
        sampling = SamplingParams(max_tokens=outputs.sample(rng))
        made.append((arrival_s, Request(RequestId(str(number)), prompt, sampling)))
    return made


def _tokens(rng: random.Random, number: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(VOCAB_SIZE), k=number))


async def run(args: argparse.Namespace, block_size: int, clock: VirtualClock) -> dict[str, float]:
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs, max_num_batched_tokens=512, max_num_waiting=args.requests
    )
    runner = DurationRunner(args.tokens // block_size, block_size, clock)
    engine = Engine(replace(config, block_size=block_size), runner, clock, "waste")
    slots, load = Slots(), requests(args)
    sequences: list[Sequence] = []

    async def arrive() -> None:
        for arrival_s, request in load:
            await clock.sleep(arrival_s - clock.now())
            engine.add(request)
            sequences.append(engine.sequence(request.request_id))  # type: ignore[arg-type]

    arriving = asyncio.create_task(arrive())
    while not arriving.done() or engine.num_sequences:
        await asyncio.wait(
            (arriving, work := asyncio.create_task(engine.work.wait())), return_when=asyncio.FIRST_COMPLETED
        )
        work.cancel()
        output = await engine.step()
        slots.note(engine, block_size, output.seconds)
    await arriving
    engine.check_integrity()
    num_prompt = sum(request.num_prompt_tokens for _, request in load)
    num_output = sum(request.sampling.max_tokens for _, request in load)
    return {
        "block_size": block_size,
        "waste_mean": slots.empty / slots.used,
        "waste_max": slots.highest,
        "pool_used_mean": slots.used_share / slots.seconds,
        "hit_rate": sum(sequence.num_cached_tokens for sequence in sequences) / num_prompt,
        "preemptions": engine.pressure.num_preemptions,
        "prompt_tokens_mean": num_prompt / len(load),
        "output_tokens_mean": num_output / len(load),
        "virtual_s": clock.now(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-size", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals a second")
    parser.add_argument(
        "--prompt", default="lognormal:mean=600,sigma=1,max=8000", help="beside a system prompt"
    )
    parser.add_argument("--output", default="lognormal:mean=200,sigma=0.8,max=2000")
    parser.add_argument("--system-prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40_000, help="size of the pool")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = []
    for block_size in args.block_size:
        clock = VirtualClock()
        results.append(clock.run(run(args, block_size, clock)))
        print(
            "block size {block_size}: waste {waste_mean:.2%} mean, {waste_max:.2%} at most; pool {pool_used_mean:.0%} "
            "used; hit rate {hit_rate:.1%}; {preemptions} preemptions".format(**results[-1]),
            flush=True,
        )
    print(json.dumps({"load": vars(args), "results": results}))


if __name__ == "__main__":
    main()
