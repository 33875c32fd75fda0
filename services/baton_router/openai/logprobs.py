"""Log probabilities in OpenAI's two shapes."""

from collections.abc import Sequence
from typing import Any

from baton.engine.detokenizer import TokenText
from baton.request import TokenLogprobs


class LogprobsFormat:
    """Of one answer: knows how far its text has come."""

    def __init__(self, token_text: TokenText, *, chat: bool) -> None:
        self._token_text = token_text
        self._chat = chat
        self._offset = 0

    def render(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        pairs = list(zip(token_ids, logprobs, strict=True))
        return self._content(pairs) if self._chat else self._columns(pairs)

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

    def _columns(self, pairs: list[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        tokens = [self._name(token_id) for token_id, _ in pairs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for _, each in pairs],
            "top_logprobs": [self._top(token_id, each) for token_id, each in pairs],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, each: TokenLogprobs) -> dict[str, float]:
        """The drawn token is always among them."""
        top = {
            self._name(i): logprob for i, logprob in zip(each.top_token_ids, each.top_logprobs, strict=True)
        }
        return top | {self._name(token_id): each.logprob}

    def _name(self, token_id: int) -> str:
        return self._token_text.label(token_id).decode(errors="replace")
