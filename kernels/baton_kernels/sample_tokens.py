"""Draws one token for each row of logits: top-k, top-p, min-p and Gumbel noise, without sorting.

    x[i]      = logits[i] / temperature                             temperature 0: the most likely token, nothing else
    kept      = x[i] >= threshold
    threshold = the largest of   min { t in x: #{x > t} < top_k }                       ties are kept as one
                                 min { t in x: mass{x > t} < top_p * mass of the top_k }
                                 max x + log_min_p
    token     = argmax over kept of x[i] + gumbel(seed, position, i)                    the lowest i of equals

    logits [R, V]; temperature, top_p, log_min_p [R] fp32; top_k [R] int32, V or more for all; seed, position [R] int64
    -->  tokens [R] int64, negative where the largest logit is not finite; thresholds [R] fp32

The thresholds are searched for, after an idea of Qrita (arXiv 2602.01518): floats are ordered like integers, and each
round counts, or weighs, what lies above NUM_PIVOTS evenly spaced ones, until a single value is left. Weights are
integers, exp(x - max x) in units of 2^-40, so that sums do not depend on their order and the result is the same
whatever the grid, and the same set as sorting gives. The rounds run over the few logits beyond mean + SIGMAS standard
deviations, which a pass before them has put together; where these are too few or too many, over all of them.

The noise is a pure function of (seed, position, token id): see `naive.gumbel`, whose bits these are. Its
logarithms are taken in double precision: a GPU's fast ones are inexact near 1, where the largest noise comes from.

Grid: (R,). The definition is `naive.sample_tokens`. Floor: the logits once over memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SURVEY_BLOCK, GATHER_BLOCK, SEARCH_BLOCK = 4096, 2048, 1024  # what a program's registers have room for
NUM_PIVOTS = tl.constexpr(8)
MAX_CANDIDATES = 4096
SIGMAS = tl.constexpr(2.5)  # 0.6 % of normally distributed logits
UNIT = tl.constexpr(2.0**40)


@triton.jit
def _order(x):
    """fp32 -> int64 in [0, 2^32) in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def _value(order):
    """The way back."""
    bits = (order - 0x80000000).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top):
    return (tl.exp(x - top) * UNIT).to(tl.int64)


