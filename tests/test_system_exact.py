"""Bit-exact mode through real processes: what a prefill and a decode worker answer together, in whatever batches, is
what one engine alone says of each prompt, and its log probabilities are the same numbers to the last bit."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from reference import make_model, random_prompts
from stack import running_stack
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from baton.config import EngineConfig
from baton.llm import LLM
from baton.request import SamplingParams

LENGTHS = [3, 16, 17, 40, 64, 65, 129, 200]
NUM_TOKENS = 12
PAIR = EngineConfig(bit_exact=True, max_num_batched_tokens=48, max_num_seqs=32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model("gqa", tmp_path_factory.mktemp("gqa"))
    vocabulary = {f"w{i}": i for i in range(211)}
    Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return directory


Answer = tuple[list[int], list[float]]


def _alone(directory: Path, prompts: list[tuple[int, ...]], params: list[SamplingParams]) -> list[Answer]:
    with LLM(
        str(directory), dtype="float32", bit_exact=True, max_num_seqs=1, enable_prefix_caching=False
    ) as llm:
        outputs = llm.generate(prompts, params)
    return [(output.token_ids, [each.logprob for each in output.logprobs]) for output in outputs]


async def _ask(client: httpx.AsyncClient, prompt: tuple[int, ...], params: SamplingParams) -> Answer:
    body: dict[str, Any] = {
        "model": "test", "prompt": list(prompt), "max_tokens": params.max_tokens, "seed": params.seed,
        "temperature": params.temperature, "logprobs": 0, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


async def test_a_pair_equals_one_engine_bit_for_bit(directory: Path) -> None:
    prompts = random_prompts(LENGTHS * 2, seed=3)
    params = [
        SamplingParams(
            max_tokens=NUM_TOKENS, seed=i, temperature=0.0 if i % 3 == 0 else 1.5, logprobs=0, ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    expected = await asyncio.to_thread(_alone, directory, prompts, params)
    async with (
        running_stack(model=str(directory), engine=PAIR) as stack,
        httpx.AsyncClient(base_url=stack.base_url, timeout=120) as client,
    ):
        for _ in range(2):  # the second time behind prefix hits
            answers = await asyncio.gather(*map(lambda *each: _ask(client, *each), prompts, params))
            assert list(answers) == expected
        await stack.until_nothing_is_used("prefill-0", "decode-0")
