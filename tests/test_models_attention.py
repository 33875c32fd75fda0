"""What models ask of attention besides softmax(q k^T) v, against plain definitions in float64, and how it is found out
what they ask for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from baton.errors import ConfigError
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.storage import KVStorage
from baton.model import loader
from baton.model.attention import Relay, paged_attention
from baton.model.layers import LayerSpec, kv_layout, layer_windows, learn_layers
from baton_kernels import naive, planned

BLOCK = 4
WINDOWS = [None, naive.Window(1), naive.Window(5), naive.Window(64), naive.Window(6, chunked=True)]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, first: int, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One query token [H, Dk] over the positions from `first` of key [C, Hkv, Dk] and value [C, Hkv, Dv]."""
    group = query.shape[0] // key.shape[1]
    key, value = (x[first:].double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("hd,chd->hc", query.double(), key) * 0.4
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None]
    return torch.einsum("hc,chd->hd", weights / total, value)


def _first(window: naive.Window | None, position: int) -> int:
    if window is None:
        return 0
    if window.chunked:
        return position - position % window.size
    return max(0, position - window.size + 1)


@pytest.mark.parametrize("window", WINDOWS, ids=["full", "itself", "sliding", "wide", "chunked"])
@pytest.mark.parametrize(
    ("softcap", "has_sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)], ids=str
)
def test_paged_attention_is_its_definition(
    window: naive.Window | None, softcap: float | None, has_sinks: bool
) -> None:
    """K and V of different size, two KV heads, blocks in any order, NaN wherever nothing was written."""
    torch.manual_seed(0)
    layout = KVLayout(BLOCK, (LayerLayout(2, 6, 5),), "float32", 4)
    k_cache, v_cache = KVStorage(layout, 20, fill_nan=True).layer_views(0)
    lengths, sinks = [1, 4, 9, 23], torch.randn(6) if has_sinks else None
    tables, free = torch.zeros(len(lengths), 6, dtype=torch.int64), torch.randperm(20)
    keys, values = ([torch.randn(n, 2, dim) for n in lengths] for dim in (6, 5))
    for row, length in enumerate(lengths):
        count = -(-length // BLOCK)
        tables[row, :count], free = free[:count], free[count:]
        index = torch.arange(length)
        where = naive.Positions(tables[row][index // BLOCK], index % BLOCK)
        naive.write_kv(keys[row], values[row], k_cache, v_cache, where)

    query = torch.randn(len(lengths), 6, 6)
    plan = planned.plan_decode(tables, torch.tensor(lengths), 23, BLOCK, torch.float32, window)
    out = planned.paged_decode_attention(query, k_cache, v_cache, plan, 0.4, softcap=softcap, sinks=sinks)
    for row, length in enumerate(lengths):
        first = _first(window, length - 1)
        expected = _attend(query[row], keys[row], values[row], first, softcap, sinks)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)

    for start in (0, 3, 12, 22):
        query = torch.randn(23 - start, 6, 6)
        chunk = planned.plan_prefill(tables[3], start, 23 - start, BLOCK, window)
        out = planned.paged_prefill_attention(
            query, k_cache, v_cache, chunk, 0.4, softcap=softcap, sinks=sinks
        )
        for i in range(23 - start):
            seen, first = slice(start + i + 1), _first(window, start + i)
            expected = _attend(query[i], keys[3][seen], values[3][seen], first, softcap, sinks)
            torch.testing.assert_close(out[i].double(), expected, rtol=1e-4, atol=1e-5)


# --- windows ---------------------------------------------------------------------------------------------


def _config(**values: Any) -> Any:
    return SimpleNamespace(num_hidden_layers=2, **values)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (_config(), (None, None)),
        (_config(sliding_window=8), (naive.Window(8), naive.Window(8))),
        (_config(sliding_window=8, layer_types=["full_attention", "sliding_attention"]), (None, naive.Window(8))),
        (_config(attention_chunk_size=8, layer_types=["chunked_attention"] * 2), (naive.Window(8, True),) * 2),
        (_config(attention_chunk_size=8), (None, None)),
        (_config(sliding_window=100), (None, None)),
    ],
    ids=["none", "all", "some", "chunks", "chunks-unused", "longer-than-any-sequence"],
)  # fmt: skip
def test_windows_are_those_of_the_config(config: Any, windows: tuple[naive.Window | None, ...]) -> None:
    assert layer_windows(config, 100) == windows


# --- what a model asks for -------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Calls the attention as transformers' modelling code does."""

    def __init__(self, layer_idx: int | None, **options: Any) -> None:
        super().__init__()
        self.layer_idx, self.options = layer_idx, options

    def forward(self, x: Tensor, kv: Tensor, **kwargs: Any) -> Tensor:
        out, _ = paged_attention(self, x, kv, kv, None, **{**kwargs, **self.options})
        return out


class _Model(nn.Module):
    def __init__(self, layers: list[nn.Module], shares: bool = False) -> None:
        super().__init__()
        self.layers, self.weight, self.shares = nn.ModuleList(layers), nn.Parameter(torch.ones(1)), shares

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, **kwargs: Any) -> None:
        kv = torch.zeros(1, 2, 2, 8)
        for layer in self.layers:
            layer(torch.zeros(1, 4, 2, 8), kv if self.shares else kv.clone(), **kwargs)


