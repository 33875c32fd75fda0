"""Modules of real models swapped for the kernels: what is swapped, what stays, and the same logits."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

pytest.importorskip("triton", reason="the kernels need Triton")

from baton.model import attention
from baton.model.attention import Echo
from baton.model.triton_attention import FusedAttention, fuse_attention
from baton.model.triton_fuse import FusedGatedMLP, FusedRMSNorm, fuse
from baton_kernels import naive

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(config_class: Any, model_class: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    implementation = changes.pop("attn_implementation", None)
    config = config_class(**{**SHAPE, **changes})
    config._attn_implementation = implementation or config._attn_implementation
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # as they begin, ones or zeros, they would hide that they are forgotten
            nn.init.normal_(parameter, std=0.5)
    return model


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, 5, 2),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, 9, 2),  # a norm of each head of query and key as well
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {}, 9, 0),  # stores weight - 1; its MLP has no SiLU
    "biased": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}, 5, 0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_swapped_modules_give_the_same_logits(case: tuple[Any, Any, dict[str, Any], int, int]) -> None:
    config_class, model_class, changes, num_norms, num_mlps = case
    model = build(config_class, model_class, **changes)
    ids = torch.randint(61, (1, 9))
    expected = model(ids).logits
    fuse(model)
    assert (count(model, FusedRMSNorm), count(model, FusedGatedMLP)) == (num_norms, num_mlps)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


class CenteredNorm(nn.Module):
    """Looks like RMSNorm and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(24))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (24,), self.weight, eps=self.eps)


def test_what_only_looks_like_it_stays() -> None:
    model = nn.Sequential(CenteredNorm(), nn.LayerNorm(24))
    assert not fuse(model)
    assert isinstance(model[0], CenteredNorm)


ATTENTION = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, 2),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}, 2),  # biases
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, 2),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"attn_logit_softcapping": 5.0}, 2),
    "stablelm": (StableLmConfig, StableLmForCausalLM, {"partial_rotary_factor": 0.5}, 2),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}, 0),  # norms of all heads together
    "cohere": (CohereConfig, CohereForCausalLM, {}, 0),  # turns neighbours, not halves
}


class TurningEcho(Echo):
    """Answers that depend on query and key, turned."""

    def attend(self, module: nn.Module, query: Any, key: Any, value: Any, options: Any) -> Any:
        if options.rope is not None:
            query, key = (naive.rope(x, *options.rope) for x in (query, key))
        weight = (query * key.repeat_interleave(query.shape[1] // key.shape[1], 1)).sum(-1, keepdim=True)
        angle = (query[:1] * query).sum(-1, keepdim=True)
        return super().attend(module, query, key, value, options) * (weight + angle) * options.scale


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
@torch.inference_mode()
def test_swapped_attention_gives_the_same_logits(case: tuple[Any, Any, dict[str, Any], int]) -> None:
    attention.register()
    config_class, model_class, changes, num_swapped = case
    model = build(config_class, model_class, **changes, attn_implementation=attention.NAME)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            nn.init.normal_(parameter, std=0.5)
    attention.Relay(model)
    call = {
        "input_ids": torch.randint(61, (1, 9)),
        "position_ids": torch.randint(900, (1, 9)),
        "use_cache": False,
        "baton_batch": TurningEcho(),
    }
    expected = model(**call).logits
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fuse_attention(model) == num_swapped
    assert sum(isinstance(m.forward, FusedAttention) for m in model.modules()) == num_swapped
    torch.testing.assert_close(model(**call).logits, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


@torch.inference_mode()
def test_no_row_is_a_number_of_rows() -> None:
    model = build(LlamaConfig, LlamaForCausalLM)
    fuse(model)
    layer = model.model.layers[0]
    x = torch.zeros(1, 0, 24)
    assert layer.mlp(layer.input_layernorm(x)).shape == x.shape
