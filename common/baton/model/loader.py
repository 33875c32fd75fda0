"""From a model directory to modules that run our attention; refuses what would be wrong, by name and reason.

Weights come from safetensors only: other formats can run code when they are opened. Custom modelling code of
a checkpoint is never run either.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from baton.errors import ConfigError
from baton.kv.storage import DTYPES
from baton.model import attention, layers
from baton.model.mla import keep_latents
from baton.model.support import installed_survey, installed_version
from baton.model_files import read_json, weight_files

_log = logging.getLogger(__name__)

# The rotation of a position depends on the longest sequence of the batch, so its KV is nobody else's.
_STATEFUL_ROPE = "dynamic"

# The same, but only for sequences longer than those that the model was first trained on.
_TWO_RANGES_ROPE = "longrope"

HAS_ENCODER = "it has an encoder"
STATEFUL = "it has layers with a state of their own instead of KV"

# What configs call the number of positions.
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
)

# Buffers that old checkpoints carry and that the model computes itself.
_HARMLESS_EXTRA = ("rotary_emb.inv_freq",)


def load_config(directory: Path, *, surveyed: bool = True) -> Any:
    """transformers' PretrainedConfig of a supported model. `surveyed`: only types that passed the survey; the
    other guards hold in any case. Raises ConfigError."""
    from transformers import AutoConfig

    path = directory / "config.json"
    model_type = read_json(path).get("model_type")
    if surveyed and isinstance(model_type, str) and (reason := _why_not(model_type)):
        raise _refusal(model_type, reason)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' configs check themselves and raise whatever they like
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    if reason := _unsupported(config):
        raise _refusal(config.model_type, reason)
    return config


def model_length(config: Any, wanted: int | None) -> int:
    """max_model_len: what the user wants, within what the model's positions allow. Raises ConfigError."""
    text = config.get_text_config(decoder=True)
    named = [getattr(text, name, None) for name in _LENGTHS]
    lengths = [length for length in named if isinstance(length, int) and length > 0]
    possible, reason = (lengths[0], "has positions for") if lengths else (None, "")
    for rope in _ropes(text):
        if rope.get("rope_type") == _TWO_RANGES_ROPE:
            possible = min(_first_range(text, rope), possible or _first_range(text, rope))
            reason = "has RoPE scaling 'longrope', whose two ranges cannot share KV, and its first range has"
    if possible is None:
        if wanted is None:
            raise ConfigError("the model does not say how long its sequences may be: use --max-model-len")
        return wanted
    if wanted is not None and wanted > possible:
        raise ConfigError(f"max_model_len {wanted} is too long: the model {reason} {possible} tokens")
    return possible if wanted is None else wanted


def resolve_device(name: str) -> torch.device:
    """auto is the GPU where there is one. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device cuda is not there: no GPU that this build of torch can use")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def resolve_dtype(config: Any, name: str, device: torch.device) -> str:
    """auto is the checkpoint's dtype, and float32 on the CPU."""
    if name != "auto":
        return name
    names = {dtype: known for known, dtype in DTYPES.items()}
    return "float32" if device.type == "cpu" else names.get(config.dtype, "bfloat16")


def load_model(directory: Path, config: Any, dtype: str, device: torch.device) -> nn.Module:
    """In evaluation mode, on `device`, with our attention. Raises ConfigError."""
    from transformers import AutoModelForCausalLM

    weight_files(directory)
    attention.register()
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation=attention.NAME,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # listed for us with their names, instead of raised
                output_loading_info=True,
            )
    except KeyError as error:
        if error.args != (attention.NAME,):
            raise ConfigError(f"the weights in {directory} cannot be loaded: {error!r}") from error
        raise _refusal(config.model_type, "its attention cannot be replaced") from error
    except (
        Exception
    ) as error:  # safetensors, torch and transformers raise whatever they like for a broken file
        raise ConfigError(f"the weights in {directory} cannot be loaded: {_first_line(error)}") from error
    model: nn.Module = loaded[0]
    if getattr(model, "_is_stateful", False):
        raise _refusal(config.model_type, STATEFUL)
    _check_weights(directory, loaded[1])
    model = model.to(device).eval().requires_grad_(False)
    keep_latents(model)
    attention.Relay(model)
    return model


def learn_layers(model: nn.Module, config: Any, max_model_len: int) -> tuple[layers.LayerSpec, ...]:
    """What the layers of a loaded model ask for. Raises ConfigError for what would give wrong answers."""
    try:
        return layers.learn_layers(model, config.get_text_config(decoder=True), max_model_len)
    except ConfigError as error:
        raise _refusal(config.model_type, error.message) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no tables: what is wrong with a checkpoint is said once, by us."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


def _why_not(model_type: str) -> str | None:
    survey = installed_survey()
    if survey.transformers != installed_version():
        _log.warning(
            "transformers %s was not surveyed: going by %s", installed_version(), survey.transformers
        )
    return survey.why_not(model_type)


def _refusal(model_type: str, reason: str) -> ConfigError:
    return ConfigError(f"model type {model_type!r} is not supported: {reason}")


def _unsupported(config: Any) -> str | None:
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised"
    text = config.get_text_config(decoder=True)
    if any(rope.get("rope_type") == _STATEFUL_ROPE for rope in _ropes(text)):
        return "its RoPE scaling 'dynamic' makes the KV of a prompt depend on its neighbours in the batch"
    if getattr(text, "is_encoder_decoder", False):
        return HAS_ENCODER
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of all kinds of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _first_range(config: Any, rope: dict[str, Any]) -> int:
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)


def _check_weights(directory: Path, info: dict[str, Any]) -> None:
    extra = [key for key in info["unexpected_keys"] if not key.endswith(_HARMLESS_EXTRA)]
    problems = {
        "are missing": sorted(info["missing_keys"]),
        "have another shape than config.json says": sorted(key for key, *_ in info["mismatched_keys"]),
        "have no place in the model that config.json describes": sorted(extra),
    }
    for problem, keys in problems.items():
        if keys:
            names = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
            raise ConfigError(f"{len(keys)} weights in {directory} {problem}: {names}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