def _learn(*layers: nn.Module, shares: bool = False, **config: Any) -> tuple[LayerSpec, ...]:
    return learn_layers(_Model(list(layers), shares), _config(**config), 100)


def test_a_layer_that_gets_the_kv_of_another_keeps_none() -> None:
    own = _learn(_Attention(0), _Attention(1))
    assert [(spec.kv, spec.writes) for spec in own] == [(0, True), (1, True)]
    shared = _learn(_Attention(0), _Attention(1), shares=True)
    assert [(spec.kv, spec.writes) for spec in shared] == [(0, True), (0, False)]
    assert kv_layout(shared, 4, "float32").layers == (LayerLayout(2, 8, 8),)


@pytest.mark.parametrize(
    ("layers", "config", "reason"),
    [
        ([_Attention(0)], {}, "1 of its 2 layers"),
        ([_Attention(0), _Attention(0)], {}, "more than once"),
        ([_Attention(0), _Attention(None)], {}, "which layer it is"),
        ([_Attention(0), _Attention(2)], {}, "which layer it is"),
        ([_Attention(0, position_bias=torch.zeros(1)), _Attention(1)], {}, "asks for position_bias"),
        ([_Attention(0, is_causal=False), _Attention(1)], {}, "come later"),
        ([_Attention(0, baton_batch=None), _Attention(1)], {}, "does not hand arguments on"),
        ([_Attention(0, sliding_window=8), _Attention(1)], {}, "window of 8"),
        ([_Attention(0, sliding_window=8), _Attention(1)], {"sliding_window": 9}, "window of 8"),
        ([_Attention(0), _Attention(1)], {"layer_types": ["mamba", "full_attention"]}, "type mamba"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_what_attention_does_not_know_is_refused(
    layers: list[nn.Module], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        _learn(*layers, **config)


def test_a_model_that_hands_no_arguments_down_finds_the_step_all_the_same() -> None:
    layers: list[nn.Module] = [_Attention(0, baton_batch=None), _Attention(1, baton_batch=None)]
    model = _Model(layers)
    Relay(model)
    assert len(learn_layers(model, _config(), 100)) == 2


def test_harmless_arguments_are_accepted() -> None:
    options = {"dropout": 0.0, "is_causal": True, "position_bias": None, "sliding_window": 100}
    assert len(_learn(_Attention(0, **options), _Attention(1, sliding_window=None))) == 2


# --- latent KV -------------------------------------------------------------------------------------------


def test_the_pool_holds_the_latent_only(tmp_path: Path) -> None:
    """A sixteenth of what all heads would take, here; that the answers are right is shown by the survey."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "v_head_dim": 20}
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 20}
    tokens = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model("deepseek_v3", **shape, **heads, **latent, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config = loader.load_config(tmp_path)
    model = loader.load_model(tmp_path, config, "float32", torch.device("cpu"))
    layout = kv_layout(loader.learn_layers(model, config, 128), 16, "float32")
    assert layout.layers == (LayerLayout(1, 16 + 8, 0),) * 2
