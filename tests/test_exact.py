"""Bit-exact mode: a token's logits are the same bits alone, in any batch, in any chunks, behind a prefix hit, and over
KV that another engine computed."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    JetMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.model_runner import LoadedModel, TorchModelRunner, load_runner
from baton.errors import ConfigError
from baton.llm import LLM
from baton.model import exact
from baton.model.attention import Chunk, Options, PagedLayer
from baton.request import BlockId, RequestId, SamplingParams
from baton_kernels import naive

VOCAB_SIZE = 101
BLOCK = 8
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,  # no multiple of a vector, so that a row's elements fall on different lanes
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 24}),
    "gemma2": (Gemma2Config, {**_SLIDING, "query_pre_attn_scalar": 18}),
    "gemma3": (Gemma3TextConfig, {**_SLIDING, "query_pre_attn_scalar": 18}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (DeepseekV2Config, _LATENT),
    "deepseek_v3": (DeepseekV3Config, _LATENT),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two threads that wait for each other take many times as long on a machine that does something else, too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _make(family: str, directory: Path) -> Path:
    config_class, changes = FAMILIES[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_class(**{**_SHAPE, **changes})).save_pretrained(directory)
    return directory


def _load(directory: Path, **settings: Any) -> LoadedModel:
    engine = EngineConfig(block_size=BLOCK, num_blocks=96, **{"bit_exact": True, **settings})
    model = ModelConfig(str(directory), dtype="float32", max_model_len=96 * BLOCK)
    return load_runner(model, engine, fill_nan=True, surveyed=False)


class Probe:
    """A runner whose logits can be seen, and a pool whose blocks are given out at random."""

    def __init__(self, directory: Path, seed: int, **settings: Any) -> None:
        self.runner: TorchModelRunner = _load(directory, **settings).runner
        self.rng = random.Random(seed)
        self.free = self.rng.sample(range(96), 96)

    def table(self, num_tokens: int) -> tuple[BlockId, ...]:
        count = -(-num_tokens // BLOCK)
        taken, self.free = self.free[:count], self.free[count:]
        return tuple(map(BlockId, taken))

    def row(self, prompt: Sequence[int], start: int, end: int, table: tuple[BlockId, ...]) -> BatchRow:
        name = RequestId("r")
        return BatchRow(name, start, tuple(prompt[start:end]), table, end == len(prompt), SamplingParams())

    def logits(self, *rows: BatchRow) -> dict[int, Tensor]:
        with torch.inference_mode():
            inputs = self.runner._prepare(Batch(rows))
            logits = self.runner._forward(inputs)
        return dict(zip(inputs.sampled, logits, strict=True))

    def prefill(
        self, prompt: Sequence[int], table: tuple[BlockId, ...], chunk: int, start: int = 0
    ) -> Tensor:
        for begin in range(start, len(prompt), chunk):
            seen = self.logits(self.row(prompt, begin, min(begin + chunk, len(prompt)), table))
        return seen[0]

    def others(self, num_rows: int) -> list[BatchRow]:
        """Prompts, chunks and decodes of other sequences; what they build on is there."""
        rows = []
        for _ in range(num_rows):
            prompt = _prompt(self.rng, self.rng.randrange(1, 30))
            table = self.table(len(prompt))
            start = self.rng.choice([0, len(prompt) - 1, len(prompt) // 2])
            if start:
                self.logits(self.row(prompt, 0, start, table))
            rows.append(self.row(prompt, start, len(prompt), table))
        return rows

    def kv(self, table: tuple[BlockId, ...], num_tokens: int) -> Tensor:
        """The bits of K and V of a sequence's tokens."""
        index = torch.arange(num_tokens)
        blocks = torch.tensor(table)[index // BLOCK]
        layers = range(self.runner.storage.layout.num_layers)
        views = [view for layer in layers for view in self.runner.storage.layer_views(layer)]
        return torch.cat([view[blocks, index % BLOCK].flatten(1) for view in views], 1).view(torch.int32)


def _prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))


def _bits(logits: Tensor) -> list[int]:
    return logits.view(torch.int32).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(request.param, tmp_path_factory.mktemp(request.param))


def test_in_any_batch(directory: Path) -> None:
    prompt = _prompt(random.Random(1), 37)
    probe = Probe(directory, seed=0)
    alone = probe.table(len(prompt))
    expected = _bits(probe.prefill(prompt, alone, len(prompt)))
    free = probe.free
    for size in (2, 3, 9, 17):
        probe.free = free
        together, decoded = probe.table(len(prompt)), probe.table(len(prompt))
        others = probe.others(size - 1)
        place = probe.rng.randrange(size)
        rows = [*others[:place], probe.row(prompt, 0, len(prompt), together), *others[place:]]
        assert _bits(probe.logits(*rows)[place]) == expected
        assert torch.equal(probe.kv(alone, len(prompt)), probe.kv(together, len(prompt)))
        probe.logits(probe.row(prompt, 0, len(prompt) - 1, decoded))
        rows[place] = probe.row(prompt, len(prompt) - 1, len(prompt), decoded)
        assert _bits(probe.logits(*rows)[place]) == expected, "decoded instead of computed with the prompt"


