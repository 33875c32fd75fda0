"""The engine on the GPU of this machine, with a model of an 8B Llama's shape and random weights, beside transformers.

    make bench-gpu [ARGS="--write"]

1. In process: what it takes to compute prompts, and one decode step, at several numbers of sequences. Beside them the
   floor of a decode step (weights and KV read once, at the rate at which this card was just seen to read) and what
   transformers does with the same weights and prompts: `generate`, SDPA attention, its own KV cache.
2. Processes on this one card: a prefill and a decode worker with the KV handed over in shared memory, against a
   decode worker alone; one request at a time, so the two do not compete. What is added is the hand-over.

It needs Baton's packages; nothing is downloaded: the model is made here (16 GB under --scratch). Without a GPU it says
"not run" and succeeds.
"""

import argparse
import gc
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_kernels import Machine, measure_machine, versions
from handover_ttft import NUM_TOKENS, HandOver, compare
from machine import describe_machine, spread

from baton.demo_task import DEMO_MODEL_DIR

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "results" / "gpu.md"
MODEL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
}
LOADS = ((1, 1024), (32, 1024), (128, 1024), (32, 4096))  # sequences, tokens of each prompt
NUM_STEPS = 128
NUM_PAIRS = 10
Measured = tuple[float, float]  # seconds of the prompts, seconds of a decode step


def make_model(directory: Path) -> int:
    """Its number of parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**MODEL, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    num_parameters = sum(p.numel() for p in model.parameters())
    if not (directory / "config.json").exists():
        model.save_pretrained(directory)
        for file in DEMO_MODEL_DIR.glob("tokenizer*.json"):  # the router wants one
            shutil.copy(file, directory)
    return num_parameters


def prompts(rng: random.Random, num: int, length: int) -> list[list[int]]:
    return [[rng.randrange(128000) for _ in range(length)] for _ in range(num)]


def measure(
    generate: Callable[[list[list[int]], int], None], num: int, length: int, rounds: int
) -> list[Measured]:
    """The same load with one token and with NUM_STEPS more, each with prompts of its own."""
    rng, found = random.Random(num * length), []
    for _ in range(rounds):
        times = []
        for num_tokens in (1, 1 + NUM_STEPS):
            works = prompts(rng, num, length)
            started_s = time.perf_counter()
            generate(works, num_tokens)
            times.append(time.perf_counter() - started_s)
        found.append((times[0], (times[1] - times[0]) / NUM_STEPS))
    return found


def measure_baton(directory: Path, rounds: int) -> list[list[Measured]]:
    from baton.llm import LLM
    from baton.request import SamplingParams

    settings: dict[str, Any] = {"block_size": 64, "max_num_seqs": 128, "max_num_batched_tokens": 8192}
    with LLM(str(directory), dtype="bfloat16", gpu_memory_utilization=0.6, **settings) as llm:

        def generate(works: list[list[int]], num_tokens: int) -> None:
            sampling = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
            outputs = llm.generate(works, sampling, use_tqdm=False)
            assert all(len(output.token_ids) == num_tokens for output in outputs)

        generate(prompts(random.Random(0), 2, 64), 4)
        return [measure(generate, *load, rounds) for load in LOADS]


def measure_transformers(directory: Path) -> list[list[Measured]]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model = model.to("cuda").eval()

    @torch.inference_mode()
    def generate(works: list[list[int]], num_tokens: int) -> None:
        config = GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        ids = torch.tensor(works, device="cuda")
        out = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
        assert out.shape[1] == len(works[0]) + num_tokens
        torch.cuda.synchronize()

    generate(prompts(random.Random(0), 1, 16), 4)
    return [measure(generate, *load, rounds=1) for load in LOADS]


def measure_hand_over(directory: Path) -> HandOver:
    # The pool has a fixed size: how much is free is uncertain while other workers of the same card start.
    flags = ["--dtype", "bfloat16", "--block-size", "64", "--num-blocks", "512", "--index", "memory"]
    flags += ["--max-num-batched-tokens", "8192", "--max-model-len", "8192"]
    return compare(NUM_PAIRS, range(128000), str(directory), flags)


def floor_s(machine: Machine, num_parameters: int, num: int, length: int) -> float:
    """Of a decode step in the middle of the measured ones."""
    per_token = 2 * 2 * MODEL["num_hidden_layers"] * MODEL["num_key_value_heads"] * MODEL["head_dim"]
    embedding = MODEL["vocab_size"] * MODEL["hidden_size"]
    num_bytes = 2 * (num_parameters - embedding) + num * (length + NUM_STEPS / 2) * per_token
    return num_bytes / machine.read_bytes_per_s


def table(
    machine: Machine, num_parameters: int, ours: list[list[Measured]], theirs: list[list[Measured]]
) -> list[str]:
    lines = [
        "| sequences x prompt | prompts: tok/s | transformers | decode: tok/s | transformers | step ms | floor ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, (num, length) in enumerate(LOADS):
        cells = [f"{num} x {length:,}"]
        for column in (0, 1):
            for found in (ours, theirs):
                if i < len(found):
                    work = num * (length if column == 0 else 1)
                    cells.append(spread([work / measured[column] for measured in found[i]], 0))
                else:
                    cells.append("-")
        cells.append(spread([1e3 * step for _, step in ours[i]]))
        cells.append(f"{1e3 * floor_s(machine, num_parameters, num, length):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(machine: Machine, lines: list[str], handed: HandOver, rounds: int) -> str:
    text = [
        "# The engine on a GPU",
        "",
        f'`make bench-gpu ARGS="--write --rounds {rounds}"`, {describe_machine()}. {machine}. {", ".join(versions())}.',
        "",
        "A model of an 8B Llama's shape (32 layers, 32 and 8 heads of 128, MLP 14336, vocabulary 128,256), random",
        "weights, bfloat16, greedy. Cells are medians (least-greatest) of the rounds; transformers has one.",
        f"Decode: {NUM_STEPS} steps; floor: weights and KV read once at the rate above.",
        "",
        *lines,
    ]
    text += [
        "",
        f"Prompts of {NUM_TOKENS:,} tokens, {NUM_PAIRS} of them, one at a time; processes on this card:",
        "",
        "| | TTFT ms | second token ms later |",
        "|---|---|---|",
        f"| two workers, KV through shared memory | {spread(handed.pair_ms)} | {spread(handed.pair_second_ms)} |",
        f"| decode worker alone | {spread(handed.alone_ms)} | {spread(handed.alone_second_ms)} |",
        f"| difference, pair by pair | {spread(handed.added_ms)} | |",
    ]
    return "\n".join([*text, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm/baton-bench-gpu"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"the page {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: not run (it needs an NVIDIA GPU)")
        return
    machine = measure_machine()
    print(machine, flush=True)
    num_parameters = make_model(args.scratch)
    free_memory()
    ours = measure_baton(args.scratch, args.rounds)
    free_memory()
    print(*table(machine, num_parameters, ours, []), sep="\n", flush=True)
    theirs = measure_transformers(args.scratch)
    free_memory()
    lines = table(machine, num_parameters, ours, theirs)
    print(*lines, sep="\n", flush=True)
    text = page(machine, lines, measure_hand_over(args.scratch), args.rounds)
    print(text)
    if args.write:
        PAGE.write_text(text)
    shutil.rmtree(args.scratch)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
