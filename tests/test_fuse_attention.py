"""Attention modules that are swapped hand on what the model's own would; those that only look alike stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import KINDS, make_model
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Olmo2Config, Olmo2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from baton.kv.storage import DTYPES
from baton.model import loader
from baton.model.attention import Echo
from baton.model.fuse import fuse
from baton.model.fuse_attention import RotatedAttention
from baton_kernels.native import Native

_TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
_POSITIONS = torch.tensor([[0, 1, 2, 3, 70, 71, 500]])


def _load(directory: Path, dtype: str) -> nn.Module:
    config = loader.load_config(directory, surveyed=False)
    return loader.load_model(directory, config, dtype, torch.device("cpu"))


class _Listener(Echo):
    """Keeps what every layer handed on."""

    def __init__(self) -> None:
        self.heads: list[torch.Tensor] = []

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, options: Any) -> torch.Tensor:
        self.heads += [query.clone(), key.clone(), value.clone()]
        return super().attend(module, query, key, value, options)


@torch.inference_mode()
def _heard(model: nn.Module) -> list[torch.Tensor]:
    listener = _Listener()
    model(input_ids=_TOKENS, position_ids=_POSITIONS, use_cache=False, baton_batch=listener)
    return listener.heads


def _num_swapped(model: nn.Module) -> int:
    return sum(isinstance(module, RotatedAttention) for module in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mqa", "head-dim", "rope-yarn", "qwen2", "qwen3"])
def test_the_same_is_handed_on(ops: Native, kind: str, dtype: str, tmp_path: Path) -> None:
    if not ops.supports(DTYPES[dtype]):
        pytest.skip(f"this CPU has no {dtype}")
    assert kind in KINDS
    model = _load(make_model(kind, tmp_path), dtype)
    expected = _heard(model)
    fuse(model, ops)
    assert _num_swapped(model) == len(expected) // 3
    tolerance = 1e-4 if dtype == "float32" else 4e-2
    for heads, wanted in zip(_heard(model), expected, strict=True):
        assert heads.shape == wanted.shape
        assert (heads - wanted).abs().max() <= tolerance * wanted.abs().max()


_SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [(CohereConfig, CohereForCausalLM), (Olmo2Config, Olmo2ForCausalLM)],
    ids=["turns-pairs", "norm-of-all-heads"],
)
def test_what_only_looks_alike_stays(ops: Native, made: tuple[Any, Any], tmp_path: Path) -> None:
    config_class, model_class = made
    model_class(config_class(**_SHAPE, pad_token_id=0)).save_pretrained(tmp_path)
    model = _load(tmp_path, "float32")
    fuse(model, ops)
    assert _num_swapped(model) == 0


def test_a_module_of_its_own_mind_stays(ops: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaAttention.forward

    def halved(self: Any, hidden_states: torch.Tensor, **others: Any) -> Any:
        return forward(self, hidden_states / 2, **others)

    monkeypatch.setattr(LlamaAttention, "forward", halved)
    model = _load(make_model("gqa", tmp_path), "float32")
    expected = _heard(model)
    fuse(model, ops)
    assert _num_swapped(model) == 0
    for heads, wanted in zip(_heard(model), expected, strict=True):
        torch.testing.assert_close(heads, wanted, rtol=1e-4, atol=1e-4)
