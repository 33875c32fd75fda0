"""What the end of a step does to its sequences: their KV counts, they get their tokens, some of them end."""

from collections.abc import Callable, Iterator

from baton.engine.batch import PromptFacts, SequenceOutput
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.steps import EndedStep
from baton.errors import BatonError
from baton.kv.cache_manager import KVCacheManager
from baton.request import FinishReason, PromptLogprobs, TokenLogprobs

# What a runner gives in place of a token.
_NO_NUMBER = -1
_NO_TOKEN = {
    _NO_NUMBER: "the model's logits are not numbers",
    -2: "the request's own limits allow no further token",
}


class Outcomes:
    """`drop` is what becomes of a sequence that has ended and whose blocks nobody reads from outside."""

    def __init__(self, kv: KVCacheManager, scheduler: Scheduler, drop: Callable[[Sequence], None]) -> None:
        self._kv = kv
        self._scheduler = scheduler
        self._drop = drop

    def of(self, step: EndedStep) -> Iterator[SequenceOutput]:
        """Rows of sequences that ended meanwhile were for nothing."""
        self._scheduler.ended(row.sequence for row in step.rows)
        drawn = iter(step.tokens)
        for row in step.rows:
            token = next(drawn) if row.sample and step.error is None else None
            if row.sequence.finished:
                continue
            if step.error is not None:
                yield self._fail(row.sequence, f"{type(step.error).__name__}: {step.error}")
            elif token is not None and token < 0:
                yield self._fail(row.sequence, _NO_TOKEN[token], corrupted=token == _NO_NUMBER)
            else:
                yield self._advance_or_fail(row.sequence, row.num_tokens, token)

    def _advance_or_fail(self, sequence: Sequence, num_tokens: int, token: int | None) -> SequenceOutput:
        try:
            return self._advance(sequence, num_tokens, token)
        except BatonError as error:  # a grammar that can go no further
            return self._fail(sequence, error.message)

    def _advance(self, sequence: Sequence, num_tokens: int, token: int | None) -> SequenceOutput:
        prompt_logprobs = _take_prompt_logprobs(sequence) if token is not None else None
        self._kv.commit(sequence, sequence.num_computed_tokens + num_tokens)
        num_computed_tokens, first_index = sequence.num_computed_tokens, sequence.num_output_tokens
        if token is not None:
            sequence.append(token)
            if sequence.prefill_only:
                self._scheduler.hold(sequence)
            elif sequence.finished:
                self._drop(sequence)
        new_tokens = () if token is None else (token,)
        is_first = token is not None and first_index == 0
        return SequenceOutput(
            sequence.request_id,
            num_computed_tokens,
            first_index,
            new_tokens,
            sequence.finish_reason,
            logprobs=_logprobs(sequence) if new_tokens else (),
            prompt_logprobs=prompt_logprobs,
            prompt=_prompt_facts(sequence) if is_first else None,
        )

    def _fail(self, sequence: Sequence, error: str, *, corrupted: bool = False) -> SequenceOutput:
        sequence.finish_reason = FinishReason.ERROR
        num_computed_tokens = sequence.num_computed_tokens
        if corrupted:
            self._kv.forget(sequence)  # or the next prompt that begins alike would fail, too
        if sequence.prefill_only:
            self._scheduler.hold(sequence)  # what it computed may be on the wire: release gives it back
        else:
            self._drop(sequence)
        return SequenceOutput(
            sequence.request_id,
            num_computed_tokens,
            sequence.num_output_tokens,
            (),
            FinishReason.ERROR,
            error,
            corrupted=corrupted,
        )


def _prompt_facts(sequence: Sequence) -> PromptFacts:
    return PromptFacts(sequence.arrival_s, sequence.admitted_s, sequence.num_cached_tokens)


def _logprobs(sequence: Sequence) -> tuple[TokenLogprobs, ...]:
    state = sequence.sampling_state
    return () if state is None or state.logprobs is None else (state.logprobs,)


def _take_prompt_logprobs(sequence: Sequence) -> PromptLogprobs | None:
    """Once: a sequence that is computed again has told them."""
    scores, sequence.prompt_scores = sequence.prompt_scores, None
    return None if scores is None else scores.result()
