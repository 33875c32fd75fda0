"""An answer in one piece."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from baton.request import Request, TokenLogprobs
from baton_router.answer import Answer
from baton_router.openai.format import AnswerFormat, ChoiceStart, choice_starts, usage


@dataclass(slots=True)
class _Said:
    """By one choice."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


async def whole_answer(opening: Answer, format_of: Callable[[Request], AnswerFormat]) -> bytes:
    said = [_Said() for _ in opening.choices]
    async with opening as answer:
        async for items in answer.tokens:
            for choice, (text, token_ids, _) in answer.read(items):
                of_choice = said[choice.index]
                of_choice.texts.append(text)
                of_choice.token_ids += token_ids
                of_choice.logprobs += choice.logprobs
            if not answer.num_running:
                break
    format = format_of(answer.request)
    starts = await choice_starts(format, answer)
    content: dict[str, Any] = {"id": format.id, "created": format.created, "model": format.model}
    content["object"] = "chat.completion" if format.chat else "text_completion"
    content["choices"] = [
        _choice(format, choice.index, choice.finish_reason, of_choice, start)
        for choice, of_choice, start in zip(answer.choices, said, starts, strict=True)
    ]
    if format.chat:
        content |= _of_prompt(format, starts[0])
    return orjson.dumps(content | {"usage": usage(answer)})


def _choice(
    format: AnswerFormat, index: int, finish_reason: str | None, said: _Said, start: ChoiceStart
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": finish_reason}
    if start.logprobs is not None:
        choice["logprobs"] = start.logprobs.render(said.token_ids, said.logprobs)
    if format.prompt_token_ids is not None:
        choice["token_ids"] = said.token_ids
    text = start.echo + "".join(said.texts)
    if format.chat:
        return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
    return choice | {"text": text} | _of_prompt(format, start)


def _of_prompt(format: AnswerFormat, start: ChoiceStart) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if format.prompt_token_ids is not None:
        found["prompt_token_ids"] = format.prompt_token_ids
    if start.prompt_logprobs:
        found["prompt_logprobs"] = orjson.Fragment(start.prompt_logprobs)
    return found
