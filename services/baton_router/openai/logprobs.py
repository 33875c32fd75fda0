"""Log probabilities in OpenAI's two shapes, and a prompt's in vLLM's."""

from collections.abc import Iterator, Sequence
from typing import Any

from baton.engine.detokenizer import TokenText
from baton.request import PromptLogprobs, TokenLogprobs

Columns = dict[str, list[Any]]


class LogprobsFormat:
    """Of one choice: knows how far its text has come."""

    def __init__(self, token_text: TokenText, *, chat: bool) -> None:
        self._token_text = token_text
        self._chat = chat
        self._offset = 0
        self._echoed: Columns | None = None

    def echo(self, prompt: Sequence[int], said: PromptLogprobs, num_top: int) -> None:
        """The prompt is part of the text, and comes with what is rendered next."""
        first, *others = prompt
        start: Columns = {"tokens": [self._name(first)], "token_logprobs": [None], "top_logprobs": [None]}
        start["text_offset"] = self._offsets([first])
        self._echoed = _joined(start, self._columns(list(zip(others, _entries(said, num_top), strict=True))))

    def render(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """None where there is nothing to tell."""
        pairs = list(zip(token_ids, logprobs, strict=True))
        if not pairs and self._echoed is None:
            return None
        if self._chat:
            return self._content(pairs)
        columns = self._columns(pairs)
        if self._echoed is not None:
            columns, self._echoed = _joined(self._echoed, columns), None
        return columns

    def _content(self, pairs: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        content = [
            self._entry(token_id, each.logprob)
            | {
                "top_logprobs": [
                    self._entry(*top) for top in zip(each.top_token_ids, each.top_logprobs, strict=True)
                ]
            }
            for token_id, each in pairs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._token_text.label(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _columns(self, pairs: list[tuple[int, TokenLogprobs]]) -> Columns:
        return {
            "tokens": [self._name(token_id) for token_id, _ in pairs],
            "token_logprobs": [each.logprob for _, each in pairs],
            "top_logprobs": [self._top(token_id, each) for token_id, each in pairs],
            "text_offset": self._offsets([token_id for token_id, _ in pairs]),
        }

    def _offsets(self, token_ids: list[int]) -> list[int]:
        """A special token has a name, and no text."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._token_text.token_bytes(token_id).decode(errors="replace"))
        return offsets

    def _top(self, token_id: int, each: TokenLogprobs) -> dict[str, float]:
        """The drawn token is always among them."""
        top = {
            self._name(i): logprob for i, logprob in zip(each.top_token_ids, each.top_logprobs, strict=True)
        }
        return top | {self._name(token_id): each.logprob}

    def _name(self, token_id: int) -> str:
        return self._token_text.label(token_id).decode(errors="replace")


def prompt_logprobs(
    token_text: TokenText, prompt: Sequence[int], said: PromptLogprobs, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token a mapping from token ids to what is said of them."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        name = token_text.label(token_id).decode(errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": name}

    of_each: list[dict[str, Any] | None] = [None]
    for token_id, rank, each in zip(prompt[1:], said.ranks, _entries(said, num_top), strict=True):
        top = zip(each.top_token_ids, each.top_logprobs, strict=True)
        named = {str(token_id): entry(token_id, each.logprob, rank)}
        for top_rank, (top_id, logprob) in enumerate(top, start=1):
            named.setdefault(str(top_id), entry(top_id, logprob, top_rank))
        of_each.append(named)
    return of_each


def _entries(said: PromptLogprobs, num_top: int) -> Iterator[TokenLogprobs]:
    """One for each token; of the most likely ones no more than `num_top`."""
    num_columns = len(said.top_token_ids) // max(1, len(said.logprobs))
    for index, logprob in enumerate(said.logprobs):
        top = slice(index * num_columns, index * num_columns + min(num_top, num_columns))
        yield TokenLogprobs(logprob, said.top_token_ids[top], said.top_logprobs[top])


def _joined(first: Columns, then: Columns) -> Columns:
    return {name: first[name] + then[name] for name in first}
