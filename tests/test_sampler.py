"""A token is a function of logits, seed and position alone, and over many seeds it follows the softmax."""

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from sampled import sample
from torch import Tensor

from baton.engine import sampler
from baton.engine.penalties import adjust
from baton.engine.sampler import gumbel
from baton.engine.sampling_state import SamplingState, check_sampling, needs_state
from baton.errors import InvalidRequest
from baton.request import Request, RequestId, SamplingParams, TokenBias, TokenSequence

GREEDY = SamplingParams(temperature=0)


def _logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _draw_many(logits: Tensor, num_draws: int, **params: float) -> Counter[int]:
    """`num_draws` seeds on one row of logits."""
    drawn: Counter[int] = Counter()
    for start in range(0, num_draws, 4096):
        seeds = range(start, min(start + 4096, num_draws))
        rows = logits.expand(len(seeds), -1)
        drawn.update(sample(rows, [SamplingParams(seed=s, **params) for s in seeds], [7] * len(seeds)))  # type: ignore[arg-type]
    return drawn


def _reference_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Written as plainly as possible: sort, cut by rank, cut by mass of what is left."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    total, mass, nucleus = sum(float(probs[i]) for i in kept), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += float(probs[i])
        if mass >= top_p * total:
            break
    result = torch.zeros_like(probs)
    result[nucleus] = probs[nucleus] / probs[nucleus].sum()
    return result


def _chi_square_sigmas(drawn: Counter[int], probs: Tensor) -> float:
    """How many standard deviations the statistic lies above its mean; cells that expect fewer than 10 are
    merged."""
    num_draws = sum(drawn.values())
    cells: list[tuple[float, int]] = []
    rest_expected, rest_seen = 0.0, 0
    for token, prob in enumerate(probs.tolist()):
        if prob * num_draws >= 10:
            cells.append((prob * num_draws, drawn[token]))
        else:
            rest_expected, rest_seen = rest_expected + prob * num_draws, rest_seen + drawn[token]
    if rest_expected >= 10:
        cells.append((rest_expected, rest_seen))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_greedy_is_argmax() -> None:
    logits = _logits(5, 100)
    assert sample(logits, [GREEDY] * 5, [0] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "num_draws"), [(40, 30_000), (1100, 8_000)], ids=["all", "candidates"]
)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 12, 1.0), (1.0, 0, 0.9), (1.2, 20, 0.8), (1.0, 1, 1.0)],
    ids=lambda value: str(value),
)
def test_draws_follow_the_distribution(
    vocab_size: int, num_draws: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = _logits(1, vocab_size, seed=1)
    probs = _reference_probs(logits[0], temperature, top_k, top_p)
    drawn = _draw_many(logits, num_draws, temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(drawn) <= set(probs.nonzero()[:, 0].tolist()), "a token that was cut off was drawn"
    if top_k != 1:
        assert _chi_square_sigmas(drawn, probs) < 4.5


def test_the_chi_square_would_notice() -> None:
    """The power of the test above: a temperature that is off by 3 % is seen."""
    logits = _logits(1, 40, seed=1)
    drawn = _draw_many(logits, 30_000, temperature=1.03)
    assert _chi_square_sigmas(drawn, _reference_probs(logits[0], 1.0, 0, 1.0)) > 4.5


def test_positions_are_as_random_as_seeds() -> None:
    logits = _logits(1, 40, seed=2)
    num_draws = 30_000
    tokens = sample(logits.expand(num_draws, -1), [SamplingParams(seed=5)] * num_draws, range(num_draws))
    assert _chi_square_sigmas(Counter(tokens), _reference_probs(logits[0], 1.0, 0, 1.0)) < 4.5
    centred = torch.tensor(tokens, dtype=torch.float64)
    centred -= centred.mean()
    correlation = float((centred[1:] * centred[:-1]).mean() / centred.var())
    assert abs(correlation) < 4 / math.sqrt(num_draws)


def test_noise_of_different_tokens_is_independent() -> None:
    keys = sampler._keys([(seed, 3) for seed in range(20_000)])
    noise = gumbel(keys, torch.arange(16)).double()  # [R, 16]
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    correlations = torch.corrcoef(noise.T) - torch.eye(16)
    assert correlations.abs().max().item() < 5 / math.sqrt(20_000)


def _mixed_rows(rng: random.Random, num_rows: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 0, 1, 7, 40, 512, 700]),
            top_p=rng.choice([1.0, 1.0, 0.2, 0.5, 0.95]),
            seed=rng.getrandbits(64),
        )
        for _ in range(num_rows)
    ]


