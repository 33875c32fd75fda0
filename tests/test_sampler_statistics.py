"""Draws follow the distribution that the parameters define, with the power of the tests stated and tried.

A case draws NUM_DRAWS tokens, one per position, and compares their counts with exact probabilities, made in float64
by the plainest sort, by a G test whose threshold a right sampler exceeds once in 10^5 runs (FALSE_ALARM).

Power: a sampler whose distribution is off by a total variation distance of DETECTED or more, which is the largest
error in the probability of any set of tokens, exceeds it in 99.9 % of all runs (MISSED). `test_the_power` computes
that, and draws from such a distribution.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sampled import sample
from torch import Tensor

from baton.engine import sampler
from baton.engine.penalties import adjust
from baton.engine.sampling_state import SamplingState, needs_state
from baton.request import Request, RequestId, SamplingParams, TokenBias, TokenSequence

FALSE_ALARM, MISSED = 1e-5, 1e-3
NUM_DRAWS = 120_000
DETECTED = 0.016  # total variation distance; see test_the_power
VOCAB_SIZE = 40
PROMPT, OUTPUT = (1, 2, 3, 3, 5, 8), (5, 5, 5, 9, 13, 21)

BASE = SamplingParams()
CASES = {
    "plain": BASE,
    "temperature 0.6": replace(BASE, temperature=0.6),
    "temperature 1.8": replace(BASE, temperature=1.8),
    "top_k": replace(BASE, top_k=9),
    "top_p": replace(BASE, top_p=0.85),
    "min_p": replace(BASE, min_p=0.08),
    "top_k, top_p": replace(BASE, top_k=15, top_p=0.8, temperature=1.3),
    "top_k, top_p, min_p": replace(BASE, top_k=20, top_p=0.9, min_p=0.1, temperature=1.5),
    "presence": replace(BASE, presence_penalty=1.2),
    "frequency": replace(BASE, frequency_penalty=0.7, temperature=1.2),
    "repetition": replace(BASE, repetition_penalty=1.5),
    "all penalties": replace(BASE, presence_penalty=-0.5, frequency_penalty=0.4, repetition_penalty=1.3),
    "penalties, top_p": replace(BASE, presence_penalty=0.9, repetition_penalty=1.2, top_p=0.9),
    "bias, allowed, top_k": replace(
        BASE, logit_bias=(TokenBias(3, 2.0), TokenBias(9, -1.0)), allowed_token_ids=tuple(range(25)), top_k=12
    ),
    "bad words, min_p, penalties": replace(
        BASE, bad_words=(TokenSequence((21, 7)),), min_p=0.05, frequency_penalty=0.5, temperature=1.4
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two threads that wait for each other take many times as long on a machine that does something else, too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _logits(vocab_size: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _adjusted(logits: list[float], p: SamplingParams) -> list[float]:
    result = []
    for token, logit in enumerate(logits):
        if token in PROMPT or token in OUTPUT:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        logit -= p.frequency_penalty * OUTPUT.count(token) + p.presence_penalty * (token in OUTPUT)
        logit += sum(each.bias for each in p.logit_bias if each.token_id == token)
        bad = any((*OUTPUT, token)[-len(w.token_ids) :] == w.token_ids for w in p.bad_words)
        allowed = not p.allowed_token_ids or token in p.allowed_token_ids
        result.append(logit if allowed and not bad else -math.inf)
    return result


def _kept(scaled: list[float], p: SamplingParams) -> set[int]:
    """Ties are kept as one."""
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    best = [token for token in order if not p.top_k or scaled[token] >= scaled[order[p.top_k - 1]]]
    weights = {token: math.exp(scaled[token] - scaled[order[0]]) for token in order}
    # The mass that top_p counts is that of the first top_k, one of several equal ones like any other.
    first = best[: p.top_k or None]
    total, mass, smallest = math.fsum(weights[token] for token in first), 0.0, scaled[order[0]]
    for token in first:
        if p.top_p < 1 and mass >= p.top_p * total:
            break
        mass, smallest = mass + weights[token], scaled[token]
    return {t for t in best if scaled[t] >= smallest and (not p.min_p or weights[t] >= p.min_p)}


def _probabilities(logits: Tensor, p: SamplingParams) -> list[float]:
    scaled = [logit / p.temperature for logit in _adjusted(logits.double().tolist(), p)]
    kept = _kept(scaled, p)
    weights = [math.exp(x - max(scaled)) if token in kept else 0.0 for token, x in enumerate(scaled)]
    return [weight / math.fsum(weights) for weight in weights]


def _draw(logits: Tensor, p: SamplingParams, num_draws: int, first: int = 0) -> Counter[int]:
    """One draw per position; test_sampler.py shows that positions are as random as seeds."""
    row = logits.clone()[None]
    if needs_state(p):
        state = SamplingState(Request(RequestId("r"), PROMPT, p), len(logits))
        for token in OUTPUT:
            state.append(token)
        adjust(row, [(0, state)])
    params = [replace(p, seed=7)] * 4000
    drawn: Counter[int] = Counter()
    for start in range(first, first + num_draws, 4000):
        drawn.update(sample(row.repeat(4000, 1), params, range(start, start + 4000)))
    return drawn


def _g_test(drawn: Counter[int], probabilities: list[float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; cells that expect fewer than 10 are taken together."""
    num_draws = sum(drawn.values())
    cells = [(p * num_draws, drawn[token]) for token, p in enumerate(probabilities) if p * num_draws >= 10]
    rest = num_draws - sum(expected for expected, _ in cells)
    if rest >= 10:
        cells.append((rest, num_draws - sum(seen for _, seen in cells)))
    statistic = 2 * math.fsum(seen * math.log(seen / expected) for expected, seen in cells if seen)
    return statistic, len(cells) - 1


