"""The engine in this process, without servers: batch jobs, tests, and the control in which no KV is
transferred.

from baton.llm import LLM
from baton.request import SamplingParams

with LLM("demo") as llm:
    [answer] = llm.generate(["ada oslo, bob lima. bob?"], SamplingParams(max_tokens=8, temperature=0))
"""

import asyncio
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Sequence
from baton.engine.engine import Engine
from baton.engine.model_runner import load_runner
from baton.errors import ConfigError, InvalidRequest
from baton.model_files import TOKENIZER_FILES, WEIGHT_FILES, eos_token_ids, resolve_model
from baton.request import FinishReason, PromptLogprobs, Request, RequestId, SamplingParams, TokenLogprobs
from baton.tokenizer import Tokenizer, load_tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(slots=True)
class RequestOutput:
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)  # the stop token included
    text: str = ""  # empty where the model has no tokenizer
    finish_reason: FinishReason | None = None
    error: str = ""  # why, where finish_reason is ERROR
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token where they were asked for
    prompt_logprobs: PromptLogprobs | None = None  # where they were asked for


class LLM:
    """One model, one engine, one thread. Close it, or use it in a `with` statement."""

    def __init__(
        self,
        model: str = "demo",
        *,
        revision: str | None = None,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        **engine: Any,
    ) -> None:
        """`engine`: the fields of EngineConfig. Raises ConfigError."""
        unknown = engine.keys() - EngineConfig.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(f"unknown engine setting {', '.join(sorted(unknown))}")
        self._directory = resolve_model(model, revision, (*WEIGHT_FILES, *TOKENIZER_FILES))
        config = EngineConfig(**engine)
        self.runner, fingerprint = load_runner(
            ModelConfig(str(self._directory), dtype=dtype, max_model_len=max_model_len), config
        )
        self.engine = Engine(config, self.runner, SystemClock(), fingerprint)
        self._max_num_waiting = config.max_num_waiting
        self._tokenizer = _tokenizer_of(self._directory)
        self._eos_token_ids = (
            self._tokenizer.eos_token_ids if self._tokenizer is not None else eos_token_ids(self._directory)
        )
        self._loop = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(self.runner.aclose())
        self._loop.close()

    def generate(
        self,
        prompts: Collection[str | Collection[int]],
        sampling: SamplingParams | Collection[SamplingParams],
    ) -> list[RequestOutput]:
        """One output per prompt, text or token ids, in their order; all prompts run together. Raises
        RequestError for a prompt that cannot be served; no prompt has an output then."""
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"{len(prompts)} prompts, {len(params)} sampling parameters", param="sampling"
            )
        requests = [self._request(i, *work) for i, work in enumerate(zip(prompts, params, strict=True))]
        outputs = {request.request_id: RequestOutput(request.prompt_token_ids) for request in requests}
        self._loop.run(self._run(deque(requests), outputs))
        for output in outputs.values():
            output.text = self._decode(output.token_ids)
        return list(outputs.values())

    async def _run(self, waiting: deque[Request], outputs: dict[RequestId, RequestOutput]) -> None:
        running: dict[RequestId, Sequence | None] = {}
        try:
            while waiting or running:
                while waiting and self.engine.load().num_waiting < self._max_num_waiting:
                    request = waiting.popleft()
                    self.engine.add(request)
                    running[request.request_id] = self.engine.sequence(request.request_id)
                for row in (await self.engine.step()).outputs:
                    output = outputs[row.request_id]
                    output.token_ids.extend(row.token_ids)
                    output.logprobs.extend(row.logprobs)
                    output.prompt_logprobs = row.prompt_logprobs or output.prompt_logprobs
                    if row.finish_reason is not None:
                        sequence = running.pop(row.request_id)
                        output.finish_reason, output.error = row.finish_reason, row.error
                        output.num_cached_tokens = sequence.num_cached_tokens if sequence else 0
        finally:
            for request_id in running:
                self.engine.abort(request_id)

    def _request(self, index: int, prompt: str | Collection[int], sampling: SamplingParams) -> Request:
        if sampling.stop:
            raise InvalidRequest(
                "stop strings are matched by the router: use stop_token_ids here", param="stop"
            )
        token_ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        return Request(RequestId(str(index)), tuple(token_ids), sampling, self._eos_token_ids)

    def _encode(self, prompt: str) -> list[int]:
        if self._tokenizer is None:
            raise InvalidRequest(f"{self._directory} has no tokenizer.json: give token ids", param="prompt")
        return self._tokenizer.encode(prompt)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids) if self._tokenizer is not None else ""


def _tokenizer_of(directory: Path) -> Tokenizer | None:
    has_one = (directory / "tokenizer.json").is_file()
    return load_tokenizer(directory, num_threads=0) if has_one else None
