"""The sampler against its definition, which sorts in float64, and against the engine's own sampler: same kept tokens,
same token."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sampled import sample
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from baton.engine import sampler, triton_sampler
from baton.request import SamplingParams
from baton_kernels import naive
from baton_kernels import sample_tokens as module
from baton_kernels.sample_tokens import sample_tokens

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # numpy's remarks on overflows and wrap-arounds that the kernels mean, and on lanes that are masked later
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@dataclass(frozen=True)
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed
        )


ROWS = [
    Row(),
    Row(temperature=0),
    Row(temperature=0.3, seed=2**64 - 1, position=2**31),
    Row(top_k=1),
    Row(top_k=2, seed=3),
    Row(top_k=7, temperature=1.7, position=9),
    Row(top_k=40, top_p=0.9, seed=5),
    Row(top_p=0.5, seed=6, position=1),
    Row(top_p=0.999, temperature=2.5),
    Row(top_p=1e-9),
    Row(min_p=0.1, seed=7),
    Row(top_k=100, top_p=0.95, min_p=0.02, temperature=0.8, seed=8, position=77),
    Row(top_p=0.9, min_p=0.3),
    Row(top_k=10**6, top_p=0.8, seed=9),
]


def arguments(rows: list[Row], num_tokens: int) -> tuple[Tensor, ...]:
    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return (
        column([row.temperature for row in rows], torch.float32),
        column([row.top_k or num_tokens for row in rows], torch.int32),
        column([row.top_p for row in rows], torch.float32),
        column([math.log(row.min_p) if row.min_p else -math.inf for row in rows], torch.float32),
        torch.tensor([row.seed - 2**64 if row.seed >= 2**63 else row.seed for row in rows]),
        torch.tensor([row.position for row in rows]),
    )


def normal(num_tokens: int) -> Tensor:
    return 3 * torch.randn(len(ROWS), num_tokens)


def heavy_tailed(num_tokens: int) -> Tensor:
    return torch.randn(len(ROWS), num_tokens) / torch.rand(len(ROWS), num_tokens)


def tied(num_tokens: int) -> Tensor:
    return torch.randint(-3, 4, (len(ROWS), num_tokens)).float()


def mostly_masked(num_tokens: int) -> Tensor:
    return normal(num_tokens).masked_fill(torch.rand(len(ROWS), num_tokens) < 0.97, -torch.inf)


def equal(num_tokens: int) -> Tensor:
    return torch.full((len(ROWS), num_tokens), -1.5)


FP32, BF16 = torch.float32, torch.bfloat16
CASES = [
    (normal, 4500, FP32),  # longer than a step of the passes
    (heavy_tailed, 100, FP32),
    (tied, 211, BF16),
    (mostly_masked, 211, BF16),
    (equal, 97, FP32),
    (normal, 1, BF16),
]


@pytest.mark.parametrize(
    ("make", "num_tokens", "dtype"),
    CASES,
    ids=[f"{make.__name__}-V{size}-{dtype}" for make, size, dtype in CASES],
)
def test_keeps_and_draws_what_sorting_does(
    make: Callable[[int], Tensor], num_tokens: int, dtype: torch.dtype
) -> None:
    logits = make(num_tokens).to(dtype)
    logits[:, 0] = logits[:, 0].clamp(min=-8)  # something is always allowed
    args = arguments(ROWS, num_tokens)
    tokens, thresholds = sample_tokens(logits, *args)
    # The definition in float64 of what float32 division gives, because that decides which tokens are equal.
    temperature = torch.where(args[0] == 0, 1, args[0])[:, None]
    scaled = logits.float() / temperature
    ones = torch.where(args[0] == 0, 0.0, 1.0).double()
    wanted, wanted_thresholds = naive.sample_tokens(scaled.double(), ones, *args[1:])
    assert torch.equal(scaled >= thresholds[:, None], scaled >= wanted_thresholds[:, None])
    assert tokens.tolist() == wanted.tolist()


def test_draws_what_the_engine_draws() -> None:
    num_tokens = 1100  # the engine takes its short cut from 1025 on
    rows = [Row(row.temperature, row.top_k, row.top_p, row.min_p, i, 3 * i) for i, row in enumerate(ROWS)]
    logits = 2.5 * torch.randn(len(rows), num_tokens)
    logits[3, 5] = torch.nan
    params, positions = [row.params for row in rows], [row.position for row in rows]
    theirs = sample(logits.clone(), params, positions)
    assert triton_sampler.draw(logits, params, positions).tolist() == theirs
    assert theirs[3] == sampler.NO_NUMBER
    assert len(set(theirs)) > len(rows) / 2  # and not always the likeliest


def test_more_candidates_than_fit_and_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search falls back to all logits: the answer is the same."""
    monkeypatch.setattr(module, "MAX_CANDIDATES", 16)
    rows = [Row(top_k=k, top_p=p, seed=k) for k in (1, 3, 17, 60, 900) for p in (1.0, 0.7)]
    logits = torch.randn(len(rows), 1000)
    args = arguments(rows, 1000)
    tokens, thresholds = sample_tokens(logits, *args)
    wanted, wanted_thresholds = naive.sample_tokens(logits.double(), *args)
    assert torch.equal(thresholds.double(), wanted_thresholds)
    assert torch.equal(tokens, wanted)


def test_rows_that_are_no_numbers_get_no_token() -> None:
    rows = [Row(), Row(temperature=0), Row(top_k=3), Row(top_p=0.5), Row(top_k=2)]
    logits = torch.randn(len(rows), 300)
    logits[0, 7] = torch.nan
    logits[1, 299] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    tokens, _ = sample_tokens(logits, *arguments(rows, 300))
    wanted, _ = naive.sample_tokens(logits.double(), *arguments(rows, 300))
    assert tokens[:4].tolist() == [-1] * 4 == wanted[:4].tolist()
    assert tokens[4] == wanted[4] >= 0


def test_the_noise_is_the_engine_s() -> None:
    seeds, positions = torch.tensor([0, 1, -1, 2**62 + 3]), torch.tensor([0, 7, 2**31, 12])
    ids = torch.arange(2**16)
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    theirs = sampler.gumbel(sampler._keys(list(pairs)), ids)
    torch.testing.assert_close(naive.gumbel(seeds, positions, ids), theirs, rtol=1e-6, atol=1e-6)
