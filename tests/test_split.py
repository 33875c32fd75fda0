"""The head of a model runs on a few rows of a scored prompt at a time, and says the same as on all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import make_model, random_prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Llama4TextConfig, OPTConfig, PreTrainedConfig

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.engine.prompt_scores import PromptScores
from baton.engine.scoring import NUM_ROWS
from baton.model import loader
from baton.model.exact import ExactModel
from baton.model.split import SplitModel, WholeModel, split
from baton.request import BlockId, RequestId, SamplingParams

NUM_TOP = 2
_OTHER_HEADS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "soft-capped": (Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "decoder in a decoder": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "no base model": (
        Llama4TextConfig,
        {"intermediate_size_mlp": 48, "num_key_value_heads": 2, "head_dim": 8},
    ),
}


def _runner(directory: Path, **settings: Any) -> TorchModelRunner:
    dtype = settings.pop("dtype", "float32")
    return load_runner(
        ModelConfig(str(directory), dtype=dtype), EngineConfig(num_blocks=64, **settings), fill_nan=True
    ).runner


def _step(prompts: list[tuple[int, ...]]) -> tuple[Batch, list[PromptScores]]:
    """Scored prompts in one step, the last of them not to its end, and another that is not scored."""
    scores = [PromptScores(prompt, NUM_TOP) for prompt in prompts]
    rows, start = [], 0
    for i, prompt in enumerate(prompts):
        num_blocks = -(-len(prompt) // 16)
        table = tuple(map(BlockId, range(start, start + num_blocks)))
        sample, start = i < len(prompts) - 1, start + num_blocks
        said = scores[i] if i else None
        row = BatchRow(RequestId(str(i)), 0, prompt, table, sample, SamplingParams(temperature=0))
        rows.append(row._replace(scores=said))
    return Batch(tuple(rows)), scores[1:-1]


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"bit_exact": True}], ids=str)
async def test_the_numbers_are_those_of_the_whole_chunk_to_the_last_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    runner = _runner(make_model("gqa", tmp_path), **settings)
    model = runner._parts.model
    assert isinstance(split(model), SplitModel)
    results = []
    for parts in (split(model), WholeModel(model)):
        runner._parts = ExactModel(parts) if settings.get("bit_exact") else parts
        batch, scores = _step(random_prompts([20, 2 * NUM_ROWS + 9, NUM_ROWS + 1, 1, 90]))
        results.append((await runner.execute(batch), [each.result() for each in scores]))
    await runner.aclose()
    assert results[0] == results[1]


async def test_the_head_never_gets_more_rows_of_a_scored_prompt(tmp_path: Path) -> None:
    runner = _runner(make_model("tied", tmp_path))
    seen: list[int] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    runner._parts.model.get_output_embeddings().register_forward_pre_hook(note)
    batch, scores = _step(random_prompts([20, 400, 100, 30]))
    await runner.execute(batch)
    await runner.aclose()
    assert max(seen) == NUM_ROWS
    assert sum(seen) == 399 + 99 + 29 + 3  # what is known of the scored ones, and three first tokens
    assert [len(each.result().logprobs) for each in scores] == [399, 99]


@pytest.mark.parametrize("name", _OTHER_HEADS)
def test_a_model_of_another_make_is_one_of_two_parts(name: str, tmp_path: Path) -> None:
    config_class, changes = _OTHER_HEADS[name]
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(**shape, **{"intermediate_size": 48, "pad_token_id": None, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = loader.load_model(tmp_path, loader.load_config(tmp_path), "float32", torch.device("cpu"))
    assert isinstance(split(model), SplitModel)


def test_a_head_that_looks_at_more_than_the_states_stays(tmp_path: Path) -> None:
    directory = make_model("gqa", tmp_path)
    model: Any = loader.load_model(directory, loader.load_config(directory), "float32", torch.device("cpu"))
    usual = model.forward

    def forward(input_ids: Tensor, **others: Any) -> Any:
        output = usual(input_ids=input_ids, **others)
        output.logits += input_ids[..., None]
        return output

    model.forward = forward
    assert isinstance(split(model), WholeModel)
