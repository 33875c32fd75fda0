"""What structured output costs a decode step, and how much of it the forward pass hides.

    python benchmarks/bench_structured.py [--threads 1 2] [--batch 1 8 32] [--rounds 3] [--steps 40] [--out FILE.md]

Every step of an engine with the 372 million parameters of `scripts/make_bench_model.py` (bfloat16, vocabulary 16 Ki)
decodes a batch of sequences; three kinds of them take turns in every round:

    plain    temperature 1 and nothing else: the host prepares the next step while this one runs
    biased   with a logit bias: the same, but a step waits for the tokens of the one before, as all do whose next
             step depends on them
    json     an array of objects with strings, numbers, enums and a pattern, by JSON schema; each sequence is at another
             place of it, because each draws with a seed of its own

`masks` is the CPU time of the grammars' masks of one step, in the thread that makes them beside the model's. `exposed`
is for how long the model's thread then waited for them, after its forward pass: hidden is what is left. The last two
columns are what a grammar costs in all, beside the bias, in wall and in CPU time: masks, the wait, laying them over the
logits, telling the matchers, and what two threads take from each other.

Cells are medians over the rounds, with the least and the greatest; a round has its median step, and the mean of its
masks. The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from machine import describe_machine, spread

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.engine import Engine
from baton.engine.masks import MaskMaker
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.engine.sampling_state import Bitmask, SamplingState
from baton.kv.block import num_blocks_for
from baton.request import Grammar, GrammarKind, Request, RequestId, SamplingParams, TokenBias

ROOT = Path(__file__).parent.parent
PROMPT, BLOCK_SIZE, TOKEN, NUM_WARM_STEPS = 64, 16, 100, 8
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "weight": {"type": "number", "minimum": 0, "maximum": 1000},
            "kind": {"enum": ["customer", "supplier", "competitor"]},
            "code": {"type": "string", "pattern": "^[a-z]{2}-[0-9]{4}$"},
        },
        "required": ["name", "age", "weight", "kind", "code"],
        "additionalProperties": False,
    },
}
KINDS: dict[str, SamplingParams] = {
    "plain": SamplingParams(temperature=1, ignore_eos=True),
    "biased": SamplingParams(temperature=1, ignore_eos=True, logit_bias=(TokenBias(TOKEN, 1.0),)),
    "json": SamplingParams(temperature=1, grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))),
}


class Cell(NamedTuple):
    """Of one kind in one round: seconds of a step."""

    step_s: float
    cpu_s: float
    masks_s: float
    exposed_s: float


class TimedMasks:
    """In place of a runner's MaskMaker: makes the same masks, and notes what each step's cost."""

    def __init__(self, inner: MaskMaker) -> None:
        self._inner = inner
        self.steps: list[tuple[float, float]] = []  # CPU time of the masks, wait for them

    @contextlib.contextmanager
    def beside(self, states: Iterable[SamplingState | None]) -> Iterator[None]:
        timed = [_TimedState(state) for state in states if state is not None and state.matcher is not None]
        with self._inner.beside(timed):  # type: ignore[arg-type]
            yield
            computed_s = time.perf_counter()
        exposed_s = time.perf_counter() - computed_s
        self.steps.append((sum(state.mask_s for state in timed), exposed_s))

    def close(self) -> None:
        self._inner.close()


class _TimedState:
    def __init__(self, state: SamplingState) -> None:
        self.matcher = state.matcher
        self.mask_s = 0.0
        self._state = state

    def mask(self) -> Bitmask | None:
        started_s = time.thread_time()
        try:
            return self._state.mask()
        finally:
            self.mask_s += time.thread_time() - started_s


class Bench:
    def __init__(self, model: str, num_threads: int, batch: int, num_steps: int) -> None:
        """`batch` is the largest."""
        self._num_steps = num_steps
        self._max_tokens = NUM_WARM_STEPS + num_steps + 4
        config = EngineConfig(
            num_blocks=batch * num_blocks_for(PROMPT + self._max_tokens, BLOCK_SIZE) * 11 // 10,
            block_size=BLOCK_SIZE,
            max_num_seqs=batch,
            max_num_batched_tokens=batch * PROMPT,  # all prompts in one step
            num_threads=num_threads,
            enable_prefix_caching=False,
        )
        loaded = load_runner(ModelConfig(model, dtype="bfloat16"), config)
        self._runner: TorchModelRunner = loaded.runner
        self._masks = TimedMasks(self._runner._masks)
        self._runner._masks = self._masks  # type: ignore[assignment]
        self._engine = Engine(config, self._runner, SystemClock(), loaded.fingerprint)

    async def measure(self, kind: str, batch: int, seed: int) -> Cell:
        """`batch` sequences from their prompts on; they are gone when it returns."""
        requests = [self._request(kind, seed, i) for i in range(batch)]
        for request in requests:
            await self._engine.prepare(request)
            self._engine.add(request)
        prompts = await self._engine.step()
        assert prompts.num_tokens == batch * PROMPT, prompts.num_tokens
        for _ in range(NUM_WARM_STEPS):
            await self._engine.step()
        self._masks.steps.clear()
        cpu_s = time.process_time()
        seconds = [await self._step(batch) for _ in range(self._num_steps)]
        cpu_s = (time.process_time() - cpu_s) / self._num_steps
        masks, exposed = zip(*self._masks.steps, strict=True)
        for request in requests:
            self._engine.abort(request.request_id)
        while (await self._engine.step()).num_tokens:  # one may be under way
            pass
        return Cell(statistics.median(seconds), cpu_s, statistics.mean(masks), statistics.mean(exposed))

    async def _step(self, batch: int) -> float:
        started_s = time.perf_counter()
        output = await self._engine.step()
        assert output.num_tokens == batch, output.num_tokens
        return time.perf_counter() - started_s

    def _request(self, kind: str, seed: int, number: int) -> Request:
        rng = random.Random(f"{seed}/{number}")
        prompt = tuple(rng.choices(range(TOKEN, self._runner.vocab_size), k=PROMPT))
        sampling = replace(KINDS[kind], max_tokens=self._max_tokens, seed=rng.getrandbits(64))
        return Request(RequestId(f"{kind}-{number}"), prompt, sampling)

    async def aclose(self) -> None:
        await self._runner.aclose()


Cells = dict[tuple[int, int, str], list[Cell]]  # (threads, batch, kind) -> one per round


async def run(model: str, options: argparse.Namespace) -> Cells:
    cells: Cells = {}
    for num_threads in options.threads:
        bench = Bench(model, num_threads, max(options.batch), options.steps)
        for number in range(options.rounds):
            for batch in options.batch:
                kinds = [*KINDS][number % len(KINDS) :] + [*KINDS][: number % len(KINDS)]
                for kind in kinds:
                    cell = await bench.measure(kind, batch, seed=number)
                    cells.setdefault((num_threads, batch, kind), []).append(cell)
                    print(f"{num_threads} threads, batch {batch}, {kind}: {_line(cell)}", file=sys.stderr)
        await bench.aclose()
    return cells


def _line(cell: Cell) -> str:
    return f"{cell.step_s * 1e3:.2f} ms, masks {cell.masks_s * 1e3:.3f} ms, exposed {cell.exposed_s * 1e3:.3f} ms"


# --- the report ---


def table(cells: Cells) -> str:
    lines = [
        "| threads | batch | plain ms | biased ms | json ms | masks ms | exposed ms | hidden | json-biased | CPU ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for num_threads, batch in dict.fromkeys((key[0], key[1]) for key in cells):
        plain, biased, grammar = (cells[num_threads, batch, kind] for kind in KINDS)
        turns = [*zip(grammar, biased, strict=True)]
        columns = [
            *(_cell([each.step_s for each in kind]) for kind in (plain, biased, grammar)),
            _cell([each.masks_s for each in grammar]),
            _cell([each.exposed_s for each in grammar]),
            f"{hidden(grammar):.0%}",
            _cell([ours.step_s - theirs.step_s for ours, theirs in turns]),
            _cell([ours.cpu_s - theirs.cpu_s for ours, theirs in turns]),
        ]
        lines.append(f"| {num_threads} | {batch} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def hidden(cells: list[Cell]) -> float:
    """The share of the masks' time that nobody waits for; of the median round."""
    return statistics.median(1 - min(1.0, each.exposed_s / each.masks_s) for each in cells)


