"""Measured in a process of its own, without a server: transformers' plain `generate`, and Baton's LLM class.

    python offline.py generate|baton MODEL --threads N --batch B --requests R [--prompt 256] [--output 64] [--seed S]

Prompts of random tokens. `generate` takes the requests in batches of B one after another. Prints
one JSON object.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable

VOCAB_SIZE, FIRST_WORD = 16_384, 962  # see loads.py

Batch = list[list[int]]


def with_generate(model_dir: str, num_threads: int) -> Callable[[Batch, int], int]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompts: Batch, num_output: int) -> int:
        ids = torch.tensor(prompts)
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_output,
            max_new_tokens=num_output,
        )
        return answer[:, ids.shape[1] :].numel()

    return run


def with_baton(model_dir: str, num_threads: int) -> Callable[[Batch, int], int]:
    from baton import LLM, SamplingParams

    llm = LLM(model_dir, dtype="bfloat16", num_threads=num_threads, num_blocks=2000)

    def run(prompts: Batch, num_output: int) -> int:
        sampling = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
        return sum(len(output.token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=["generate", "baton"])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    run = {"generate": with_generate, "baton": with_baton}[options.engine](options.model, options.threads)
    rng = random.Random(f"{options.seed}/offline")
    ids = range(FIRST_WORD, VOCAB_SIZE)
    prompts = [rng.choices(ids, k=options.prompt) for _ in range(options.requests)]
    run([rng.choices(ids, k=8) for _ in range(options.batch)], 2)  # first touch of every weight
    started_s, started_cpu_s, num_tokens = time.monotonic(), time.process_time(), 0
    for start in range(0, len(prompts), options.batch):
        num_tokens += run(prompts[start : start + options.batch], options.output)
    wall_s, cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    json.dump({"output_tok_per_s": num_tokens / wall_s, "cpu_s": cpu_s, "wall_s": wall_s}, sys.stdout)


if __name__ == "__main__":
    main()
