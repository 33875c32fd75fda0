"""Draws the next token of many sequences at once, each with parameters of its own.

The randomness is a pure function of (seed, position of the new token, token id): with Gumbel noise g made of
a hash of these three, argmax(logits / temperature + g) is a draw from the softmax. There is no state, so a
sequence gets the same tokens alone or in any batch, after preemption, and on another worker that takes it
over.

    kept = the top_k most likely tokens, then of these the fewest that together reach top_p, then of these those
    that are at least min_p times as likely as the best; ties are kept as one

Penalties, biases, masks and grammars come first, see `penalties`. Log probabilities are the model's own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from baton.engine.penalties import adjust
from baton.engine.sampling_state import SamplingState
from baton.request import SamplingParams, TokenLogprobs

# Noise for a whole vocabulary costs more than the rest. Nearly always only the most likely tokens can be
# drawn.
_NUM_CANDIDATES = 512
_MAX_NOISE = 32 * math.log(2) + 1e-3  # see `gumbel`: of the smallest uniform number, 2^-32

_PART = 256  # tokens of a vocabulary, see `_best`

_MASK64 = 2**64 - 1


NO_NUMBER = -1  # in place of a token: the model's logits are not finite
NOTHING_ALLOWED = -2  # the request's masks leave no token

# Of a token whose probability is 0, as at OpenAI.
LEAST_LOGPROB = -9999.0


class Drawn(NamedTuple):
    """Where the logits are on a device, it may not have come to them yet."""

    tokens: Tensor  # [R] int64, on the device; negative where there is none
    said: Tensor  # [len(wanted), V] float32: the model's logits where log probabilities are wanted
    wanted: list[tuple[int, SamplingState]]  # row, and whose

    def note_logprobs(self, tokens: Sequence[int]) -> None:
        """tokens: the same, known by now."""
        _note_logprobs(self.said, [(tokens[row], state) for row, state in self.wanted])


def joined(parts: Sequence[Drawn]) -> Drawn:
    """Of rows that were drawn one by one."""
    wanted = [(row, state) for row, part in enumerate(parts) for _, state in part.wanted]
    return Drawn(torch.cat([p.tokens for p in parts]), torch.cat([p.said for p in parts]), wanted)


def draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    states: Sequence[SamplingState | None] = (),
) -> Drawn:
    """logits [R, V], which may be changed; positions: index of the new token in its sequence, prompt included."""
    if not params:
        return Drawn(torch.zeros(0, dtype=torch.int64, device=logits.device), logits[:0], [])
    stateful = [(row, state) for row, state in enumerate(states) if state is not None]
    wanted = [(row, state) for row, state in stateful if state.params.logprobs is not None]
    said = logits[[row for row, _ in wanted]].float() if wanted else logits[:0]  # before it is changed
    finite = None
    if stateful:
        finite = logits.max(dim=-1).values.isfinite()
        logits = logits.float()
        adjust(logits, stateful)
    tokens = _sample(logits, params, positions)
    if finite is not None:
        tokens = torch.where(finite | (tokens >= 0), tokens, NO_NUMBER)
        tokens = torch.where(finite & (tokens < 0), NOTHING_ALLOWED, tokens)
    return Drawn(tokens, said, wanted)


def _sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    if logits.device.type == "cuda":
        from baton.engine import triton_sampler  # Triton is there with CUDA builds of torch only

        return triton_sampler.draw(logits, params, positions)
    values, ids = _best(logits)
    tokens = ids.masked_fill(~values.isfinite(), NO_NUMBER)
    drawn = [row for row, param in enumerate(params) if param.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        scaled = logits[rows].float() / _column([max(params[r].temperature, 1e-5) for r in drawn], logits)
        new = _draw(
            scaled,
            _column([params[r].top_k or logits.shape[-1] for r in drawn], logits, torch.int64),
            _column([params[r].top_p for r in drawn], logits),
            _column([math.log(params[r].min_p) if params[r].min_p else -math.inf for r in drawn], logits),
            _keys([(params[r].seed or 0, positions[r]) for r in drawn]).to(logits.device),
        )
        tokens[rows] = torch.where(tokens[rows] < 0, tokens[rows], new)
    return tokens


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest value, NaN if any is, and the first place where it is. Torch looks for both at once
    without vector instructions, so the place is looked for in the right part of the row alone."""
    num_tokens = logits.shape[-1]
    if num_tokens % _PART:
        best = logits.max(dim=-1)
        return best.values, best.indices
    parts = logits.reshape(len(logits), -1, _PART)
    values, part = parts.amax(-1).max(-1)
    rows = torch.arange(len(parts), device=logits.device)
    return values, part * _PART + parts[rows, part].max(-1).indices


