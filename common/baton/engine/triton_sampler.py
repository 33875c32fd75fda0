"""The sampler's draws on a GPU, by one kernel: the same tokens as `sampler` draws."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from baton.request import SamplingParams
from baton_kernels.sample_tokens import sample_tokens

_LEAST_TEMPERATURE = 1e-5  # above 0, which is greedy


def draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """[R] int64, on the device; -1 where the logits are not finite."""

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)

    temperatures = [max(p.temperature, _LEAST_TEMPERATURE) if p.temperature > 0 else 0.0 for p in params]
    tokens, _ = sample_tokens(
        logits,
        column(temperatures, torch.float32),
        column([p.top_k or logits.shape[1] for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([math.log(p.min_p) if p.min_p else -math.inf for p in params], torch.float32),
        column([_signed(p.seed or 0) for p in params], torch.int64),
        column(positions, torch.int64),
    )
    return tokens


def _signed(seed: int) -> int:
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
