"""One of an answer's n texts, from the tokens of its sample until its end."""

from baton.engine.detokenizer import Delta, TextStream
from baton.errors import InternalError
from baton.request import FinishReason, TokenLogprobs
from baton_router.generation import Tokens


class Choice:
    """One of an answer's texts: its detokenizer, its stop strings, its end."""

    __slots__ = ("_text", "_wants_logprobs", "finish_reason", "index", "logprobs", "num_output_tokens")

    def __init__(self, index: int, text: "TextStream | NoText", *, wants_logprobs: bool) -> None:
        self.index = index
        self.num_output_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens read last, where they were asked for
        self._text = text
        self._wants_logprobs = wants_logprobs

    def read(self, items: list[Tokens]) -> Delta:
        """The text of what came. Raises InternalError when it ended, but not as it should."""
        if len(items) == 1:
            token_ids, finish_reason = items[0].token_ids, items[0].finish_reason
        else:
            token_ids = tuple([token_id for item in items for token_id in item.token_ids])
            finish_reason = items[-1].finish_reason
        delta = self._text.push(token_ids, finish_reason)
        self.num_output_tokens += len(delta[1])
        if self._wants_logprobs:
            found = [each for item in items for each in item.logprobs]
            self.logprobs = tuple(found[: len(delta[1])])
        if delta[2] is not None:
            self._finish(delta[2])
        return delta

    def _finish(self, reason: FinishReason) -> None:
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise InternalError(f"the request ended early: {reason}")
        self.finish_reason = reason


class NoText:
    """In place of a TextStream where the tokens are a by-product, and not told."""

    def push(self, token_ids: tuple[int, ...], finish_reason: FinishReason | None) -> Delta:
        return "", (), finish_reason
