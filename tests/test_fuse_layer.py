"""A decoder layer in two calls gives what its parts give one after another, to the last bit, logits and KV; a layer
that only looks alike stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import KINDS, make_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.kv.storage import DTYPES
from baton.model import loader
from baton.model.fuse import fuse
from baton.model.fuse_layer import WholeLayer
from baton.request import BlockId, RequestId, SamplingParams
from baton_kernels.native import Native

GREEDY = SamplingParams(temperature=0)

_SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def _row(tokens: range, blocks: range, start: int) -> BatchRow:
    return BatchRow(RequestId("r"), start, tuple(tokens), tuple(map(BlockId, blocks)), True, GREEDY)


# A long prompt, the end of another one, and sequences that decode: rows in several parts, of several panels.
_BATCHES = (
    Batch((_row(range(7, 40), range(3), 0), _row(range(90), range(3, 9), 0))),
    Batch((
        _row(range(50, 61), range(3, 10), 90),
        *(_row(range(n, n + 1), range(3), 33) for n in range(8)),
    )),
    Batch(tuple(_row(range(n, n + 1), range(3, 10), 101) for n in range(3))),
)  # fmt: skip


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), WholeLayer)]


@torch.inference_mode()
def _results(runner: TorchModelRunner) -> list[torch.Tensor]:
    untouched = runner.storage.data.clone()
    results = [runner._forward(runner._prepare(batch)).clone() for batch in _BATCHES]
    results.append(runner.storage.data.clone())
    runner.storage.data.copy_(untouched)
    return results


async def _check(directory: Path, dtype: str, ops: Native, **engine: Any) -> None:
    if not ops.supports(DTYPES[dtype]):
        pytest.skip(f"this CPU has no {dtype}")
    runner = load_runner(
        ModelConfig(str(directory), dtype=dtype), EngineConfig(num_blocks=32, **engine), fill_nan=True
    ).runner
    # The last layer's forward is that of `trim`, which calls ours.
    runner._model = runner._parts.model
    last = next(m for m in runner._model.modules() if type(vars(m).get("forward")).__name__ == "_LastLayer")
    last.forward = last.forward.forward
    layers = _layers(runner._model)
    assert len(layers) == len(runner._layers)
    ours = _results(runner)
    for layer in layers:
        layer.forward = layer.forward._forward
    theirs = _results(runner)
    await runner.aclose()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert all(torch.isfinite(logits).all() for logits in ours[:-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_the_same_to_the_last_bit(ops: Native, kind: str, dtype: str, tmp_path: Path) -> None:
    await _check(make_model(kind, tmp_path), dtype, ops)


async def test_with_rounded_weights(ops: Native, tmp_path: Path) -> None:
    if not ops.supports(torch.int8):
        pytest.skip("this CPU has no instructions for int8")
    await _check(make_model("qwen3", tmp_path), "bfloat16", ops, quantization="int8")


async def test_with_windows(ops: Native, tmp_path: Path) -> None:
    MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=24, pad_token_id=0)).save_pretrained(tmp_path)
    await _check(tmp_path, "float32", ops)


def test_residuals_of_another_kind_stay(ops: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granite = GraniteConfig(**_SHAPE, pad_token_id=0, residual_multiplier=0.98)
    GraniteForCausalLM(granite).save_pretrained(tmp_path / "granite")
    forward = LlamaDecoderLayer.forward

    def twice(self: Any, hidden_states: torch.Tensor, *args: Any, **others: Any) -> Any:
        return forward(self, forward(self, hidden_states, *args, **others), *args, **others)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", twice)
    for directory in (tmp_path / "granite", make_model("gqa", tmp_path / "llama")):
        config = loader.load_config(directory, surveyed=False)
        model = loader.load_model(directory, config, "float32", torch.device("cpu"))
        fuse(model, ops)
        assert not _layers(model)
