"""The engine's sampler as one call, for tests that want the tokens."""

from collections.abc import Sequence

from torch import Tensor

from baton.engine.sampler import draw
from baton.engine.sampling_state import SamplingState
from baton.request import SamplingParams


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    states: Sequence[SamplingState | None] = (),
) -> list[int]:
    """The tokens of `draw`. `states` of those sequences that have one get the log probabilities of their token where
    they are wanted."""
    drawn = draw(logits, params, positions, states)
    tokens: list[int] = drawn.tokens.tolist()
    drawn.note_logprobs(tokens)
    return tokens
