"""What an answer looks like, in one piece or streamed: what was asked to be part of it."""

import asyncio
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from baton.engine.detokenizer import TokenText
from baton_router.answer import Answer
from baton_router.openai.logprobs import LogprobsFormat, prompt_logprobs


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    id: str
    created: int
    model: str
    token_text: TokenText
    chat: bool
    include_usage: bool = False
    prompt_token_ids: tuple[int, ...] | None = None  # None: token ids were not asked for
    num_logprobs: int | None = None  # most likely tokens beside each of the text's; None: none are told
    num_prompt_logprobs: int | None = None  # the same in `prompt_logprobs`
    echo: str | None = None  # the prompt, where it is part of the text


class ChoiceStart(NamedTuple):
    """What comes with the first words of a choice."""

    echo: str = ""
    logprobs: LogprobsFormat | None = None  # for all its words
    prompt_logprobs: bytes = b""  # JSON, where asked for


PLAIN = ChoiceStart()


async def choice_starts(format: AnswerFormat, answer: Answer) -> list[ChoiceStart]:
    """One for each choice, as soon as the first words are there."""
    if answer.prompt_logprobs is None:
        return _starts(format, answer)
    return await asyncio.to_thread(_starts, format, answer)  # long prompts take a while


def _starts(format: AnswerFormat, answer: Answer) -> list[ChoiceStart]:
    of_prompt = _prompt_logprobs(format, answer)
    return [ChoiceStart(format.echo or "", _logprobs(format, answer), of_prompt) for _ in answer.choices]


def _prompt_logprobs(format: AnswerFormat, answer: Answer) -> bytes:
    said, num_top = answer.prompt_logprobs, format.num_prompt_logprobs
    if said is None or num_top is None:
        return b""
    return orjson.dumps(prompt_logprobs(format.token_text, answer.request.prompt_token_ids, said, num_top))


def _logprobs(format: AnswerFormat, answer: Answer) -> LogprobsFormat | None:
    if format.num_logprobs is None:
        return None
    logprobs = LogprobsFormat(format.token_text, chat=format.chat)
    if format.echo is not None and answer.prompt_logprobs is not None:
        logprobs.echo(answer.request.prompt_token_ids, answer.prompt_logprobs, format.num_logprobs)
    return logprobs


def usage(answer: Answer) -> dict[str, Any]:
    num_prompt, num_output = answer.request.num_prompt_tokens, answer.num_output_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached_tokens},
    }
