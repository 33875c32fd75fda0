"""What is loaded is what the checkpoint says; everything that would be wrong is refused in one line."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import make_model
from safetensors.torch import load_file, save_file

from baton.config import EngineConfig, ModelConfig
from baton.engine.model_runner import load_runner
from baton.errors import ConfigError
from baton.kv.layout import KVLayout
from baton.messages import Compatibility
from baton.model import identity, layers, loader
from baton.model_files import eos_token_ids, resolve_model
from baton_kernels import naive

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("gqa", tmp_path_factory.mktemp("models") / "gqa")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def _load(directory: Path, **model: Any) -> object:
    return load_runner(ModelConfig(str(directory), **model), EngineConfig(num_blocks=8))


def _refused(directory: Path, **model: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(directory, **model)
    assert "\n" not in caught.value.message
    return caught.value.message


def _compatibility(directory: Path, block_size: int = 16, dtype: str = "float32") -> Compatibility:
    layout = _layout(directory, block_size, dtype)
    return identity.compatibility(directory, loader.load_config(directory), layout, (2,))


def _fingerprint(directory: Path, block_size: int = 16, dtype: str = "float32") -> str:
    layout = _layout(directory, block_size, dtype)
    return identity.fingerprint(_compatibility(directory, block_size, dtype), layout)


def _layout(directory: Path, block_size: int, dtype: str) -> KVLayout:
    config = loader.load_config(directory)
    model = loader.load_model(directory, config, dtype, CPU)
    return layers.kv_layout(loader.learn_layers(model, config, 2048), block_size, dtype)


# --- where a model is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/dir", "./nowhere", "../x", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_directory_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model directory .* does not exist"):
        resolve_model(name)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["not a name", "x" * 200])
def test_what_is_neither_a_directory_nor_a_hub_id_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory here nor a Hugging Face hub id"):
        resolve_model(name)


def test_an_unreachable_hub_is_one_clear_line(tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its settings when it is imported."""
    code = (
        "from baton.model_files import resolve_model\n"
        "from baton.errors import ConfigError\n"
        "try: resolve_model('someone/some-model')\n"
        "except ConfigError as error: print(error.message)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "not in the local cache" in result.stdout and result.stdout.count("\n") == 1


def test_finding_a_model_needs_no_torch() -> None:
    code = "import sys, baton.model_files; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [(2, None, (2,)), ([2, 3], None, (2, 3)), (2, [5, 6], (5, 6)), (None, 0, (0,)), (None, None, ())],
)
def test_generation_config_has_the_last_word_on_eos(
    tmp_path: Path, config: object, generation: object, eos: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert eos_token_ids(tmp_path) == eos


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "'bloom' is not supported"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "'mamba' is not supported"),
        ({"model_type": "never_heard_of"}, "never_heard_of"),
        ({"model_type": None}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "neighbours in the batch"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_size": 128}, "another shape"),
        ({"num_hidden_layers": 3}, r"9 weights in .* are missing: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, "have no place in the model"),
        ({"tie_word_embeddings": True, "attention_bias": True}, "are missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(copy: Path, changes: dict[str, Any], reason: str) -> None:
    _edit_config(copy, **changes)
    message = _refused(copy)
    assert re.search(reason, message), message


def test_broken_files_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in _refused(copy)
    weights.unlink()
    assert "lacks weights: model.safetensors not found" in _refused(copy)
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    assert "pickle" in _refused(copy)
    (copy / "config.json").write_text("{")
    assert "config.json" in _refused(copy)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = make_model("sharded", tmp_path)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    _load(directory)
    shards[1].unlink()
    assert shards[1].name in _refused(directory)


def test_a_weight_that_the_model_does_not_know_is_refused(copy: Path) -> None:
    """A bias that config.json does not mention would be dropped, and the answers would be wrong."""
    bias = torch.zeros(64)
    _edit_weights(copy, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": bias}))
    assert "q_proj.bias" in _refused(copy)


def test_rotary_buffers_of_old_checkpoints_are_harmless(copy: Path) -> None:
    frequencies = torch.zeros(8)
    _edit_weights(
        copy, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})
    )
    _load(copy)


@pytest.mark.parametrize(("wanted", "possible"), [(None, 2048), (100, 100), (2048, 2048)])
def test_max_model_len_is_what_the_positions_allow(
    checkpoint: Path, wanted: int | None, possible: int
) -> None:
    assert loader.model_length(loader.load_config(checkpoint), wanted) == possible


def test_a_longer_max_model_len_is_refused(checkpoint: Path) -> None:
    assert "positions for 2048 tokens" in _refused(checkpoint, max_model_len=2049)


def test_longrope_is_served_in_its_first_range(copy: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 128, **factors}
    _edit_config(copy, rope_parameters=rope)
    assert loader.model_length(loader.load_config(copy), None) == 128
    assert "longrope" in _refused(copy, max_model_len=129)
    _load(copy, max_model_len=128)


def test_windows_come_from_the_config(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    kinds = ["full_attention", "sliding_attention"]
    _edit_config(directory, sliding_window=24, use_sliding_window=True, layer_types=kinds)
    config = loader.load_config(directory)
    assert layers.layer_windows(config, 2048) == (None, naive.Window(24))
    assert layers.layer_windows(config, 24) == (None, None)
    _edit_config(directory, layer_types=["full_attention", "linear_attention"])
    assert "layers of type linear_attention" in _refused(directory)


def test_a_pool_without_room_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="room for 0 of at least 2 blocks"):
        load_runner(ModelConfig(str(checkpoint)), EngineConfig(kv_cache_bytes=1000))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        loader.resolve_device("cuda")
    assert loader.resolve_device("auto") == CPU


# --- layout and fingerprint ------------------------------------------------------------------------------


def test_the_layout_is_the_models(checkpoint: Path, tmp_path: Path) -> None:
    layout = _layout(checkpoint, 16, "bfloat16")
    assert (
        layout.describe() == "16:bfloat16:2x16/16;2x16/16" and layout.block_bytes == 2 * 2 * 16 * 2 * 16 * 2
    )
    other = _layout(make_model("head-dim", tmp_path), 8, "float32")
    assert other.describe() == "8:float32:2x24/24;2x24/24;2x24/24"


def test_dtype_auto_is_float32_on_the_cpu(checkpoint: Path) -> None:
    config = loader.load_config(checkpoint)
    config.dtype = torch.float16
    assert loader.resolve_dtype(config, "auto", CPU) == "float32"
    assert loader.resolve_dtype(config, "auto", torch.device("cuda")) == "float16"
    assert loader.resolve_dtype(config, "bfloat16", CPU) == "bfloat16"


def test_the_fingerprint_covers_all_that_decides_the_kv(copy: Path) -> None:
    base = _fingerprint(copy)
    assert base == _fingerprint(copy) and len(base) == 32
    others = {"block_size": 32}, {"dtype": "bfloat16"}
    assert len({base, *(_fingerprint(copy, **other) for other in others)}) == 3
    _edit_weights(copy, lambda weights: weights["model.norm.weight"].mul_(1.001))
    changed = _fingerprint(copy)
    assert changed != base
    _edit_config(copy, rms_norm_eps=1e-4)
    assert _fingerprint(copy) not in (base, changed)


def test_what_two_workers_must_share_is_told_apart(copy: Path) -> None:
    base = _compatibility(copy)
    assert (base.rope, base.layers, base.dtype) == ("base 10000", "2 layers of 2 KV heads of 16", "float32")
    assert _compatibility(copy, 32, "bfloat16").identity == base.identity
    _edit_config(copy, transformers_version="9", use_cache=False)
    assert _compatibility(copy) == base
    _edit_config(copy, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    other_rope = _compatibility(copy)
    assert other_rope == replace(base, rope="base 500000") and other_rope.identity != base.identity
    (copy / "tokenizer.json").write_text("{}")
    assert _compatibility(copy).tokenizer != base.tokenizer


def test_the_digest_of_a_big_file_sees_its_header_length_and_samples(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(identity, "_SAMPLE_BYTES", 64)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    seen = {identity._digest([weights])}
    for position in (0, 63, len(content) - 1, len(content) - 64):
        content[position] ^= 1
        weights.write_bytes(content)
        seen.add(identity._digest([weights]))
    weights.write_bytes(content + b"x")
    seen.add(identity._digest([weights]))
    assert len(seen) == 6
