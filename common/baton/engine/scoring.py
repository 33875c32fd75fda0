"""What the model's logits say of a prompt's own tokens: log probability, rank, and the most likely others."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baton.engine.prompt_scores import PromptScores
from baton.engine.sampler import LEAST_LOGPROB

# Rows of logits that there are at a time: those of a whole chunk are hundreds of megabytes.
NUM_ROWS = 64


class Scored(NamedTuple):
    scores: PromptScores
    start: int  # position of the first row in its sequence
    first: int  # the row in the step's tokens
    num_rows: int


def score(states: Tensor, head: Callable[[Tensor], Tensor], scored: Sequence[Scored]) -> None:
    """states [T, ...]; head: logits [R, V] of R of them."""
    for scores, start, first, num_rows in scored:
        targets = torch.tensor(scores.targets(start, num_rows), device=states.device)
        parts = torch.split(states[first : first + num_rows], NUM_ROWS)
        for i, (part, of_part) in enumerate(zip(parts, torch.split(targets, NUM_ROWS), strict=True)):
            _score(head(part), of_part, scores, start + i * NUM_ROWS)


def _score(logits: Tensor, targets: Tensor, scores: PromptScores, start: int) -> None:
    """logits [R, V], targets [R]."""
    log_probs = logits.float().log_softmax(-1).clamp_(min=LEAST_LOGPROB)
    own = log_probs.gather(-1, targets[:, None])
    ranks = (log_probs > own).sum(-1) + 1
    top = log_probs.topk(scores.num_top)
    columns = (own[:, 0], ranks, top.indices, top.values)
    scores.note(start, *(column.cpu().numpy() for column in columns))
