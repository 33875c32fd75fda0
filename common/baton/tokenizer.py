"""A model's tokenizer and chat template, without torch or transformers, and with their results.

Reads tokenizer.json (what makes tokens of text), tokenizer_config.json and special_tokens_map.json (special
tokens), generation_config.json and config.json (end of sequence, vocabulary size) and the chat template.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers

from baton.chat_template import ChatTemplate, Message
from baton.clock import Clock, SystemClock
from baton.errors import ConfigError, InvalidRequest
from baton.model_files import eos_token_ids, read_json

# Longer texts may take a millisecond or more: off the event loop with them.
INLINE_CHARACTERS = 4096
MAX_THREADS = 4


class Tokenizer:
    """Immutable. Owns a few threads, which start with the first long text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        vocab_size: int | None = None,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        num_threads: int | None = None,
    ) -> None:
        """`vocab_size` is the model's, whose embedding may have more rows than the tokenizer has tokens.
        `num_threads` 0 keeps everything on the calling thread."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.vocab_size = vocab_size or backend.get_vocab_size()
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        if num_threads is None:
            num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, "tokenizer") if num_threads else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """With `add_special_tokens` as the model's post-processor has it, which is where BOS comes from."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _encode_without_gil(self, text: str, add_special_tokens: bool) -> list[int]:
        """Only batches let go of it. They go through the library's own threads, too far for a short text."""
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same; a long text keeps a thread busy instead of the event loop, one per core at a time."""
        if self._threads is None or len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_without_gil, text, add_special_tokens)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Raises InvalidRequest when the model has no chat template, or has one that refuses the messages."""
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions with a prompt", param="messages"
            )
        return self.chat_template.render(messages)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    async def encode_chat_async(self, messages: Sequence[Message]) -> list[int]:
        return await self.encode_async(self.render_chat(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def load_tokenizer(
    model_dir: Path, clock: Clock | None = None, *, num_threads: int | None = None
) -> Tokenizer:
    """Raises ConfigError where a file is missing or broken. `clock` tells templates the date."""
    config = read_json(model_dir / "tokenizer_config.json")
    special_tokens = _special_tokens(model_dir, config)
    backend = _load_backend(model_dir / "tokenizer.json")
    if _is_llama(model_dir, config, backend):
        _use_llama_steps(backend, config)
    _add_missing_tokens(backend, config, special_tokens)
    source = _chat_template(model_dir, config)
    bos = special_tokens.get("bos_token")
    return Tokenizer(
        backend,
        chat_template=None
        if source is None
        else ChatTemplate(source, special_tokens, clock or SystemClock()),
        vocab_size=_vocab_size(model_dir),
        bos_token_id=None if bos is None else backend.token_to_id(bos),
        eos_token_ids=eos_token_ids(model_dir) or _ids_of(backend, special_tokens.get("eos_token")),
        num_threads=num_threads,
    )


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist. Where a model has another kind of tokenizer file, "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes this one"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _is_llama(model_dir: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> bool:
    class_name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    is_byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
    model_type = read_json(model_dir / "config.json").get("model_type")
    return class_name == "LlamaTokenizer" and model_type == "llama" and not is_byte_level


def _use_llama_steps(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Transformers' LlamaTokenizer takes the vocabulary from tokenizer.json and the steps around it from its
    code. Those in older files put a space after every special token, which the models have not seen."""
    add_prefix_space = config.get("add_prefix_space") is not False
    scheme = "never" if not add_prefix_space else "always" if config.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    steps = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if add_prefix_space:
        steps.append(tokenizers.decoders.Strip(" ", left=1))
    backend.decoder = tokenizers.decoders.Sequence(steps)


def _special_tokens(model_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Names ("bos_token") to texts ("<s>"). Older directories have them in a file of their own."""
    named = dict(config)
    extra = config.get("extra_special_tokens")
    named.update(extra if isinstance(extra, dict) else {})
    if "added_tokens_decoder" not in config:
        named.update(read_json(model_dir / "special_tokens_map.json"))
    contents = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    return {name: content for name, content in contents.items() if content is not None}


def _content(token: object) -> str | None:
    """A token is written as its text or as an object with a `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Tokens that only tokenizer_config.json knows of; transformers adds them too, in this order."""
    known = list(backend.get_added_tokens_decoder().values())
    listed = config.get("added_tokens_decoder") or {}
    for token_id in sorted(listed, key=int):
        token = _added_token(listed[token_id])
        if repr(token) not in map(repr, known):  # also where only a flag differs
            backend.add_tokens([token])
            known.append(token)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    names = [*special_tokens.values(), *map(_content, extra if isinstance(extra, list) else ())]
    contents = {token.content for token in known}
    missing = [name for name in dict.fromkeys(names) if name and name not in contents]
    backend.add_special_tokens(missing)


def _added_token(fields: Mapping[str, Any]) -> tokenizers.AddedToken:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(**{name: fields[name] for name in names if name in fields})


def _ids_of(backend: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    token_id = None if token is None else backend.token_to_id(token)
    return () if token_id is None else (token_id,)


def _vocab_size(model_dir: Path) -> int | None:
    config = read_json(model_dir / "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def _chat_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own, else tokenizer_config.json, else the processor's older file; "default" of several."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(model_dir / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ConfigError(f"{model_dir} has several chat templates and none is named default: {names}")
        template = template["default"]
    return template if isinstance(template, str) else None
