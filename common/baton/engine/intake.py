"""What may enter the engine: a request becomes a sequence here, or is refused with what is wrong about it."""

from baton.engine.batch import ModelRunner
from baton.engine.prompt_scores import PromptScores, check_prompt_scores
from baton.engine.sampling_state import SamplingState, check_sampling, needs_state
from baton.engine.sequence import Sequence
from baton.engine.turn import turn_s
from baton.errors import InvalidRequest, RequestTooLarge
from baton.request import Request


class Intake:
    """Holds nothing of any request."""

    def __init__(self, runner: ModelRunner) -> None:
        storage = runner.storage
        self.max_model_len = min(runner.max_model_len, storage.num_blocks * storage.layout.block_size)
        self._runner = runner

    def check(self, request: Request) -> None:
        """Raises InvalidRequest or RequestTooLarge."""
        self._check_prompt(request)
        check_sampling(request.sampling, self._runner.vocab_size)
        check_prompt_scores(request.sampling, request.num_prompt_tokens)
        if request.sampling.grammar is not None and self._runner.grammars is None:
            raise InvalidRequest("this worker has no grammars", param="grammar")

    def sequence(
        self,
        request: Request,
        *,
        arrival_s: float,
        prefill_s: float,
        remote: bool = False,
        prefill_only: bool = False,
        parent: Sequence | None = None,
    ) -> Sequence:
        """Of a request that has passed `check`. `prefill_s`: predicted, of the whole prompt. Raises InvalidRequest when
        it is no fork of `parent`."""
        if parent is not None and not _same_prompt(parent.request, request):
            raise InvalidRequest(
                f"request {request.request_id} is no fork of {parent.request_id}: the prompts differ"
            )
        scores = _prompt_scores(request)
        return Sequence(
            request,
            remote=remote,
            prefill_only=prefill_only,
            parent=parent if scores is None else None,  # what is not computed says nothing
            token_ids=list(request.prompt_token_ids),
            max_num_tokens=min(self.max_model_len, request.num_prompt_tokens + request.sampling.max_tokens),
            sampling_state=self._sampling_state(request),
            prompt_scores=scores,
            arrival_s=arrival_s,
            turn_s=turn_s(request, arrival_s, prefill_s),
        )

    def _check_prompt(self, request: Request) -> None:
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self._runner.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < self._runner.vocab_size)
            raise InvalidRequest(
                f"token id {wrong} is not in the vocabulary of {self._runner.vocab_size} tokens",
                param="prompt",
            )
        if len(prompt) >= self.max_model_len:
            raise RequestTooLarge(
                f"the prompt has {len(prompt)} tokens; with at least one for the answer, this worker takes "
                f"{self.max_model_len}",
                param="prompt",
            )

    def _sampling_state(self, request: Request) -> SamplingState | None:
        if not needs_state(request.sampling):
            return None
        grammar, grammars = request.sampling.grammar, self._runner.grammars
        matcher = None if grammar is None or grammars is None else grammars.matcher(grammar)
        return SamplingState(request, self._runner.vocab_size, matcher)


def _same_prompt(a: Request, b: Request) -> bool:
    return a.prompt_token_ids == b.prompt_token_ids and a.cache_salt == b.cache_salt


def _prompt_scores(request: Request) -> PromptScores | None:
    wanted = request.sampling.prompt_logprobs
    return None if wanted is None else PromptScores(request.prompt_token_ids, wanted)
