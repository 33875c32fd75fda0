"""What the model's logits say of a prompt's own tokens: log probability, rank, and the most likely others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baton.engine.prompt_scores import PromptScores
from baton.engine.sampler import LEAST_LOGPROB

# Rows in float32 at a time: a chunk of a large vocabulary is hundreds of megabytes.
_NUM_ROWS = 64


class Scored(NamedTuple):
    scores: PromptScores
    start: int  # position of the first row of logits
    num_rows: int


def score(logits: Tensor, scored: Sequence[Scored]) -> None:
    """logits [sum of num_rows, V], one sequence's rows after the other's; they are left as they are."""
    parts = torch.split(logits, [each.num_rows for each in scored])
    for (scores, start, num_rows), rows in zip(scored, parts, strict=True):
        targets = torch.tensor(scores.targets(start, num_rows), device=logits.device)
        for first in range(0, num_rows, _NUM_ROWS):
            part = slice(first, first + _NUM_ROWS)
            _score(rows[part], targets[part], scores, start + first)


def _score(logits: Tensor, targets: Tensor, scores: PromptScores, start: int) -> None:
    """logits [R, V], targets [R]."""
    log_probs = logits.float().log_softmax(-1).clamp_(min=LEAST_LOGPROB)
    own = log_probs.gather(-1, targets[:, None])
    ranks = (log_probs > own).sum(-1) + 1
    top = log_probs.topk(scores.num_top)
    columns = (own[:, 0], ranks, top.indices, top.values)
    scores.note(start, *(column.cpu().numpy() for column in columns))
