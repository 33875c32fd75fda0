"""The reference of all parity tests: small random models, and what transformers' own `generate` says about
them.

Two implementations of one model agree up to rounding, so where the two best logits of a step lie closer
together than that, either token is right. Prompts that come to such a step are dropped instead of widening
the comparison, and the tests check that only few are.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

VOCAB_SIZE = 211
MAX_MODEL_LEN = 2048
MIN_MARGIN = 1e-3

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.3,  # large, so that the answer depends on every token of the prompt
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rope(rope_type: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **parameters}}


_LLAMA3 = _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)

# kind -> (config class, model class, what differs from _SHAPE)
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gqa": (LlamaConfig, LlamaForCausalLM, {}),
    "mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "mqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "attention_bias": True}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "head-dim": (LlamaConfig, LlamaForCausalLM, {"head_dim": 24, "num_hidden_layers": 3}),
    "rope-llama3": (LlamaConfig, LlamaForCausalLM, _LLAMA3),
    "rope-linear": (LlamaConfig, LlamaForCausalLM, _rope("linear")),
    "rope-yarn": (LlamaConfig, LlamaForCausalLM, _rope("yarn", original_max_position_embeddings=512)),
    "sharded": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


@dataclass(frozen=True)
class Reference:
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]  # greedy
    margin: float  # the smallest distance between the two best logits of any step

    @property
    def clear(self) -> bool:
        return self.margin > MIN_MARGIN


def make_model(kind: str, directory: Path, seed: int = 0, **shape: Any) -> Path:
    """A random model in Hugging Face format; `kind` is one of KINDS."""
    logging.disable_progress_bar()
    config_class, model_class, changes = KINDS[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**_SHAPE, **changes, **shape}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero after initialisation, which would hide that they are forgotten
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory, max_shard_size="100KB" if kind == "sharded" else "1GB")
    return directory


def load_reference(directory: Path) -> Any:
    """The same model with transformers' own attention, float32."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config = (
        GenerationConfig()
    )  # else `generate` takes the checkpoint's EOS where we say none
    return model


def random_prompts(
    lengths: Sequence[int], seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab_size) for _ in range(length)) for length in lengths]


@torch.inference_mode()
def reference_generate(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Reference]:
    """Greedy, one prompt at a time, never stopping early."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    references = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        result = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        best = torch.stack(result.logits)[:, 0].topk(2).values  # [num_tokens, 2]
        margin = float((best[:, 0] - best[:, 1]).min())
        references.append(
            Reference(tuple(prompt), tuple(result.sequences[0, len(prompt) :].tolist()), margin)
        )
    return references