@pytest.mark.parametrize("vocab_size", [50, 2000])
def test_a_row_does_not_depend_on_its_neighbours(vocab_size: int) -> None:
    rng = random.Random(0)
    logits, params = _logits(24, vocab_size), _mixed_rows(rng, 24)
    positions = [rng.randrange(5000) for _ in range(24)]
    together = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], [params[i]], [positions[i]])[0] for i in range(24)]
    assert alone == together
    order = rng.sample(range(24), 24)
    permuted = sample(logits[order], [params[i] for i in order], [positions[i] for i in order])
    assert permuted == [together[i] for i in order]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0], ids=["flat", "usual", "peaked"])
def test_candidates_only_is_exact(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short cut over the most likely tokens draws what the whole vocabulary would."""
    logits, params = _logits(80, 4000, scale=scale), _mixed_rows(random.Random(1), 64)
    params += [SamplingParams(top_k=700, top_p=0.2, seed=seed) for seed in range(16)]
    positions = list(range(80))
    short_cut = sample(logits, params, positions)
    monkeypatch.setattr(sampler, "_NUM_CANDIDATES", 4000)
    assert sample(logits, params, positions) == short_cut


def test_ties_at_the_cut_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert set(_draw_many(logits, 500, temperature=1.0, top_k=2)) == {0, 1, 2, 3}


def test_seeds_use_all_64_bits() -> None:
    logits = _logits(1, 1000, scale=0.1)
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1, 2**31, 2**33]
    assert len({sample(logits, [SamplingParams(seed=s)], [0])[0] for s in seeds}) > 4


def test_a_row_without_numbers_is_marked_and_the_others_are_drawn() -> None:
    logits = _logits(4, 100)
    logits[1, 3] = torch.nan
    logits[2, 5] = torch.inf
    tokens = sample(logits, [GREEDY, GREEDY, SamplingParams(top_k=5, top_p=0.5), SamplingParams()], [1] * 4)
    assert tokens[1:3] == [-1, -1]
    assert tokens[0] == logits[0].argmax().item() and tokens[3] >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_first_of_equal_ones_is_best_in_any_vocabulary(dtype: torch.dtype) -> None:
    """In bfloat16 many of them are equal."""
    for num_tokens in (100, 256, 2048, 2049):
        logits = _logits(50, num_tokens).to(dtype)
        logits[7, 90:99] = torch.nan
        logits[8] = -torch.inf
        logits[8, 40:] = -torch.finfo(dtype).max
        best = [max(range(num_tokens), key=row.__getitem__) for row in logits.tolist()]
        best[7] = -1
        assert sample(logits, [GREEDY] * 50, [1] * 50) == best


def test_a_tiny_temperature_is_greedy() -> None:
    logits = _logits(8, 300)
    params = [SamplingParams(temperature=1e-9, seed=s) for s in range(8)]
    assert sample(logits, params, [0] * 8) == logits.argmax(-1).tolist()


# --- what a request's own parameters make of the logits ---


def _state(
    params: SamplingParams,
    *,
    prompt: tuple[int, ...] = (0,),
    output: tuple[int, ...] = (),
    vocab_size: int = 50,
    eos: tuple[int, ...] = (),
) -> SamplingState:
    state = SamplingState(Request(RequestId("r"), prompt, params, eos), vocab_size)
    for token_id in output:
        state.append(token_id)
    return state


def _adjusted(
    logits: Tensor, prompt: tuple[int, ...], output: tuple[int, ...], p: SamplingParams
) -> list[float]:
    """Written as plainly as possible, in double precision."""
    result = []
    for token, logit in enumerate(logits.tolist()):
        if token in prompt or token in output:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        logit -= p.frequency_penalty * output.count(token) + p.presence_penalty * (token in output)
        result.append(logit + sum(each.bias for each in p.logit_bias if each.token_id == token))
    return result


def test_penalties_and_biases_equal_their_definition() -> None:
    rng = random.Random(0)
    for trial in range(30):
        rows = []
        for _ in range(rng.randrange(1, 9)):
            params = SamplingParams(
                presence_penalty=rng.choice([0.0, 1.5, -0.5]),
                frequency_penalty=rng.choice([0.0, 0.25, -1.0]),
                repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
                logit_bias=tuple(TokenBias(i, rng.uniform(-5, 5)) for i in rng.sample(range(50), 3)),
            )
            prompt, output = (tuple(rng.choices(range(50), k=rng.randrange(1, 40))) for _ in range(2))
            rows.append((prompt, output, params))
        logits = _logits(len(rows) + 1, 50, seed=trial)
        expected = [_adjusted(row, *given) for row, given in zip(logits, rows, strict=False)]
        adjusted = logits.clone()
        states = [_state(params, prompt=prompt, output=output) for prompt, output, params in rows]
        adjust(adjusted, list(enumerate(states)))
        torch.testing.assert_close(adjusted[:-1], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert torch.equal(adjusted[-1], logits[-1]), "a row without a state was changed"


def test_a_state_told_token_by_token_is_one_told_at_once() -> None:
    """What a worker rebuilds is what another one had."""
    rng = random.Random(1)
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2)
    tokens = tuple(rng.choices(range(50), k=300))
    slow = _state(params, prompt=(3, 3, 4), output=tokens[:150])
    for token_id in tokens[150:]:
        slow.append(token_id)
    fast = _state(params, prompt=(3, 3, 4), output=tokens)
    assert slow.counts is not None and fast.counts is not None
    assert slow.counts.token_ids.tolist() == fast.counts.token_ids.tolist()
    counted = dict(zip(fast.counts.token_ids.tolist(), fast.counts.output_counts.tolist(), strict=True))
    assert counted == {**dict.fromkeys((3, 4), 0), **Counter(tokens)}


def test_only_allowed_tokens_are_drawn() -> None:
    params = [SamplingParams(allowed_token_ids=(3, 17, 49), seed=seed) for seed in range(200)]
    states = [_state(each) for each in params]
    drawn = Counter(sample(_logits(1, 50, scale=1.0).repeat(200, 1), params, [0] * 200, states))
    assert set(drawn) == {3, 17, 49}


def test_bad_words_are_never_completed() -> None:
    words = (TokenSequence((1, 2)), TokenSequence((2,)), TokenSequence((3, 3, 4)))
    params = SamplingParams(bad_words=words)
    for output, forbidden in (
        ((), {2}),
        ((1,), {2}),
        ((3,), {2}),
        ((3, 3), {2, 4}),
        ((9, 3, 3), {2, 4}),
        ((3, 3, 9), {2}),
    ):
        assert set(_state(params, output=output).forbidden()) == forbidden


def test_stop_tokens_wait_for_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,), temperature=0)
    logits = torch.zeros(1, 50)
    logits[0, [7, 9]] = torch.tensor([5.0, 6.0])
    logits[0, 11] = 1
    drawn = [
        sample(logits.clone(), [params], [0], [_state(params, output=output, eos=(9, 999))])[0]
        for output in ((), (1,), (1, 1))
    ]
    assert drawn == [11, 11, 9]


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": 1e9}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logit_bias": (TokenBias(50, 1.0),)}, "logit_bias"),
        ({"logit_bias": (TokenBias(5, math.inf),)}, "logit_bias"),
        ({"logit_bias": (TokenBias(5, 1.0), TokenBias(5, 2.0))}, "logit_bias"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids"),
        ({"bad_words": (TokenSequence((5, 50)),)}, "bad_words"),
        ({"stop_token_ids": (50,)}, "stop_token_ids"),
    ],
    ids=str,
)
def test_what_no_sampler_can_honour_is_refused_by_name(params: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(SamplingParams(**params), 50)
    assert caught.value.param == name


def test_min_p_keeps_what_is_likely_enough() -> None:
    for vocab_size in (40, 1100):
        logits = _logits(1, vocab_size, seed=3, scale=0.8)
        probs = logits[0].double().softmax(-1)
        kept = set((probs >= 0.2 * probs.max()).nonzero()[:, 0].tolist())
        assert 1 < len(kept) < vocab_size
        drawn = _draw_many(logits, 4000, temperature=1.0, min_p=0.2)
        assert set(drawn) == kept


def test_log_probabilities_are_the_model_s_own() -> None:
    logits = _logits(3, 50)
    params = [
        SamplingParams(temperature=0, logprobs=4, logit_bias=(TokenBias(5, 100.0),)),
        SamplingParams(logprobs=0, seed=1),
        GREEDY,
    ]
    states = [_state(params[0]), _state(params[1]), None]
    tokens = sample(logits.clone(), params, [0] * 3, states)
    expected = logits.double().log_softmax(-1)
    assert tokens[0] == 5, "the bias decides"
    said = [state.logprobs for state in states if state is not None]
    assert [each is not None for each in said] == [True, True]
    for row, each in enumerate(said):
        assert each is not None
        assert each.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-5)
    assert said[0] is not None and said[1] is not None
    assert said[0].top_token_ids == tuple(logits[0].topk(4).indices.tolist())
    assert said[0].top_logprobs == pytest.approx(expected[0].topk(4).values.tolist(), abs=1e-5)
    assert said[1].top_token_ids == ()


def test_a_row_that_allows_nothing_is_told_from_one_without_numbers() -> None:
    logits = _logits(3, 50)
    logits[1, 4] = torch.nan
    nothing = SamplingParams(allowed_token_ids=(6,), bad_words=(TokenSequence((6,)),), logprobs=1)
    params = [nothing, nothing, GREEDY]
    states = [_state(nothing), _state(nothing), None]
    tokens = sample(logits, params, [0] * 3, states)
    assert tokens == [sampler.NOTHING_ALLOWED, sampler.NO_NUMBER, logits[2].argmax().item()]
    assert states[0] is not None and states[0].logprobs is None


@pytest.mark.parametrize("vocab_size", [50, 2000])
def test_a_row_with_a_state_does_not_depend_on_its_neighbours(vocab_size: int) -> None:
    rng = random.Random(5)
    params = [
        replace(
            each,
            min_p=rng.choice([0.0, 0.05]),
            presence_penalty=rng.choice([0.0, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.5]),
            allowed_token_ids=rng.choice([(), tuple(range(40))]),
            logit_bias=rng.choice([(), (TokenBias(1, 3.0),)]),
        )
        for each in _mixed_rows(rng, 20)
    ] + _mixed_rows(rng, 4)
    outputs = [tuple(rng.choices(range(50), k=rng.randrange(20))) for _ in params]
    states = [
        _state(each, output=output, vocab_size=vocab_size) if needs_state(each) else None
        for each, output in zip(params, outputs, strict=True)
    ]
    assert None in states and any(states)
    logits, positions = _logits(24, vocab_size), list(range(24))
    together = sample(logits.clone(), params, positions, states)
    alone = [
        sample(logits[i : i + 1].clone(), [params[i]], [positions[i]], [states[i]])[0] for i in range(24)
    ]
    assert alone == together
