"""Swapped modules give the output of those whose place they take; what only looks alike is left alone."""

import gc
import random
import weakref

import pytest
import torch
from reference import KINDS, load_reference, make_model
from torch import Tensor, nn

from baton.demo_task import recall_prompt
from baton.errors import ConfigError
from baton.llm import LLM
from baton.model import packed
from baton.model.fuse import fuse
from baton.model.packed import MkldnnPacker, NativeLinear, PackedEmbedding, agrees, packer_for
from baton.request import SamplingParams
from baton_kernels.native import Native

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


class MLP(nn.Module):
    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 68, bias=False), nn.Linear(32, 68, bias=False)
        self.down_proj = nn.Linear(68, 32)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class SwappedMLP(MLP):
    """Holds what the usual one holds."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
        return out


class RMSNorm(nn.Module):
    def __init__(self, eps: float = 1e-6, power: float = -0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32))
        self.eps, self.power = eps, power

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps) ** self.power
        return self.weight * normed.to(x.dtype)


class EpsOutside(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        # In another order, and twice, and of another input.
        v, k, q = self.v_proj(x), self.k_proj(x), self.q_proj(x)
        return torch.cat((q, k, v, self.k_proj(2 * x), self.v_proj(x)), -1)


class Model(nn.Module):
    def __init__(self, *modules: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleList(modules)
        self.to(dtype).eval().requires_grad_(False)


def _check(module: nn.Module, dtype: torch.dtype, ops: Native | None, scale: float = 1.0) -> nn.Module:
    """Fuses it and compares; returns what is in its place."""
    model = Model(module, dtype=dtype)
    x = (torch.randn(1, 5, 32) * scale).to(dtype)
    expected = module(x)
    fuse(model, ops)
    with torch.inference_mode():
        out = model.inner[0](x)
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    return model.inner[0]


@DTYPES
def test_what_is_recognised_is_swapped(ops: Native, dtype: torch.dtype) -> None:
    assert type(_check(MLP(nn.SiLU()), dtype, ops)) is not MLP
    assert type(_check(RMSNorm(), dtype, ops)) is not RMSNorm
    assert type(_check(RMSNorm(eps=1e-3), dtype, ops, scale=0.01)) is not RMSNorm
    assert type(_check(nn.Linear(32, 48), dtype, ops)) is NativeLinear
    assert type(_check(Attention(), dtype, ops).q_proj) is packed.MergedPart


def test_what_only_looks_alike_is_left_alone(ops: Native) -> None:
    assert type(_check(MLP(nn.GELU()), torch.float32, ops)) is MLP
    assert type(_check(SwappedMLP(nn.SiLU()), torch.float32, ops)) is SwappedMLP
    assert type(_check(EpsOutside(), torch.float32, ops)) is EpsOutside
    assert type(_check(RMSNorm(power=-0.4), torch.float32, ops)) is RMSNorm

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert type(_check(Doubled(32, 48), torch.float32, ops)) is Doubled


def test_there_is_no_second_copy(ops: Native) -> None:
    embedding, head = nn.Embedding(100, 32), nn.Linear(32, 100, bias=False)
    head.weight = embedding.weight
    model = Model(embedding, head, MLP(nn.SiLU()), Attention(), dtype=torch.float32)
    ids, x = torch.tensor([[0, 63, 64, 99]]), torch.randn(1, 3, 32)
    expected = embedding(ids), head(x)
    weights = [weakref.ref(p) for module in model.modules() for p in module.parameters() if p.dim() == 2]
    del embedding, head
    fuse(model, ops)
    gc.collect()
    assert not [ref for ref in weights if ref() is not None]
    assert type(model.inner[0]) is PackedEmbedding
    assert torch.equal(model.inner[0](ids), expected[0])
    torch.testing.assert_close(model.inner[1](x), expected[1])
    assert torch.equal(model.inner[1].weight[63], expected[0][0, 1])


@DTYPES
def test_onednn_packs_where_there_are_no_native_ops(dtype: torch.dtype) -> None:
    assert isinstance(packer_for(None, dtype), MkldnnPacker)
    weight, bias = torch.randn(48, 32, dtype=dtype), torch.randn(48, dtype=dtype)
    made = MkldnnPacker().pack(weight, bias)
    assert made is not None and agrees(made, weight, bias)
    assert not agrees(made, weight * 1.1, bias)
    assert torch.equal(made.weight, weight)  # type: ignore[arg-type]
    _check(Attention(), dtype, None)


def test_plain_torch_where_nothing_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_mkldnn_works", lambda _: False)
    assert type(_check(nn.Linear(32, 48), torch.float32, None)) is nn.Linear


def test_int8_spares_the_output_layer_and_the_choice_of_experts(ops: Native) -> None:
    model = Model(
        nn.Linear(320, 16), nn.Linear(32, 100), nn.Linear(32, 48), nn.Embedding(100, 32), dtype=torch.float32
    )
    fuse(model, ops, int8=True)
    dtypes = [linear.packed.dtype for linear in model.inner if isinstance(linear, NativeLinear)]
    assert dtypes == [torch.float32, torch.float32, torch.int8]


def test_int8_needs_native_ops() -> None:
    with pytest.raises(ConfigError, match="int8 needs native ops"):
        fuse(Model(nn.Linear(8, 8), dtype=torch.float32), None, int8=True)
    with pytest.raises(ConfigError, match="int8 runs on the native CPU ops only"):
        LLM("demo", quantization="int8", native_ops=False)


def test_the_demo_model_recalls_in_int8(ops: Native) -> None:
    if not ops.supports(torch.int8):
        pytest.skip("this CPU has no VNNI")
    rng = random.Random(0)
    tasks = [recall_prompt(rng, 10) for _ in range(40)]
    prompts = [f"<bos><|user|>{question}<|assistant|>" for question, _ in tasks]
    with LLM("demo", quantization="int8") as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0))
    right = sum(output.text.strip() == answer for output, (_, answer) in zip(outputs, tasks, strict=True))
    assert right >= 38


@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen3"])
def test_whole_models(ops: Native, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert kind in KINDS
    model = load_reference(make_model(kind, tmp_path_factory.mktemp(kind)))
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        fuse(model, ops)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    left = {type(module).__name__ for module in model.modules()}
    assert not left & {"Linear", "LlamaMLP", "Qwen3MLP", "LlamaRMSNorm", "Qwen3RMSNorm"}
