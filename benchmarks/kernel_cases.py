"""What bench_kernels.py measures: the kernels at the shapes of an 8B Llama, and their peers.

Peers, where they are installed: torch's scaled_dot_product_attention and FlexAttention (both on contiguous K and V,
which they need not look up), its varlen_attn (on pages, where this release of torch has them), FlashInfer (paged), and
the definition in plain torch under torch.compile. Only torch, Triton and transformers are needed.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Run = Callable[[], Any]


@dataclass(frozen=True)
class Shapes:
    """`scale` divides the numbers of tokens, sequences and blocks, for the test."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    mlp: int = 14336
    vocab: int = 128256
    layers: int = 32
    block_size: int = 64
    scale: int = 1

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    name: str
    run: Run
    num_bytes: float = 0  # read or written at least
    num_flops: float = 0
    peers: dict[str, Run] = field(default_factory=dict)
    captured: bool = False  # it launches graphs itself
    only_reads: bool = False  # next to nothing is written


@dataclass(frozen=True)
class Cache:
    """One layer's K and V of sequences of equal length, paged and contiguous."""

    k: Tensor  # [num_blocks, block_size, kv_heads, dim]
    v: Tensor
    tables: Tensor  # [B, N] int32
    lens: Tensor  # [B] int32
    key: Tensor  # [B, kv_heads, C, dim]
    value: Tensor