def _cell(seconds: list[float]) -> str:
    return spread([1e3 * value for value in seconds])


def report(cells: Cells, options: argparse.Namespace, load_before: float) -> str:
    return "\n".join([
        "# What structured output costs a decode step",
        "",
        f"`python benchmarks/bench_structured.py {' '.join(sys.argv[1:])}`, {describe_machine()}, load average "
        f"{load_before:.1f} at the start. {options.rounds} rounds of {options.steps} steps, the kinds in turn.",
        "",
        table(cells),
        "",
        "What is measured and how is said at the top of the script. `masks` is CPU time of a thread of its own, and "
        "`exposed` what the model's thread waits for it; with one thread a core each takes time from the other.",
        "",
    ])  # fmt: skip


def bench_model() -> str:
    directory = Path(tempfile.gettempdir()) / "baton-bench-models" / "qwen-0.5b"
    if not (directory / "tokenizer.json").is_file():
        script = ROOT / "scripts" / "make_bench_model.py"
        command = [sys.executable, str(script), "--shape", "qwen-0.5b", "--out", str(directory)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return str(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the one named above, made where it is missing")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    cells = asyncio.run(run(options.model or bench_model(), options))
    text = report(cells, options, load_before)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    print(json.dumps([
        {"threads": threads, "batch": batch, "kind": kind, "rounds": [each._asdict() for each in rounds]}
        for (threads, batch, kind), rounds in cells.items()
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
