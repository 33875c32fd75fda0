"""What a step costs beside the model and the sampler: scheduling, building the batch and its tensors, taking the
tokens in.

    python step_cost.py MODEL [--sequences 64] [--steps 300] [--seed 0]

Engine, cache manager, scheduler and model runner are the production ones; only the forward pass and the drawing of
tokens are left out. CPU time of the whole process, both threads, per decode step of all sequences together; `tensors`
is the part that the runner's thread spent on the step's tensors. Prints one JSON object.
"""

import argparse
import asyncio
import gc
import json
import random
import sys
import time
from collections.abc import Callable

import torch

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch
from baton.engine.engine import Engine
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.kv.block import num_blocks_for
from baton.request import Request, RequestId, SamplingParams

PROMPT, BLOCK_SIZE, TOKEN, NUM_WARM_STEPS = 256, 16, 7, 20


class NoModel:
    """Stands in for a runner's `_run`: the tensors are made, nothing is computed from them."""

    def __init__(self, runner: TorchModelRunner, num_layers: int) -> None:
        self._runner = runner
        self._num_layers = num_layers
        self.tensors_s = 0.0

    @torch.inference_mode()
    def __call__(self, batch: Batch, on_written: Callable[[int], None] | None) -> tuple[int, ...]:
        started_s = time.thread_time()
        self._runner._prepare(batch)
        self.tensors_s += time.thread_time() - started_s
        for layer in range(self._num_layers if on_written is not None else 0):
            on_written(layer)
        tokens = (TOKEN,) * sum(row.sample for row in batch.rows)
        self._runner._drawn = torch.tensor(tokens, dtype=torch.int64)
        return tokens


async def measure(model: str, num_sequences: int, num_steps: int, seed: int) -> dict[str, float]:
    # The first to be admitted decode while the last ones' prompts are computed.
    max_tokens = num_sequences + NUM_WARM_STEPS + num_steps + 1
    config = EngineConfig(
        num_blocks=num_sequences * num_blocks_for(PROMPT + max_tokens, BLOCK_SIZE) * 11 // 10,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=max(512, num_sequences),
    )
    loaded = load_runner(ModelConfig(model, dtype="bfloat16"), config)
    runner = loaded.runner
    no_model = NoModel(runner, len(runner.storage.layout.layers))
    runner._run = no_model  # type: ignore[method-assign]
    engine = Engine(config, runner, SystemClock(), loaded.fingerprint)
    rng = random.Random(seed)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    for i in range(num_sequences):
        prompt = tuple(rng.choices(range(4, runner.vocab_size), k=PROMPT))
        engine.add(Request(RequestId(f"r{i}"), prompt, sampling))
    while (await engine.step()).num_tokens != num_sequences:
        pass
    for _ in range(NUM_WARM_STEPS):
        await engine.step()
    gc.collect()
    gc.freeze()
    cpu_s, no_model.tensors_s = time.process_time(), 0.0
    for _ in range(num_steps):
        output = await engine.step()
        assert output.num_tokens == num_sequences, output.num_tokens
    cpu_s = time.process_time() - cpu_s
    await runner.aclose()
    return {"step_cpu_s": cpu_s / num_steps, "tensors_cpu_s": no_model.tensors_s / num_steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cost = measure(options.model, options.sequences, options.steps, options.seed)
    json.dump(asyncio.run(cost), sys.stdout)


if __name__ == "__main__":
    main()
