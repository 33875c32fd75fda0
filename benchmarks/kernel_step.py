"""A whole decode step as the engine runs it on a GPU: transformers' Llama with random weights, Baton's attention on
the kernels, fused modules, one CUDA graph."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from baton.model import attention
from baton.model.attention import Chunk, PagedLayer
from baton.model.graphs import GraphedModel, cuda_capture
from baton.model.triton_attention import fuse_attention
from baton.model.triton_fuse import fuse
from baton.model.triton_step import TritonPlanner


def make_model(s: Any) -> nn.Module:
    """s: see kernel_cases.Shapes."""
    attention.register()
    config = LlamaConfig(
        hidden_size=s.hidden,
        intermediate_size=s.mlp,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.dim,
        vocab_size=s.vocab,
    )
    with torch.device(s.device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=s.dtype, attn_implementation=attention.NAME
        )
    model.eval().requires_grad_(False)
    fuse(model)
    fuse_attention(model)
    return model


class DecodeStep:
    """`run` computes it launch by launch, `replay` from its graph; both give the logits [num_seqs, V]."""

    def __init__(self, s: Any, model: nn.Module, num_seqs: int, context_len: int) -> None:
        per_seq = -(-context_len // s.block_size)
        shape = num_seqs * per_seq, s.block_size, s.kv_heads, s.dim
        layers = tuple(PagedLayer(i, s.randn(*shape), s.randn(*shape), None, True) for i in range(s.layers))
        on_gpu = s.device == "cuda"
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 132
        self._model = model
        self._graphed = GraphedModel(
            model,
            layers,
            cuda_capture() if on_gpu else lambda run: run,
            num_sms=num_sms,
            max_num_seqs=num_seqs,
            max_num_blocks=per_seq,
        )
        tables = torch.randperm(num_seqs * per_seq).view(num_seqs, per_seq)
        positions = torch.full((num_seqs,), context_len - 1, device=s.device)
        self._step = TritonPlanner(layers, s.block_size, num_sms).plan(
            [Chunk(context_len - 1, 1, table) for table in tables.tolist()],
            positions,
            tables[:, -1].to(s.device),
        )
        self._inputs = {
            "input_ids": torch.randint(s.vocab, (1, num_seqs), device=s.device),
            "position_ids": positions[None],
            "use_cache": False,
            "logits_to_keep": torch.arange(num_seqs, device=s.device),
            "baton_batch": self._step,
        }
        read = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
        cached = 2 * s.layers * num_seqs * context_len * s.kv_heads * s.dim
        self.num_bytes = s.dtype.itemsize * (read + cached)

    @torch.inference_mode()
    def run(self) -> Tensor:
        logits: Tensor = self._model(**self._inputs).logits[0]
        return logits

    @torch.inference_mode()
    def replay(self) -> Tensor:
        logits: Tensor = self._graphed(**self._inputs).logits[0]
        return logits