def test_in_any_chunks_and_behind_a_prefix(directory: Path) -> None:
    prompt = _prompt(random.Random(2), 150)
    probe = Probe(directory, seed=0)
    whole = probe.table(len(prompt))
    expected = _bits(probe.prefill(prompt, whole, len(prompt)))
    for chunk in (7, 16, 64):
        table = probe.table(len(prompt))
        assert _bits(probe.prefill(prompt, table, chunk)) == expected
        assert torch.equal(probe.kv(table, len(prompt)), probe.kv(whole, len(prompt)))
        probe.free += table
    shared = 5 * BLOCK
    table = whole[: shared // BLOCK] + probe.table(len(prompt) - shared)
    assert _bits(probe.prefill(prompt, table, 33, start=shared)) == expected


def test_over_kv_from_another_engine(directory: Path) -> None:
    prompt = _prompt(random.Random(3), 61)
    here, there = Probe(directory, seed=1), Probe(directory, seed=2)
    local, source, destination = here.table(61), there.table(61), here.table(61)
    expected = _bits(here.prefill(prompt, local, 61))
    there.prefill(prompt[:-1], source, 16)
    for mine, theirs in zip(destination, source, strict=True):
        num_layers = here.runner.storage.layout.num_layers
        here.runner.storage.region(mine, 0, num_layers)[:] = there.runner.storage.region(
            theirs, 0, num_layers
        )
    [row] = here.logits(here.row(prompt, 60, 61, destination)).values()
    assert _bits(row) == expected


def test_plain_torch_would_not_pass(tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    prompt = _prompt(random.Random(2), 150)
    probe = Probe(_make("llama", tmp_path), seed=0, bit_exact=False, native_ops=False)
    expected = _bits(probe.prefill(prompt, probe.table(150), 150))
    assert any(_bits(probe.prefill(prompt, probe.table(150), chunk)) != expected for chunk in (7, 16, 64))


def test_it_is_the_same_model(directory: Path) -> None:
    """Up to rounding, what transformers computes."""
    prompt = _prompt(random.Random(4), 150)
    probe = Probe(directory, seed=0)
    found = probe.prefill(prompt, probe.table(150), 64)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        expected = model.eval()(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_a_model_whose_experts_mix_tokens_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    directory = tmp_path / "jetmoe"
    AutoModelForCausalLM.from_config(JetMoeConfig(**shape)).save_pretrained(directory)
    with pytest.raises(ConfigError, match="JetMoeForCausalLM cannot be bit-exact"):
        _load(directory)


@pytest.mark.parametrize(
    ("dtype", "device", "why"), [("bfloat16", "cpu", "float32"), ("float32", "cuda", "CPU")]
)
def test_other_arithmetic_is_refused(dtype: str, device: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        exact.check(dtype, torch.device(device))


def test_a_pair_of_which_one_is_exact_is_no_pair(tmp_path: Path) -> None:
    directory = _make("llama", tmp_path)
    assert _load(directory).fingerprint != _load(directory, bit_exact=False).fingerprint


@pytest.mark.parametrize(
    ("softcap", "with_sinks"), [(None, False), (5.0, False), (None, True), (3.0, True)], ids=str
)
@pytest.mark.parametrize("window", [None, naive.Window(30), naive.Window(64, chunked=True)], ids=str)
def test_attention_in_pieces_equals_its_definition(
    softcap: float | None, with_sinks: bool, window: naive.Window | None
) -> None:
    torch.manual_seed(0)
    num_tokens, num_blocks = 300, 38
    k_cache, v_cache = (torch.full((num_blocks, BLOCK, 2, dim), torch.nan) for dim in (6, 4))
    key, value = torch.randn(num_tokens, 2, 6), torch.randn(num_tokens, 2, 4)
    table = torch.randperm(num_blocks).tolist()
    index = torch.arange(num_tokens)
    where = naive.Positions(torch.tensor(table)[index // BLOCK], index % BLOCK)
    naive.write_kv(key, value, k_cache, v_cache, where)
    positions = torch.tensor([0, 1, 5, 31, 63, 64, 65, 127, 128, 129, 200, 255, 256, 270, 298, 299])
    layer = PagedLayer(0, k_cache, v_cache, window, True)
    chunks = [Chunk(position, 1, table) for position in positions.tolist()]
    step = exact.ExactPlanner((layer,), BLOCK).plan(chunks, positions, positions // BLOCK)
    [tile] = step.tiles()
    query, sinks = torch.randn(16, 4, 6), torch.randn(4) if with_sinks else None
    options = Options(0.4, None, softcap, sinks, {})
    found = exact.attend_in_pieces(query, k_cache, v_cache, tile.pieces[window], options)
    first = torch.zeros(16, dtype=torch.int64) if window is None else window.first(positions)
    visible = (index >= first[:, None]) & (index <= positions[:, None])
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    heads = (x.double().repeat_interleave(2, 1).transpose(0, 1) for x in (key, value))
    of_heads = None if sinks is None else sinks.double()[:, None]
    expected = naive.attention(query.double().transpose(0, 1), *heads, bias, 0.4, softcap, of_heads)
    torch.testing.assert_close(found.double(), expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_tokens_and_log_probabilities_of_the_engine(tmp_path: Path) -> None:
    """Alone, in a batch, in chunks, and after preemption, drawn with a temperature."""
    directory, rng = _make("llama", tmp_path), random.Random(5)
    prompts = [_prompt(rng, 9 + 7 * i) for i in range(6)]
    params = [
        SamplingParams(max_tokens=20, seed=i, temperature=1.2, top_p=0.95, logprobs=2) for i in range(6)
    ]
    answers = []
    for settings in (
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 13, "max_num_seqs": 6},
        {"num_blocks": 14},
    ):
        engine = {"num_blocks": 96, "block_size": BLOCK, "bit_exact": True, "enable_prefix_caching": False}
        with LLM(str(directory), dtype="float32", **{**engine, **settings}) as llm:
            outputs = llm.generate(prompts, params)
            assert ("num_blocks" in settings) == (llm.engine.pressure.num_preemptions > 0)
        answers.append([(output.token_ids, output.logprobs) for output in outputs])
    assert all(answer == answers[0] for answer in answers)
