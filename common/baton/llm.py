"""The engine in this process, without servers: batch jobs, tests, and the control in which no KV is
transferred.

from baton import LLM, SamplingParams

with LLM("demo") as llm:
    [answer] = llm.chat([{"role": "user", "content": "ada oslo, bob lima. bob?"}])
    answers = llm.generate(["ada oslo. ada?", "bob lima. bob?"], SamplingParams(max_tokens=8, temperature=0))
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, cast

from baton.chat_template import Message
from baton.clock import SystemClock
from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import SequenceOutput
from baton.engine.detokenizer import TextStream, TokenText
from baton.engine.engine import Engine
from baton.engine.model_runner import load_runner
from baton.engine.samples import check_num_samples
from baton.engine.sequence import Sequence as EngineSequence
from baton.errors import ConfigError, InvalidRequest, RequestError
from baton.model_files import TOKENIZER_FILES, WEIGHT_FILES, eos_token_ids, resolve_model
from baton.progress import Progress
from baton.request import FinishReason, PromptLogprobs, Request, RequestId, SamplingParams, TokenLogprobs
from baton.tokenizer import Tokenizer, load_tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Prompt: TypeAlias = str | Sequence[int]  # text, or token ids
Conversation: TypeAlias = Sequence[Message]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestOutput:
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)  # the stop token included
    text: str = ""  # before a stop string; empty where the model has no tokenizer
    finish_reason: FinishReason | None = None
    error: str = ""  # why, where finish_reason is ERROR
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token where they were asked for
    prompt_logprobs: PromptLogprobs | None = None  # where they were asked for
    siblings: "list[RequestOutput]" = field(default_factory=list)  # n > 1: the other answers to this prompt

    @property
    def outputs(self) -> "list[RequestOutput]":
        """All answers to the prompt, this one first."""
        return [self, *self.siblings]


class LLM:
    """One model, one engine, one thread. Close it, or use it in a `with` statement."""

    def __init__(
        self,
        model: str = "demo",
        *,
        revision: str | None = None,
        dtype: Dtype = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        **engine: Any,
    ) -> None:
        """`engine`: the fields of EngineConfig. `seed` draws the seeds of requests that bring none. Raises
        ConfigError."""
        unknown = engine.keys() - EngineConfig.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(f"unknown engine setting {', '.join(sorted(unknown))}")
        self._directory = resolve_model(model, revision, (*WEIGHT_FILES, *TOKENIZER_FILES))
        config = EngineConfig(**engine)
        self.runner, fingerprint, _ = load_runner(
            ModelConfig(str(self._directory), dtype=dtype, max_model_len=max_model_len), config
        )
        self._clock = SystemClock()
        self.engine = Engine(config, self.runner, self._clock, fingerprint)
        self._max_num_waiting = config.max_num_waiting
        self._rng = random.Random(seed)
        self._tokenizer = _tokenizer_of(self._directory)
        self._token_text = TokenText(self._tokenizer.backend) if self._tokenizer is not None else None
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
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in their order; all prompts run together. A prompt that cannot be served (too long,
        empty, a token or a sampling parameter that the model cannot take) has finish reason ERROR and says why in
        `error`; the others are answered. With n > 1 an output has siblings, each with its seed as if asked for alone.
        Raises InvalidRequest when the arguments do not fit each other."""
        works = _paired(_as_list(prompts), sampling_params)
        return self._answer([(self._token_ids_of(prompt), params) for prompt, params in works], use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The same for one conversation or several, through the model's chat template."""
        conversations = _as_conversations(messages)
        works = _paired(conversations, sampling_params)
        return self._answer([(self._chat_token_ids(chat), params) for chat, params in works], use_tqdm)

    # --- one call ---

    def _answer(
        self, works: list[tuple[Sequence[int] | RequestError, SamplingParams]], use_tqdm: bool
    ) -> list[RequestOutput]:
        answers = [answer for index, work in enumerate(works) for answer in self._new_answers(index, *work)]
        with Progress("answers", len(answers), self._clock, shown=use_tqdm) as progress:
            self._loop.run(self._run(deque(answers), progress))
        outputs = [answer.output for answer in answers if answer.parent is None]
        _warn_of_errors(outputs)
        return outputs

    async def _run(self, waiting: "deque[_Answer]", progress: Progress) -> None:
        running: dict[RequestId, _Answer] = {}
        try:
            while waiting or running:
                while waiting and self.engine.load().num_waiting < self._max_num_waiting:
                    answer = waiting.popleft()
                    if self._start(answer):
                        running[answer.request.request_id] = answer
                    else:
                        progress.done()
                for row in (await self.engine.step()).outputs:
                    if row.request_id not in running:
                        continue
                    answer = running[row.request_id]
                    progress.tokens(answer.take(row))
                    if answer.output.finish_reason is not None:
                        self.engine.abort(row.request_id)  # where a stop string ended it
                        del running[row.request_id]
                        progress.done()
        finally:
            for request_id in running:
                self.engine.abort(request_id)

    def _start(self, answer: "_Answer") -> bool:
        if answer.output.finish_reason is not None:
            return False
        try:
            if answer.parent is None:
                self.engine.add(answer.request)
            else:
                self.engine.fork(answer.parent, answer.request)
        except RequestError as error:
            answer.fail(error)
            return False
        answer.sequence = self.engine.sequence(answer.request.request_id)
        return True

    def _new_answers(
        self, index: int, token_ids: Sequence[int] | RequestError, params: SamplingParams
    ) -> "list[_Answer]":
        """One for each sample."""
        prompt = () if isinstance(token_ids, RequestError) else tuple(token_ids)
        if params.seed is None:
            params = replace(params, seed=self._rng.getrandbits(63))
        request = Request(RequestId(str(index)), prompt, params, self._eos_token_ids)
        try:
            check_num_samples(self.engine, params.n)
        except InvalidRequest as error:
            answer = _Answer(request, None, RequestOutput(prompt))
            answer.fail(error)
            return [answer]
        first, *siblings = [
            _Answer(sample, self._text_of(sample), RequestOutput(prompt)) for sample in request.samples()
        ]
        for sibling in siblings:
            sibling.parent = first.request.request_id
            first.output.siblings.append(sibling.output)
        for answer in (first, *siblings):
            if isinstance(token_ids, RequestError):
                answer.fail(token_ids)
            elif params.n < 1:
                answer.fail(InvalidRequest(f"n must be at least 1; {params.n} were asked for", param="n"))
            elif params.stop and self._token_text is None:
                answer.fail(self._no_tokenizer("use stop_token_ids", param="stop"))
        return [first, *siblings]

    def _text_of(self, request: Request) -> TextStream | None:
        if self._token_text is None:
            return None
        sampling = request.sampling
        return self._token_text.stream(sampling.stop, request.stop_ids, sampling.min_tokens)

    # --- prompts ---

    def _token_ids_of(self, prompt: Prompt) -> Sequence[int] | RequestError:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            return self._no_tokenizer("give token ids", param="prompt")
        return self._tokenizer.encode(prompt)

    def _chat_token_ids(self, messages: Conversation) -> Sequence[int] | RequestError:
        if self._tokenizer is None:
            return self._no_tokenizer("use generate with token ids", param="messages")
        try:
            return self._tokenizer.encode_chat(messages)
        except RequestError as error:
            return error

    def _no_tokenizer(self, instead: str, param: str) -> InvalidRequest:
        return InvalidRequest(f"{self._directory} has no tokenizer.json: {instead}", param=param)


@dataclass(slots=True)
class _Answer:
    """One answer to a prompt on its way through the engine."""

    request: Request
    text: TextStream | None
    output: RequestOutput
    parent: RequestId | None = None  # whose prompt it is, where it is not the first one's
    sequence: EngineSequence | None = None  # once it was added

    def take(self, row: SequenceOutput) -> int:
        """What a step did for it; how many tokens of that count."""
        token_ids, finish_reason = row.token_ids, row.finish_reason
        if self.text is not None:
            text, token_ids, finish_reason = self.text.push(token_ids, finish_reason)
            self.output.text += text
        self.output.token_ids += token_ids
        self.output.logprobs += row.logprobs[: len(token_ids)]
        self.output.prompt_logprobs = row.prompt_logprobs or self.output.prompt_logprobs
        self.output.finish_reason, self.output.error = finish_reason, row.error
        if finish_reason is not None and self.sequence is not None:
            self.output.num_cached_tokens = self.sequence.num_cached_tokens
        return len(token_ids)

    def fail(self, error: RequestError) -> None:
        self.output.finish_reason, self.output.error = FinishReason.ERROR, error.message


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [cast(Prompt, prompts)] if is_one else list(cast(Sequence[Prompt], prompts))


def _as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    is_one = len(messages) > 0 and isinstance(messages[0], dict)
    return [cast(Conversation, messages)] if is_one else list(cast(Sequence[Conversation], messages))


def _paired(
    prompts: list[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Any, SamplingParams]]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [(prompt, sampling_params or SamplingParams()) for prompt in prompts]
    if len(sampling_params) != len(prompts):
        raise InvalidRequest(
            f"{len(prompts)} prompts, {len(sampling_params)} sampling parameters", param="sampling_params"
        )
    return list(zip(prompts, sampling_params, strict=True))


def _warn_of_errors(outputs: list[RequestOutput]) -> None:
    errors = [next((answer.error for answer in output.outputs if answer.error), "") for output in outputs]
    failed = [index for index, error in enumerate(errors) if error]
    if failed:
        first = failed[0]
        _log.warning(
            "%d of %d prompts failed; the first is prompt %d: %s",
            len(failed),
            len(outputs),
            first,
            errors[first],
        )


def _tokenizer_of(directory: Path) -> Tokenizer | None:
    has_one = (directory / "tokenizer.json").is_file()
    return load_tokenizer(directory, num_threads=0) if has_one else None
