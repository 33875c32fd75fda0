"""Modules of real models swapped for the kernels: what is swapped, what stays, and the same logits."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

pytest.importorskip("triton", reason="the kernels need Triton")

from baton.model.triton_fuse import FusedGatedMLP, FusedRMSNorm, fuse

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
    model = model_class(config_class(**SHAPE, **changes)).eval()
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
