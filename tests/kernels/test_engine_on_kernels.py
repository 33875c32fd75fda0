"""The engine with the Triton step instead of the plain one: the same tokens. In the interpreter, not on a GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import make_model, random_prompts
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

pytest.importorskip("triton", reason="the kernels need Triton")

from baton.engine import model_runner
from baton.llm import LLM
from baton.model.step import kernels_cover, planner_for
from baton.model.triton_step import TritonPlanner
from baton.request import SamplingParams

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
LENGTHS = [1, 15, 16, 40]  # one is longer than a step's budget: chunks after a prefix
SAMPLING = [
    SamplingParams(max_tokens=4, temperature=0),
    SamplingParams(max_tokens=3, temperature=1.0, top_k=20, seed=1),
    SamplingParams(max_tokens=3, temperature=0),
    SamplingParams(max_tokens=2, temperature=0.7, top_p=0.9, seed=2),
]
SETTINGS = {"num_blocks": 16, "max_num_batched_tokens": 32, "max_num_seqs": 8, "device": "cpu"}
SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def soft_capped(directory: Path) -> Path:
    """One layer with a window, one without; scores and logits are capped."""
    config = Gemma2Config(**SMALL, sliding_window=12, query_pre_attn_scalar=8, attn_logit_softcapping=5.0)
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(directory)
    return directory


def with_sinks(directory: Path) -> Path:
    config = GptOssConfig(**SMALL, sliding_window=12, num_local_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(directory)
    return directory


MAKERS = {
    "gqa": partial(make_model, "gqa", hidden_size=32, head_dim=8),
    "gemma2": soft_capped,
    "gpt-oss": with_sinks,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_engine_says_the_same_with_the_kernels(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, prompts = make(tmp_path), random_prompts(LENGTHS)

    def answers(planner: Any) -> list[list[int]]:
        monkeypatch.setattr(model_runner, "planner_for", planner)
        with LLM(str(directory), **SETTINGS) as llm:
            llm.runner.storage.data.view(torch.float32).fill_(torch.nan)
            outputs = llm.generate(prompts, SAMPLING)
            llm.engine.check_integrity()
        return [output.token_ids for output in outputs]

    planned = []

    def on_kernels(layers: Any, block_size: int) -> TritonPlanner:
        assert all(map(kernels_cover, layers))
        planned.append(TritonPlanner(layers, block_size, num_sms=132))
        return planned[-1]

    expected = answers(planner_for)
    assert answers(on_kernels) == expected
    assert planned and len({tuple(tokens) for tokens in expected}) == len(expected)
