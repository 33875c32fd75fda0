"""Log probabilities of a prompt's own tokens, gathered while the prompt is computed chunk by chunk. Torch-free.

Token i + 1 is judged by the logits of position i, so the first token has none, and the last position's logits are for
the first generated token. A prompt that wants these takes no prefix hits: what is not computed says nothing.
"""

import numpy as np
from numpy.typing import NDArray

from baton.errors import InternalError, RequestTooLarge
from baton.request import PromptLogprobs, SamplingParams

# In one answer: as many as 128 ki tokens have with the most likely other one. About 16 MB of JSON.
MAX_VALUES = 2**18


class PromptScores:
    """Of one sequence. The runner notes during a step, the engine takes the result between steps. A position may be
    noted again, as after a preemption."""

    def __init__(self, prompt_token_ids: tuple[int, ...], num_top: int) -> None:
        num_scored = len(prompt_token_ids) - 1
        self.num_top = num_top
        self._prompt = prompt_token_ids
        self._logprobs = np.full(num_scored, np.nan, dtype=np.float32)
        self._ranks = np.zeros(num_scored, dtype=np.int32)
        self._top_ids = np.zeros((num_scored, num_top), dtype=np.int32)
        self._top_logprobs = np.zeros((num_scored, num_top), dtype=np.float32)

    def targets(self, start: int, num_tokens: int) -> tuple[int, ...]:
        """The tokens that positions [start, start + num_tokens) have to say something about."""
        return self._prompt[start + 1 : start + 1 + num_tokens]

    def note(
        self,
        start: int,
        logprobs: NDArray[np.float32],
        ranks: NDArray[np.int64],
        top_ids: NDArray[np.int64],
        top_logprobs: NDArray[np.float32],
    ) -> None:
        """What the logits of positions start, start + 1, ... say; all of them with `num_top` others."""
        rows = slice(start, start + len(logprobs))
        self._logprobs[rows], self._ranks[rows] = logprobs, ranks
        self._top_ids[rows], self._top_logprobs[rows] = top_ids, top_logprobs

    def result(self) -> PromptLogprobs:
        """Raises InternalError where the logits were no numbers."""
        if not (np.isfinite(self._logprobs).all() and np.isfinite(self._top_logprobs).all()):
            raise InternalError("the model's logits are not numbers")
        return PromptLogprobs(
            tuple(self._logprobs.tolist()),
            tuple(self._ranks.tolist()),
            tuple(self._top_ids.ravel().tolist()),
            tuple(self._top_logprobs.ravel().tolist()),
        )


def check_prompt_scores(params: SamplingParams, num_prompt_tokens: int) -> None:
    """Raises RequestTooLarge."""
    if params.prompt_logprobs is None:
        return
    num_values = num_prompt_tokens * (params.prompt_logprobs + 1) * params.n
    if num_values > MAX_VALUES:
        raise RequestTooLarge(
            f"{num_prompt_tokens} prompt tokens with {params.prompt_logprobs} log probabilities and their own, in each "
            f"of n = {params.n} choices, are {num_values} numbers; at most {MAX_VALUES} are given: ask for fewer, or "
            "in several requests",
            param="prompt_logprobs",
        )