def make_cache(s: Shapes, num_seqs: int, context_len: int) -> Cache:
    per_seq = -(-context_len // s.block_size)
    k, v = s.randn(2, num_seqs * per_seq, s.block_size, s.kv_heads, s.dim)
    tables = torch.randperm(num_seqs * per_seq, device=s.device).view(num_seqs, per_seq)
    lens = torch.full((num_seqs,), context_len, dtype=torch.int32, device=s.device)
    key, value = (
        cache[tables].view(num_seqs, -1, s.kv_heads, s.dim)[:, :context_len].transpose(1, 2).contiguous()
        for cache in (k, v)
    )
    return Cache(k, v, tables.int(), lens, key, value)


def decode_cases(s: Shapes) -> Iterator[Case]:
    from baton_kernels.decode_attention import paged_decode_attention

    for num_seqs, context_len in ((1, 4096), (32, 4096), (64, 4096), (256, 1024)):
        num_seqs, context_len = max(num_seqs // s.scale, 1), max(context_len // s.scale, 1)
        cache = make_cache(s, num_seqs, context_len)
        query = s.randn(num_seqs, s.heads, s.dim)
        args = query, cache.k, cache.v, cache.tables, cache.lens, s.dim**-0.5
        splits = None if s.device == "cuda" else 2  # None: as the GPU's number of processors suggests
        peers: dict[str, Run] = {"sdpa": partial(_sdpa, query[:, :, None], cache, causal=False)}
        if s.device == "cuda":
            peers |= {"flex": _flex(query[:, :, None], cache, causal=False)}
            peers |= _varlen(s, query, cache, starts=torch.arange(num_seqs + 1, device=s.device), longest=1)
            peers |= _flashinfer_decode(s, query, cache)
        num_bytes = 2 * num_seqs * context_len * s.kv_heads * s.dim * s.dtype.itemsize
        run = partial(paged_decode_attention, *args, num_splits=splits)
        name = f"decode {num_seqs} x {context_len}"
        yield Case(name, run, num_bytes=num_bytes, peers=peers, only_reads=True)


def prefill_cases(s: Shapes) -> Iterator[Case]:
    from baton_kernels.prefill_attention import paged_prefill_attention

    for num_seqs, prefix, chunk in (
        (1, 0, 4096),
        (4, 0, 2048),
        (1, 0, 16384),
        (1, 8192, 2048),
        (8, 4096, 256),
    ):
        prefix, chunk = prefix // s.scale, max(chunk // s.scale, 1)
        cache = make_cache(s, num_seqs, prefix + chunk)
        query = s.randn(num_seqs * chunk, s.heads, s.dim)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=s.device) * chunk
        args = query, cache.k, cache.v, cache.tables, starts, cache.lens, s.dim**-0.5
        peers: dict[str, Run] = {}
        if prefix == 0:
            of_heads = query.view(num_seqs, chunk, s.heads, s.dim).transpose(1, 2)
            peers["sdpa"] = partial(_sdpa, of_heads, cache, causal=True)
            if s.device == "cuda":
                peers["flex"] = _flex(of_heads, cache, causal=True)
        if s.device == "cuda":
            peers |= _varlen(s, query, cache, starts=starts, longest=chunk)
            peers |= _flashinfer_prefill(s, query, starts, cache)
        visible = num_seqs * chunk * (prefix + (chunk + 1) / 2)
        run = partial(paged_prefill_attention, *args)
        name = f"prefill {num_seqs} x ({prefix} + {chunk})"
        yield Case(name, run, num_flops=4 * s.dim * s.heads * visible, peers=peers)


def token_cases(s: Shapes) -> Iterator[Case]:
    from baton_kernels import naive
    from baton_kernels.cache_write import rope_write_kv
    from baton_kernels.rms_norm import add_rms_norm
    from baton_kernels.silu_mul import silu_mul

    size = s.dtype.itemsize
    for num_tokens in (64, 8192):
        num_tokens = max(num_tokens // s.scale, 1)
        cache = make_cache(s, 1, num_tokens)
        query, key = s.randn(num_tokens, s.heads, s.dim), s.randn(num_tokens, s.kv_heads, s.dim)
        cos = torch.rand(num_tokens, s.dim // 2, device=s.device)
        slots = torch.randperm(num_tokens, device=s.device)
        args = query, key, key, cache.k, cache.v, slots, cos, cos
        yield Case(
            f"rope-write {num_tokens}",
            partial(rope_write_kv, *args),
            num_bytes=2 * size * (query.numel() + 2 * key.numel()) + 8 * cos.numel(),
            peers=_compiled(s, _rope_write, *args),
        )
        x, weight = s.randn(num_tokens, s.hidden), s.randn(s.hidden)
        yield Case(
            f"add-rms-norm {num_tokens}",
            partial(add_rms_norm, x, x.clone(), weight, 1e-5),
            num_bytes=4 * size * x.numel(),
            peers=_compiled(s, naive.add_rms_norm, x, x.clone(), weight, 1e-5),
        )
        x = s.randn(num_tokens, 2 * s.mlp)
        yield Case(
            f"silu-mul {num_tokens}",
            partial(silu_mul, x),
            num_bytes=1.5 * size * x.numel(),
            peers={"definition": partial(naive.silu_mul, x)} | _compiled(s, naive.silu_mul, x),
        )


def block_cases(s: Shapes) -> Iterator[Case]:
    from baton_kernels import naive
    from baton_kernels.copy_blocks import copy_blocks
    from baton_kernels.wire_blocks import pack_blocks, unpack_blocks

    layer = 2 * s.block_size * s.kv_heads * s.dim * s.dtype.itemsize
    num_layers, num_blocks = 32, max(512 // s.scale, 4)
    pool = torch.randint(256, (num_blocks, num_layers * layer), dtype=torch.uint8, device=s.device)
    ids = torch.randperm(num_blocks, device=s.device)
    half = num_blocks // 2
    src, dst = ids[:half].clone(), ids[half : 2 * half].clone()
    copied = 2 * half * pool.shape[1]
    yield Case(f"copy-blocks {half}", partial(copy_blocks, pool, src, dst), num_bytes=copied)
    which = ids[: max(half // 4, 1)].clone()  # of a 4k prompt
    tokens = torch.arange(len(which), device=s.device) * s.block_size
    for layers in (1, num_layers):
        planes = naive.Planes(0, 2 * layers, s.kv_heads, s.dim * s.dtype.itemsize)
        args = pool, which, tokens, s.block_size, planes
        wire, _ = pack_blocks(*args)
        moved = 2 * wire.numel()
        name = f"{len(which)} blocks, {layers} layers"
        select: dict[str, Run] = {"index_select": partial(_gather, pool, which, wire.shape[1])}
        yield Case(f"pack {name}", lambda args=args: pack_blocks(*args)[0], num_bytes=moved, peers=select)
        yield Case(f"unpack {name}", partial(unpack_blocks, *args, wire), num_bytes=moved)


def sampler_cases(s: Shapes) -> Iterator[Case]:
    from baton_kernels import naive
    from baton_kernels.sample_tokens import sample_tokens

    for num_rows in (1, 32, 256):
        num_rows = max(num_rows // s.scale, 2)
        logits = 3 * s.randn(num_rows, s.vocab)
        for name, top_k, top_p in (
            ("all", s.vocab, 1.0),
            ("top-k 40", 40, 1.0),
            ("top-k 40, top-p 0.9", 40, 0.9),
        ):
            columns = (
                (1.0, torch.float32),
                (top_k, torch.int32),
                (top_p, torch.float32),
                (-torch.inf, torch.float32),
            )
            args = [torch.full((num_rows,), value, dtype=dtype, device=s.device) for value, dtype in columns]
            args += [torch.arange(num_rows, device=s.device)] * 2  # seeds, positions
            yield Case(
                f"sample {num_rows}, {name}",
                lambda args=args, logits=logits: sample_tokens(logits, *args)[0],
                num_bytes=logits.nbytes,
                only_reads=True,
                peers={"sort": lambda args=args, logits=logits: naive.sample_tokens(logits, *args)[0]},
            )


def step_cases(s: Shapes) -> Iterator[Case]:
    """The whole decode step of a model with random weights, as the engine captures it; its peer is the same without a
    graph. Weights and KV are read once: the floor."""
    from kernel_step import DecodeStep, make_model

    model = make_model(s)
    for num_seqs, context_len in ((1, 4096), (32, 4096), (128, 1024)):
        num_seqs, context_len = max(num_seqs // s.scale, 1), max(context_len // s.scale, 1)
        step = DecodeStep(s, model, num_seqs, context_len)
        yield Case(
            f"decode-step {num_seqs} x {context_len}, {s.layers} layers",
            step.replay,
            num_bytes=step.num_bytes,
            peers={"no-graph": step.run},
            captured=True,
            only_reads=True,
        )


def all_cases(s: Shapes) -> Iterator[Case]:
    for family in (step_cases, decode_cases, prefill_cases, token_cases, block_cases, sampler_cases):
        yield from family(s)


def _gather(pool: Tensor, ids: Tensor, num_bytes: int) -> Tensor:
    return pool[:, :num_bytes].index_select(0, ids)


def _sdpa(query: Tensor, cache: Cache, *, causal: bool) -> Tensor:
    """query [B, H, t, D] -> [B * t, H, D]."""
    out = F.scaled_dot_product_attention(query, cache.key, cache.value, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _flex(query: Tensor, cache: Cache, *, causal: bool) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = cache.key.shape[2]
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cuda")
    attend = torch.compile(flex_attention)

    def run() -> Tensor:
        out: Tensor = attend(query, cache.key, cache.value, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def _varlen(s: Shapes, query: Tensor, cache: Cache, *, starts: Tensor, longest: int) -> dict[str, Run]:
    """torch's own paged attention, from the release on that has it."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return {}
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if "block_table" not in inspect.signature(attend).parameters:
        return {}
    pages = {"block_table": cache.tables, "seqused_k": cache.lens, "enable_gqa": True, "window_size": (-1, 0)}
    room = cache.tables.shape[1] * s.block_size
    return {"varlen": partial(attend, query, cache.k, cache.v, starts.int(), None, longest, room, **pages)}


def _flashinfer_workspace() -> Tensor:
    return torch.empty(128 << 20, dtype=torch.uint8, device="cuda")


def _pages(s: Shapes, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's table: row starts, block ids in a row, positions in the last block."""
    num_seqs, per_seq = cache.tables.shape
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda") * per_seq
    return starts, cache.tables.flatten(), (cache.lens - 1) % s.block_size + 1


def _flashinfer_decode(s: Shapes, query: Tensor, cache: Cache) -> dict[str, Run]:
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    flashinfer = importlib.import_module("flashinfer")

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _flashinfer_workspace(), "NHD", use_tensor_cores=True
    )
    kind = {"q_data_type": s.dtype, "kv_data_type": s.dtype}
    wrapper.plan(*_pages(s, cache), s.heads, s.kv_heads, s.dim, s.block_size, **kind)
    return {"flashinfer": lambda: wrapper.run(query, (cache.k, cache.v))}


def _flashinfer_prefill(s: Shapes, query: Tensor, starts: Tensor, cache: Cache) -> dict[str, Run]:
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    flashinfer = importlib.import_module("flashinfer")

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_flashinfer_workspace(), "NHD")
    kind = {"causal": True, "q_data_type": s.dtype, "kv_data_type": s.dtype}
    wrapper.plan(starts, *_pages(s, cache), s.heads, s.kv_heads, s.dim, s.block_size, **kind)
    return {"flashinfer": lambda: wrapper.run(query, (cache.k, cache.v))}


def _rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """naive.rope_write_kv where all slots are written: a graph cannot capture the choice of some."""
    from baton_kernels import naive

    query.copy_(naive.rope(query, cos, sin))
    where = naive.Positions(slots // k_cache.shape[1], slots % k_cache.shape[1])
    naive.write_kv(naive.rope(key, cos, sin), value, k_cache, v_cache, where)


def _compiled(s: Shapes, function: Callable[..., Any], *args: Any) -> dict[str, Run]:
    return {"torch.compile": partial(torch.compile(function), *args)} if s.device == "cuda" else {}