def _note_logprobs(logits: Tensor, rows: Sequence[tuple[int, SamplingState]]) -> None:
    """logits [len(rows), V] float32."""
    for row, (token, state) in zip(logits, rows, strict=True):
        state.logprobs = None
        if token >= 0:
            log_probs = row.log_softmax(-1).clamp_(min=LEAST_LOGPROB)
            top = log_probs.topk(min(state.params.logprobs or 0, len(row)))
            state.logprobs = TokenLogprobs(
                float(log_probs[token]), tuple(top.indices.tolist()), tuple(top.values.tolist())
            )


def _draw(scaled: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, keys: Tensor) -> Tensor:
    """scaled [R, V], top_k, top_p, log_min_p [R, 1], keys [R, 2] -> [R]."""
    num_tokens = scaled.shape[-1]
    if num_tokens <= 2 * _NUM_CANDIDATES:
        return _draw_from_all(scaled, top_k, top_p, log_min_p, keys)
    values, ids = scaled.topk(_NUM_CANDIDATES)  # [R, C], best first
    threshold = _threshold(values, scaled.logsumexp(-1, keepdim=True), top_k, top_p)
    threshold = torch.maximum(threshold, values[:, :1] + log_min_p)
    winner = (values.masked_fill(values < threshold, -torch.inf) + gumbel(keys, ids)).max(-1, keepdim=True)
    tokens = ids.gather(-1, winner.indices)[:, 0]

    # Could a token that is no candidate have won? Not when the last candidate is below the threshold, nor when no
    # noise could lift it to the winner. And top_p of a top_k that reaches beyond the candidates is not known here.
    last = values[:, -1:]
    reachable = (last >= threshold) & (last + _MAX_NOISE >= winner.values)
    unknown = (top_k > _NUM_CANDIDATES) & (top_k < num_tokens) & (top_p < 1)
    rows = (reachable | unknown)[:, 0].nonzero()[:, 0]
    if len(rows):
        tokens[rows] = _draw_from_all(scaled[rows], top_k[rows], top_p[rows], log_min_p[rows], keys[rows])
    return tokens


def _draw_from_all(scaled: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, keys: Tensor) -> Tensor:
    num_tokens = scaled.shape[-1]
    threshold = scaled.max(-1, keepdim=True).values + log_min_p
    if bool(((top_k < num_tokens) | (top_p < 1)).any()):
        ordered = scaled.sort(dim=-1, descending=True).values
        by_rank = _threshold(ordered, scaled.logsumexp(-1, keepdim=True), top_k, top_p)
        threshold = torch.maximum(threshold, by_rank)
    scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    return (scaled + gumbel(keys, torch.arange(num_tokens, device=scaled.device))).argmax(dim=-1)


def _threshold(ordered: Tensor, log_norm: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest value that is kept, [R, 1]; -inf where all are.

    `ordered` [R, C] are the largest values, best first, log_norm that of all values. Where C is too small to
    tell, the result is the smallest of `ordered` or less.
    """
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    probs = (ordered - log_norm).exp().masked_fill_(rank >= top_k, 0)
    mass = probs.cumsum(-1)
    total = torch.where(top_k <= ordered.shape[-1], mass[:, -1:], 1.0)
    kept = (rank < top_k) & ((mass - probs < top_p * total) | (top_p >= 1))
    num_kept = kept.sum(-1, keepdim=True).clamp_(min=1)
    smallest = ordered.gather(-1, num_kept - 1)
    return smallest.masked_fill((top_k >= ordered.shape[-1]) & (top_p >= 1), -torch.inf)


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Noise of token `ids` ([V] or [R, V]) under keys [R, 2] int32: [R, V] float32."""
    hashed = ids.to(torch.int32) * _int32(0x9E3779B1) ^ keys[:, :1]
    hashed = _mix(_mix(hashed) ^ keys[:, 1:])
    # Small values of `uniform` make large noise, so they must be exact; log1p keeps that. The clamp bounds
    # the other end.
    uniform = ((hashed & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
    return -(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))).log()


def _mix(hashed: Tensor) -> Tensor:
    """murmur3's finaliser on int32, in which every bit of the input changes every bit of the result."""
    hashed = (hashed ^ _shift(hashed, 16)) * _int32(0x85EBCA6B)
    hashed = (hashed ^ _shift(hashed, 13)) * _int32(0xC2B2AE35)
    return hashed ^ _shift(hashed, 16)


def _shift(hashed: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's is arithmetic on int32."""
    return (hashed >> bits) & ((1 << (32 - bits)) - 1)


def _int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _keys(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Two 32-bit words for each (seed, position)."""
    words = [_splitmix64(_splitmix64(seed & _MASK64) ^ position) for seed, position in pairs]
    return torch.tensor(
        [(_int32(word & 0xFFFFFFFF), _int32(word >> 32)) for word in words], dtype=torch.int32
    )


def _splitmix64(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _MASK64
    return word ^ word >> 31


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
