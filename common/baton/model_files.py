"""Where a model's files are. Torch-free: the router needs the tokenizer of a model, not its weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.demo_task import DEMO_MODEL_DIR
from baton.errors import ConfigError

DEMO = "demo"
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_DATA_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = (*CONFIG_FILES, *TOKENIZER_DATA_FILES, "*.jinja")
WEIGHT_FILES = (*CONFIG_FILES, "model*.safetensors", "model.safetensors.index.json")


def resolve_model(name: str, revision: str | None = None, files: Sequence[str] = WEIGHT_FILES) -> Path:
    """The directory of a model named by a directory, a Hugging Face hub id or "demo". Raises ConfigError.

    Of a hub model the files that match `files` are downloaded, unless they are in the local cache already.
    """
    directory = DEMO_MODEL_DIR if name == DEMO else Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ConfigError(f"{directory} holds no Hugging Face model: config.json is missing")
        return directory
    if name == DEMO or _is_path(name):
        raise ConfigError(f"model directory {directory} does not exist")
    return _download(name, revision, files)


def read_json(path: Path) -> dict[str, Any]:
    """{} when there is no such file. Raises ConfigError when it is not a JSON object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json has the last word, as in transformers."""
    for name in reversed(CONFIG_FILES):
        eos = read_json(directory / name).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model, in the order of their names. Raises ConfigError."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map")
        if any(Path(name).name != name for name in weight_map.values()):
            raise ConfigError(f"{index} names files outside of {directory}")
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / "model.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    if not missing:
        return files
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise ConfigError(
            f"{directory} has weights in pickle format only, which can run code when opened: convert them to "
            "safetensors"
        )
    raise ConfigError(f"{directory} lacks weights: {', '.join(missing)} not found")


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except HFValidationError:
        raise ConfigError(f"model {name!r} is neither a directory here nor a Hugging Face hub id") from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"model {name!r} is no directory here, not in the local cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {name!r} cannot be had from the Hugging Face hub: {reason}") from None
