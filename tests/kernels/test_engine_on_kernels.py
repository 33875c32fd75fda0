"""The engine with the Triton step instead of the plain one: the same tokens. In the interpreter, not on a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import make_model, random_prompts
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

pytest.importorskip("triton", reason="the kernels need Triton")

from baton.engine import model_runner
from baton.llm import LLM
from baton.model.graphs import GraphedModel
from baton.model.step import kernels_cover
from baton.model.triton_attention import fuse_attention
from baton.model.triton_step import TritonPlanner
from baton.request import SamplingParams

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
LENGTHS = [1, 15, 16, 36]  # one is longer than a step's budget: chunks after a prefix
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
    "gemma2": soft_capped,
    "gpt-oss": with_sinks,
}


Answers = list[list[int]]


def answers(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: Sequence[int] = LENGTHS,
    sampling: Sequence[SamplingParams] = SAMPLING,
    **patches: Any,
) -> Answers:
    for name, value in patches.items():
        monkeypatch.setattr(model_runner, name, value)
    with LLM(str(directory), **SETTINGS) as llm:
        llm.runner.storage.data.view(torch.float32).fill_(torch.nan)
        outputs = llm.generate(random_prompts(lengths), sampling)
        llm.engine.check_integrity()
    return [output.token_ids for output in outputs]


def on_kernels(layers: Any, block_size: int, *_: Any, **__: Any) -> TritonPlanner:
    assert all(map(kernels_cover, layers))
    return TritonPlanner(layers, block_size, num_sms=132)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_engine_says_the_same_with_the_kernels(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make(tmp_path)
    expected = answers(directory, monkeypatch)
    assert answers(directory, monkeypatch, planner_for=on_kernels) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


def test_the_engine_says_the_same_with_swapped_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = soft_capped(tmp_path)
    expected = answers(directory, monkeypatch)
    swapped: list[int] = []
    patches = {
        "planner_for": on_kernels,
        "fuse": lambda *_, **__: None,  # its linear layers would be packed already
        "attention_on_kernels": lambda model, *_: swapped.append(fuse_attention(model)),
    }
    assert answers(directory, monkeypatch, **patches) == expected
    assert swapped == [2]


def test_the_engine_says_the_same_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is what it replaces here: the same function on the same buffers, padding included."""
    sizes: list[int] = []

    def capture(run: Any) -> Any:
        logits = run()  # as at load: nothing but padding
        assert not logits.isnan().any()

        def replay() -> torch.Tensor:
            sizes.append(len(logits))
            return run()

        return replay

    def with_graphs(
        model: Any, layers: Any, planner: TritonPlanner, *, max_num_seqs: int, max_model_len: int
    ) -> GraphedModel:
        return GraphedModel(
            model,
            layers,
            capture,
            num_sms=planner.num_sms,
            max_num_seqs=max_num_seqs,
            max_num_blocks=max_model_len // 16,
        )

    directory = make_model("gqa", tmp_path, hidden_size=32, head_dim=8, max_position_embeddings=64)
    three = (1, 5, 9), [SamplingParams(max_tokens=n, temperature=0) for n in (2, 3, 4)]
    expected = answers(directory, monkeypatch, *three)
    assert (
        answers(directory, monkeypatch, *three, planner_for=on_kernels, with_graphs=with_graphs) == expected
    )
    assert sizes == [4, 2, 1]