@triton.jit
def _load(ptr, i, n, temperature):
    x = tl.load(ptr + i, mask=i < n, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def _survey(ptr, n, temperature, BLOCK: tl.constexpr):
    """The largest x, infinity if any is NaN, and mean + SIGMAS standard deviations of the finite ones."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    count, total, squares = (
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK], tl.float32),
    )
    for start in range(0, n, BLOCK):
        x = _load(ptr, start + tl.arange(0, BLOCK), n, temperature)
        top = tl.maximum(top, tl.where(x == x, x, float("inf")))
        finite = tl.abs(x) < float("inf")
        x = tl.where(finite, x, 0.0)
        count += finite.to(tl.float32)
        total += x
        squares += x * x
    mean = tl.sum(total, 0) / tl.sum(count, 0)
    variance = tl.sum(squares, 0) / tl.sum(count, 0) - mean * mean
    bound = mean + SIGMAS * tl.sqrt(tl.maximum(variance, 0.0))
    return tl.max(top, 0), bound


@triton.jit
def _gather(
    ptr, value_ptr, id_ptr, n, temperature, top, bound, MAX_CANDIDATES: tl.constexpr, BLOCK: tl.constexpr
):
    """Puts the logits with x >= bound together, the first MAX_CANDIDATES of them: how many there are, and the weight
    of all logits."""
    count = tl.zeros([], tl.int32)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        logits = tl.load(ptr + i, mask=i < n, other=float("-inf"))
        x = tl.div_rn(logits.to(tl.float32), temperature)
        chosen = (x >= bound) & (i < n)
        total += _weight(x, top)
        place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        fits = chosen & (place < MAX_CANDIDATES)
        tl.store(value_ptr + place, logits, mask=fits)
        tl.store(id_ptr + place, i, mask=fits)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.debug_barrier()  # other threads will read what this one stored
    return count, tl.sum(total, 0)


@triton.jit
def _above(ptr, n, temperature, top, pivots, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """How many x are above each pivot, or, WEIGH, their weight: [len(pivots)] int64."""
    found = tl.zeros(pivots.shape, tl.int64)
    for start in range(0, n, BLOCK):
        x = _load(ptr, start + tl.arange(0, BLOCK), n, temperature)
        each = _weight(x, top) if WEIGH else tl.full([BLOCK], 1, tl.int64)
        above = _order(x)[None, :] > pivots[:, None]  # [NUM_PIVOTS, BLOCK]
        found += tl.sum(tl.where(above, each[None, :], 0), 1)
    return found


@triton.jit
def _search(ptr, n, temperature, top, low, high, target, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest order in [low, high] above which there is less than `target`."""
    while high > low:
        width = (high - low) // NUM_PIVOTS + 1
        pivots = low + (tl.arange(0, NUM_PIVOTS) + 1) * width - 1
        enough = _above(ptr, n, temperature, top, pivots, WEIGH, BLOCK).to(tl.float64) >= target
        low += tl.sum(enough.to(tl.int64), 0) * width
        high = tl.minimum(low + width - 1, high)
    return low


@triton.jit
def _splitmix(word):
    word += 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _gumbel(key, ids):
    """key: a uint64 of seed and position."""
    h = (ids.to(tl.uint32) * 0x9E3779B1) ^ key.to(tl.uint32)
    h = _mix(_mix(h) ^ (key >> 32).to(tl.uint32))
    uniform = ((h & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31
    uniform = tl.minimum(uniform, 1 - 2.0**-24).to(tl.float64)
    return -tl.log(-tl.log(1.0 - uniform)).to(tl.float32)


@triton.jit
def _draw(ptr, id_ptr, n, temperature, threshold, key, is_greedy, is_gathered, BLOCK: tl.constexpr):
    """The id with the largest x + noise of those with x >= threshold."""
    best = tl.full([BLOCK], -(2**63), tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _load(ptr, i, n, temperature)
        ids = i
        if is_gathered:
            ids = tl.load(id_ptr + i, mask=i < n, other=0)
        noisy = x
        if not is_greedy:
            noisy = tl.where(x >= threshold, x + _gumbel(key, ids), float("-inf"))
        ranked = ((_order(noisy) - 0x80000000) << 32) | (0x7FFFFFFF - ids)
        best = tl.maximum(best, tl.where(i < n, ranked, -(2**63)))
    return 0x7FFFFFFF - (tl.max(best, 0) & 0xFFFFFFFF)


@triton.jit
def _sample_kernel(
    token_ptr,  # [R]
    threshold_ptr,  # [R]
    logits_ptr,  # [R, V]
    value_ptr,  # [R, MAX_CANDIDATES], of the logits' dtype
    id_ptr,  # [R, MAX_CANDIDATES] int32
    temperature_ptr,  # [R], and so are the others
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    seed_ptr,
    position_ptr,
    stride,
    V,
    MAX_CANDIDATES: tl.constexpr,
    SURVEY_BLOCK: tl.constexpr,
    GATHER_BLOCK: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    is_greedy = temperature == 0
    temperature = tl.where(is_greedy, 1.0, temperature)
    ptr, n, is_gathered = logits_ptr + row * stride, V, False
    value_ptr += row * MAX_CANDIDATES
    id_ptr += row * MAX_CANDIDATES

    top, bound = _survey(ptr, n, temperature, SURVEY_BLOCK)
    threshold = top + tl.load(log_min_p_ptr + row)
    if (not is_greedy) & ((top_k < V) | (top_p < 1)) & (tl.abs(top) < float("inf")):
        num_candidates, total = _gather(
            ptr, value_ptr, id_ptr, n, temperature, top, bound, MAX_CANDIDATES, GATHER_BLOCK
        )
        total = total.to(tl.float64)
        low, high = tl.zeros([], tl.int64), _order(top)
        all_of_them = tl.full([NUM_PIVOTS], -1, tl.int64)
        if num_candidates <= MAX_CANDIDATES:
            among = tl.max(
                _above(value_ptr, num_candidates, temperature, top, all_of_them, True, SEARCH_BLOCK), 0
            )
            if (num_candidates >= top_k) | ((top_k >= V) & (among.to(tl.float64) >= top_p * total)):
                ptr, n, is_gathered, low = value_ptr, num_candidates, True, _order(bound)
        if top_k < V:
            low = _search(ptr, n, temperature, top, low, high, top_k, False, SEARCH_BLOCK)
            kth = tl.full([NUM_PIVOTS], 0, tl.int64) + low
            count = tl.max(_above(ptr, n, temperature, top, kth, False, SEARCH_BLOCK), 0)
            weight = tl.max(_above(ptr, n, temperature, top, kth, True, SEARCH_BLOCK), 0)
            total = (weight + (top_k - count) * _weight(_value(low), top)).to(tl.float64)
        if top_p < 1:
            low = _search(ptr, n, temperature, top, low, high, top_p * total, True, SEARCH_BLOCK)
        threshold = tl.maximum(threshold, _value(low))
    key = _splitmix(
        _splitmix(tl.load(seed_ptr + row).to(tl.uint64)) ^ tl.load(position_ptr + row).to(tl.uint64)
    )
    token = _draw(ptr, id_ptr, n, temperature, threshold, key, is_greedy, is_gathered, SEARCH_BLOCK)
    tl.store(token_ptr + row, tl.where(tl.abs(top) < float("inf"), token, -1))
    tl.store(threshold_ptr + row, tl.where(is_greedy, top, threshold))


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """tokens and thresholds. See the module."""
    num_rows, num_tokens = logits.shape
    per_row = (temperature, top_k, top_p, log_min_p, seeds, positions)
    assert logits.stride(1) == 1 and all(x.shape == (num_rows,) and x.is_contiguous() for x in per_row)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    thresholds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    values = torch.empty(num_rows, MAX_CANDIDATES, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(num_rows, MAX_CANDIDATES, dtype=torch.int32, device=logits.device)
    _sample_kernel[(num_rows,)](
        tokens,
        thresholds,
        logits,
        values,
        ids,
        *per_row,
        logits.stride(0),
        num_tokens,
        MAX_CANDIDATES=MAX_CANDIDATES,
        SURVEY_BLOCK=SURVEY_BLOCK,
        GATHER_BLOCK=GATHER_BLOCK,
        SEARCH_BLOCK=SEARCH_BLOCK,
        num_warps=16,
    )
    return tokens, thresholds
