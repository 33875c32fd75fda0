"""What a request's parameters make of the model's logits before a token is drawn.

    repetition penalty, then presence and frequency penalty, then bias, then everything that is forbidden: -inf

Each row is computed from itself alone. Rows without a state keep their logits.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from baton.engine.sampling_state import SamplingState

Row = tuple[int, SamplingState]  # index into the logits


def adjust(logits: Tensor, rows: Sequence[Row]) -> None:
    """In place; logits [R, V] float32."""
    _penalise(logits, [row for row in rows if row[1].counts is not None])
    _add_biases(logits, [row for row in rows if len(row[1].bias_ids)])
    _mask(logits, rows)
    _forbid(logits, rows)


def _penalise(logits: Tensor, rows: Sequence[Row]) -> None:
    if not rows:
        return
    counted = [(index, state.params, state.counts) for index, state in rows if state.counts is not None]
    sizes = [len(counts.token_ids) for _, _, counts in counted]
    index = _repeated([index for index, _, _ in counted], sizes, logits, torch.int64)
    token_ids = torch.from_numpy(np.concatenate([c.token_ids for _, _, c in counted])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([c.output_counts for _, _, c in counted])).to(logits.device)
    repetition, presence, frequency = (
        _repeated(values, sizes, logits, torch.float32)
        for values in zip(
            *((p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for _, p, _ in counted),
            strict=True,
        )
    )
    values = logits[index, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[index, token_ids] = values - frequency * counts - presence * (counts > 0)


def _add_biases(logits: Tensor, rows: Sequence[Row]) -> None:
    if not rows:
        return
    index = _repeated([i for i, _ in rows], [len(s.bias_ids) for _, s in rows], logits, torch.int64)
    token_ids = torch.from_numpy(np.concatenate([state.bias_ids for _, state in rows])).to(logits.device)
    biases = torch.from_numpy(np.concatenate([state.biases for _, state in rows])).to(logits.device)
    logits[index, token_ids] += biases


def _mask(logits: Tensor, rows: Sequence[Row]) -> None:
    masks = [(index, mask) for index, state in rows if (mask := state.mask()) is not None]
    if not masks:
        return
    octets = torch.from_numpy(np.stack([mask for _, mask in masks]).view(np.uint8)).to(logits.device)
    # [M, V], 0 or -inf. Made a byte at a time, and added, it takes a fraction of what filling in by single bits does.
    biases = F.embedding(octets.int(), _biases_of_octets(logits.device)).flatten(1)[:, : logits.shape[-1]]
    logits.index_add_(0, torch.tensor([index for index, _ in masks], device=logits.device), biases)


@functools.cache
def _biases_of_octets(device: torch.device) -> Tensor:
    """[256, 8]: 0 for a bit that is set, -inf for one that is not; the lowest first."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.zeros(256, 8).masked_fill_(bits == 0, -torch.inf).to(device)


def _forbid(logits: Tensor, rows: Sequence[Row]) -> None:
    pairs = [(index, token_id) for index, state in rows for token_id in state.forbidden()]
    if pairs:
        index, token_ids = torch.tensor(pairs, device=logits.device).T
        logits[index, token_ids] = -torch.inf


def _repeated(values: Sequence[float], sizes: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """values[i] sizes[i] times."""
    repeats = torch.tensor(sizes)
    return torch.tensor(values, dtype=dtype).repeat_interleave(repeats).to(like.device)
