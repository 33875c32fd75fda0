"""What a worker's KV is made of, so that two workers can be compared and people be told what differs."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from baton.kv.layout import KVLayout
from baton.messages import Compatibility
from baton.model_files import TOKENIZER_DATA_FILES, read_json, weight_files

_WHOLE_FILE_BYTES = 2**30
_SAMPLE_BYTES = 2**20
_NUM_SAMPLES = 256

_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")

# What transformers writes into config.json without a meaning for the KV; the dtype is told apart.
_IRRELEVANT_KEYS = ("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype")


def compatibility(
    directory: Path, config: Any, layout: KVLayout, wire_versions: tuple[int, ...], arithmetic: str = ""
) -> Compatibility:
    """Of the model in that directory. Raises ConfigError."""
    return Compatibility(
        weights=_digest(weight_files(directory)),
        config=_config_digest(directory),
        tokenizer=_digest(_tokenizer_files(directory)),
        rope=describe_rope(config),
        layers=describe_layers(layout),
        revision=directory.name if directory.parent.name == "snapshots" else "",
        arithmetic=arithmetic,
        dtype=layout.dtype,
        num_shards=layout.num_shards,
        release=version("baton-llm"),
        wire_versions=wire_versions,
    )


def fingerprint(of: Compatibility, layout: KVLayout) -> str:
    """Equal on two workers when they compute and store the same KV bytes: the root of the names of prefix blocks."""
    return xxhash.xxh3_128(f"{of.identity}\x00{layout.describe()}".encode()).hexdigest()


def describe_layers(layout: KVLayout) -> str:
    """In words: "24 layers of 2 KV heads of 64"."""
    parts = []
    for layer, same in groupby(layout.layers):
        heads = layer.num_kv_heads * layout.num_shards
        dims = f"{layer.k_dim}" if layer.k_dim == layer.v_dim else f"{layer.k_dim}/{layer.v_dim}"
        parts.append(f"{len(list(same))} layers of {heads} KV heads of {dims}")
    return " + ".join(parts)


def describe_rope(config: Any) -> str:
    """In words: "base 500000", with whatever scales it."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in parameters.values()):  # one set for each kind of layers
        return ", ".join(f"{kind}: {_rope(each)}" for kind, each in sorted(parameters.items()) if each)
    return _rope(parameters) if parameters else "none"


def _rope(parameters: dict[str, Any]) -> str:
    others = sorted(parameters.keys() - {"rope_theta"})
    scaling = [
        f"{key} {parameters[key]}" for key in others if (key, parameters[key]) != ("rope_type", "default")
    ]
    return " ".join([f"base {parameters.get('rope_theta', 'unknown'):g}", *scaling])


def _config_digest(directory: Path) -> str:
    content = json.dumps(_relevant(read_json(directory / "config.json")), sort_keys=True)
    return xxhash.xxh3_128(content.encode()).hexdigest()


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _relevant(v) for k, v in value.items() if k not in _ROPE_KEYS + _IRRELEVANT_KEYS}
    return value


def _tokenizer_files(directory: Path) -> list[Path]:
    return sorted(path for pattern in TOKENIZER_DATA_FILES for path in directory.glob(pattern))


def _digest(paths: list[Path]) -> str:
    """Files up to 1 GiB count with all their bytes. Of larger ones the length, the first MiB (names, shapes and places
    of the tensors) and 256 evenly spaced MiB are taken, so that no worker reads a checkpoint twice to start."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.name}\x00{path.stat().st_size}\x00".encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        if num_bytes <= _WHOLE_FILE_BYTES:
            while piece := file.read(_SAMPLE_BYTES):
                yield piece
            return
        for sample in range(_NUM_SAMPLES + 1):
            file.seek((num_bytes - _SAMPLE_BYTES) * sample // _NUM_SAMPLES)
            yield file.read(_SAMPLE_BYTES)