def _exceeds(statistic: float, freedom: int, excess: float = 0.0) -> float:
    """The probability that chi-square, with that much non-centrality, exceeds the statistic."""
    j = torch.arange(400, dtype=torch.float64)
    log_poisson = torch.special.xlogy(j, torch.tensor(excess / 2, dtype=torch.float64)) - torch.lgamma(j + 1)
    tails = torch.special.gammaincc(freedom / 2 + j, torch.full_like(j, statistic / 2))
    return float((torch.exp(log_poisson - excess / 2) * tails).sum())


def _critical(freedom: int) -> float:
    low, high = 0.0, 1000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _exceeds(middle, freedom) > FALSE_ALARM else (low, middle)
    return high


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution(name: str) -> None:
    logits = _logits(VOCAB_SIZE)
    probabilities = _probabilities(logits, CASES[name])
    drawn = _draw(logits, CASES[name], NUM_DRAWS)
    assert set(drawn) <= {token for token, p in enumerate(probabilities) if p > 0}
    statistic, freedom = _g_test(drawn, probabilities)
    assert freedom >= 3 and statistic < _critical(freedom)


@pytest.mark.parametrize("name", ["plain", "top_k", "top_k, top_p, min_p", "all penalties"])
def test_draws_from_a_vocabulary_with_candidates(name: str) -> None:
    """8,000 draws from 1,100 tokens: detects a distance of 0.075."""
    logits, params = _logits(1100, seed=1, scale=3.0), CASES[name]
    assert len(logits) > 2 * sampler._NUM_CANDIDATES
    probabilities = _probabilities(logits, params)
    drawn = _draw(logits, params, 8000)
    assert set(drawn) <= {token for token, p in enumerate(probabilities) if p > 0}
    statistic, freedom = _g_test(drawn, probabilities)
    assert statistic < _critical(freedom)


def test_the_power() -> None:
    """The worst case is the one with the most cells. By Cauchy-Schwarz sum (q - p)^2 / p >= (2 distance)^2, and that
    times the number of draws is the non-centrality."""
    for num_draws, distance, freedom in ((NUM_DRAWS, DETECTED, VOCAB_SIZE - 1), (8000, 0.075, 150)):
        critical = _critical(freedom)
        assert _exceeds(critical, freedom, num_draws * (2 * distance) ** 2) >= 1 - MISSED
    logits = _logits(VOCAB_SIZE)
    right = torch.tensor(_probabilities(logits, BASE), dtype=torch.float64)
    assert _g_test(_draw(logits, BASE, NUM_DRAWS), right.tolist())[1] <= VOCAB_SIZE - 1
    # As far off as that, spread so that it is hardest to see: in proportion to the probabilities.
    signs = torch.where(right.cumsum(0) < 0.5, 1.0, -1.0).double()
    wrong = right * (1 + 2 * DETECTED * signs)
    wrong /= wrong.sum()
    assert 0.5 * float((wrong - right).abs().sum()) <= 1.1 * DETECTED
    for first in (0, 10**6, 2**40):
        statistic, freedom = _g_test(_draw(wrong.log().float(), BASE, NUM_DRAWS, first), right.tolist())
        assert statistic > _critical(freedom)


# --- the short cut over the most likely tokens ---


def _tied(num_rows: int, vocab_size: int, rng: random.Random) -> Tensor:
    """From no ties to a handful of different values."""
    rows = []
    for seed in range(num_rows):
        step = rng.choice([0.0, 0.01, 0.25, 1.0, 3.0])
        row = _logits(vocab_size, seed, scale=rng.choice([0.3, 2.0, 6.0]))
        rows.append((row / step).round() * step if step else row)
    return torch.stack(rows)


def _any_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 5, 64, 511, 512, 513, 900, 1999]),
        top_p=rng.choice([1.0, 1.0, 0.1, 0.5, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.5, 1.0]),
        seed=rng.getrandbits(64),
    )


def test_the_short_cut_equals_the_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, ties included, in batches that mix greedy and drawn rows."""
    rng = random.Random(0)
    logits = _tied(400, 2000, rng)
    params, positions = [_any_params(rng) for _ in range(400)], [rng.randrange(10**6) for _ in range(400)]
    short_cut = sample(logits.clone(), params, positions)
    monkeypatch.setattr(sampler, "_NUM_CANDIDATES", 2000)
    assert sample(logits.clone(), params, positions) == short_cut


def test_what_is_kept_is_the_plain_definition_with_ties() -> None:
    """Every token that may be drawn and no other, for hundreds of rows of a few values each: drawn often enough to
    see all that is kept."""
    rng = random.Random(1)
    for seed in range(25):
        logits = (_logits(30, seed) * 2).round() / 2
        params = replace(
            _any_params(rng),
            temperature=1.0,
            top_k=rng.choice([0, 1, 3, 7, 20, 29]),
            min_p=rng.choice([0, 0.1]),
        )
        kept = {token for token, p in enumerate(_probabilities(logits, params)) if p > 4e-3}
        drawn = _draw(logits, params, 4000)
        assert kept <= set(drawn) <= {t for t, p in enumerate(_probabilities(logits, params)) if p > 0}, (
            params
        )
