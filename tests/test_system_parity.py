"""Greedy tokens through real processes equal transformers' own `generate`, prompt by prompt, over tcp and over ucx.

Random-weight Llama models (MHA, GQA, tied, RoPE-scaled) and the demo model; prompts of 1 to 2,000 tokens with every
page boundary; 1 to 32 at a time; prompts computed in chunks and at once. Beside it the control without a transfer. A
mismatch in both is the engine's, one in the pair alone is the hand-over's (whose bytes test_handover.py compares).
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from reference import Reference, load_reference, make_model, random_prompts, reference_generate
from stack import Stack, running_stack
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from baton.config import EngineConfig
from baton.model_files import resolve_model
from baton.transfer.choose import available

NUM_TOKENS = 8
BLOCK = EngineConfig().block_size
SHORT = [
    1,
    2,
    3,
    5,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    2 * BLOCK - 1,
    2 * BLOCK,
    2 * BLOCK + 1,
    4 * BLOCK,
    63,
    65,
    100,
]
LONG = [128, 129, 256, 257, 511, 512, 1000, 1024, 1025, 1999, 2000]
LENGTHS = SHORT * 2 + LONG
MODELS = ("demo", "gqa", "mha", "tied", "rope-llama3")
CHUNKED = EngineConfig(max_num_batched_tokens=96, max_num_seqs=64)
AT_ONCE = EngineConfig(max_num_batched_tokens=4096, max_num_seqs=64)

_references: dict[str, list[Reference]] = {}  # computed once for all transports


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    dirs = {"demo": resolve_model("demo", None)}
    for seed, kind in enumerate(MODELS[1:]):
        directory = make_model(kind, tmp_path_factory.mktemp(kind), seed=seed)
        vocabulary = {f"w{i}": i for i in range(211)}
        Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(directory / "tokenizer.json"))
        dirs[kind] = directory
    return dirs


def references(kind: str, directory: Path) -> list[Reference]:
    if kind not in _references:
        model = load_reference(directory)
        prompts = random_prompts(LENGTHS, seed=7, vocab_size=min(211, model.config.vocab_size))
        found = reference_generate(model, prompts, NUM_TOKENS)
        clear = [reference for reference in found if reference.clear]
        assert len(clear) > 0.9 * len(found), f"{kind}: too many prompts end in near ties"
        _references[kind] = clear
    return _references[kind]


async def tokens_of(client: httpx.AsyncClient, reference: Reference, limit: asyncio.Semaphore) -> list[int]:
    body = {
        "model": "test", "prompt": list(reference.prompt), "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    async with limit:
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


async def assert_parity(stack: Stack, wanted: Sequence[Reference], concurrency: int) -> None:
    limit = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=120) as client:
        answers = await asyncio.gather(*(tokens_of(client, reference, limit) for reference in wanted))
    wrong = [
        f"{len(reference.prompt)} tokens: {answer} instead of {list(reference.token_ids)}"
        for reference, answer in zip(wanted, answers, strict=True)
        if answer != list(reference.token_ids)
    ]
    assert not wrong, "\n".join(wrong)


# Each kind over two of them, in turn. `auto` on one host must be shared memory.
TRANSPORTS = [{"shm": "auto"}.get(name, name) for name in available()]
CASES = [
    (kind, TRANSPORTS[(number + other) % len(TRANSPORTS)], CHUNKED if (number + other) % 2 else AT_ONCE)
    for number, kind in enumerate(MODELS)
    for other in range(2)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "transport", "engine"),
    CASES,
    ids=[f"{kind}-{transport}-{'chunked' if e is CHUNKED else 'at_once'}" for kind, transport, e in CASES],
)
async def test_a_pair_of_processes_equals_generate(
    kind: str, transport: str, engine: EngineConfig, model_dirs: dict[str, Path]
) -> None:
    wanted = references(kind, model_dirs[kind])
    async with running_stack(model=str(model_dirs[kind]), transport=transport, engine=engine) as stack:
        await assert_parity(stack, wanted[:6], concurrency=1)
        await assert_parity(stack, wanted, concurrency=32)
        async with httpx.AsyncClient(base_url=stack.base_url) as client:
            health = (await client.get("/health")).json()
        used = {"auto": "shm"}.get(transport, transport)
        assert (health["transport"], health["pairs"][0]["transport"]) == (used, used)
        await stack.until_nothing_is_used("prefill-0", "decode-0")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["demo", "gqa"])
async def test_the_control_without_transfer_equals_generate(kind: str, model_dirs: dict[str, Path]) -> None:
    wanted = references(kind, model_dirs[kind])
    async with running_stack(model=str(model_dirs[kind]), num_prefill=0, engine=CHUNKED) as stack:
        await assert_parity(stack, wanted, concurrency=8)
