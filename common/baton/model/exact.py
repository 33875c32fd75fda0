"""Bit-exact mode: a token's logits and KV are a function of its sequence alone, to the last bit.

Floating-point sums depend on their order, and the order on the shape of what a library is given: on the number of
rows of a batch, on where a chunk of a prompt ends. So here every operation always gets one shape:

    a step is cut into tiles of TILE tokens, the last one padded, and all layers run on one tile after another;
    then the head runs on the tokens whose logits are wanted, TILE of them at a time;
    attention goes over the context in pieces of CONTEXT positions, counted from position 0, with a running softmax.

A tile's later tokens find the KV of its earlier ones, and later tiles that of earlier tiles, because every layer
writes before it reads. What is left to chance is whether an operation treats all rows of one shape alike. Matrix
products of MKL do; `prove` tries it on the loaded model and refuses one that does not, such as one whose experts get
rows sorted by what all tokens of a tile chose.

    N tokens of the step, T = TILE, C = CONTEXT positions, H heads, Hkv KV heads, G = H / Hkv, D dim, B blocks
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baton.errors import ConfigError
from baton.model.attention import Attend, Chunk, Options, PagedLayer
from baton.model.split import Split
from baton_kernels import naive

TILE = 16
CONTEXT = 128


def check(dtype: str, device: torch.device) -> None:
    """Raises ConfigError."""
    if device.type != "cpu":
        raise ConfigError("--bit-exact runs on the CPU only: use --device cpu")
    if dtype != "float32":
        raise ConfigError(f"--bit-exact computes in float32, not in {dtype}: use --dtype float32")


def arithmetic() -> str:
    """Names what decides the last bit; equal on machines that give the same."""
    return f"exact {TILE} {CONTEXT} torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


class Piece(NamedTuple):
    """CONTEXT positions of the context of each token of a tile."""

    positions: naive.Positions  # [T, C]; one that the token does not see is replaced by the token's own
    bias: Tensor  # [T, 1, 1, C]: 0 for a position that the token sees, -inf else
    seen: Tensor  # [T, 1, 1, 1] bool: whether the token sees any


class Tile(NamedTuple):
    start: int  # of its tokens in the step
    num_tokens: int  # those after them are padding, which sees what the last one sees
    positions: Tensor  # [T]
    writes: naive.Positions  # [num_tokens]
    pieces: dict[naive.Window | None, list[Piece]]


class ExactPlanner:
    """Implements Planner."""

    def __init__(self, layers: tuple[PagedLayer, ...], block_size: int) -> None:
        self._layers = layers
        self._block_size = block_size
        self._windows = {layer.window for layer in layers}

    def plan(self, chunks: Sequence[Chunk], positions: Tensor, blocks: Tensor) -> "ExactStep":
        width = max(len(chunk.block_table) for chunk in chunks)
        tables = torch.tensor([[*c.block_table, *[0] * (width - len(c.block_table))] for c in chunks])
        chunk_of = torch.arange(len(chunks)).repeat_interleave(torch.tensor([c.num_tokens for c in chunks]))
        return ExactStep(self._layers, list(self._tiles(tables, chunk_of, positions, blocks)))

    def _tiles(self, tables: Tensor, chunk_of: Tensor, positions: Tensor, blocks: Tensor) -> Iterator[Tile]:
        """tables [chunks, B]; chunk_of, positions, blocks [N]."""
        for start in range(0, len(positions), TILE):
            tokens = torch.arange(start, start + TILE).clamp_(max=len(positions) - 1)
            num_tokens = min(TILE, len(positions) - start)
            own = positions[tokens]
            writes = naive.Positions(blocks[tokens[:num_tokens]], own[:num_tokens] % self._block_size)
            pieces = {
                window: list(_pieces(tables[chunk_of[tokens]], own, self._block_size, window))
                for window in self._windows
            }
            yield Tile(start, num_tokens, own, writes, pieces)


class ExactStep:
    """Implements StepAttention; `ExactModel` goes through its tiles."""

    def __init__(self, layers: tuple[PagedLayer, ...], tiles: list[Tile]) -> None:
        self.num_layers_seen = 0  # by the tile at work
        self.on_written: Callable[[int], None] | None = None
        self._layers = layers
        self._tiles = tiles
        self._tile = tiles[0]

    def tiles(self) -> Iterator[Tile]:
        for tile in self._tiles:
            self._tile, self.num_layers_seen = tile, 0
            yield tile

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        self.num_layers_seen += 1
        kv, k_cache, v_cache, window, writes = self._layers[module.layer_idx]  # type: ignore[index]
        if writes:
            num_tokens = self._tile.num_tokens
            value_kept = value[:num_tokens, :, : v_cache.shape[-1]]
            naive.write_kv(key[:num_tokens], value_kept, k_cache, v_cache, self._tile.writes)
            # A layer is written when the last tile has been there.
            if self.on_written is not None and self._tile is self._tiles[-1]:
                self.on_written(kv)
        if v_cache.shape[-1] == 0:  # V is the front of K, see mla.py
            v_cache = k_cache[..., : value.shape[-1]]
        return attend_in_pieces(query, k_cache, v_cache, self._tile.pieces[window], options)


class Output(NamedTuple):
    logits: Tensor  # [1, wanted, V]


class ExactModel(nn.Module):
    """Stands for the model, whose mixture-of-experts layers compute each token's experts by themselves from now on
    where they can. Implements Split."""

    def __init__(self, parts: Split) -> None:
        super().__init__()
        self.model = parts.model
        self.config = self.model.config
        self._parts = parts
        self.model.set_experts_implementation("batched_mm")

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        baton_batch: ExactStep,
        **others: Any,
    ) -> Output:
        """input_ids [1, N]; logits_to_keep: of which of them, in any order, logits are wanted."""
        return Output(self.logits(self.states(input_ids, position_ids, baton_batch)[logits_to_keep])[None])

    def states(self, input_ids: Tensor, position_ids: Tensor, baton_batch: Attend) -> Tensor:
        assert isinstance(baton_batch, ExactStep)
        states = [
            self._parts.states(
                F.pad(input_ids[:, tile.start : tile.start + tile.num_tokens], (0, TILE - tile.num_tokens)),
                tile.positions[None],
                baton_batch,
            )[: tile.num_tokens]
            for tile in baton_batch.tiles()
        ]
        return torch.cat(states)

    def logits(self, states: Tensor) -> Tensor:
        parts = [self._parts.logits(_padded(part))[: len(part)] for part in torch.split(states, TILE)]
        return torch.cat(parts)


def _padded(states: Tensor) -> Tensor:
    """Of TILE tokens."""
    return torch.cat([states, states.new_zeros(TILE - len(states), *states.shape[1:])])


@torch.inference_mode()
def prove(model: ExactModel, layers: tuple[PagedLayer, ...], pool: Tensor, block_size: int) -> None:
    """Before anything is in the pool, [blocks, bytes]: a short prompt at once and in parts, so that its tokens stand
    in other places among others, gives the same bits. Raises ConfigError."""
    planner = ExactPlanner(layers, block_size)
    num_tokens = min(TILE, len(pool) * block_size)
    used = pool[: -(-num_tokens // block_size)]
    untouched = used.clone()
    seen = []
    for size in (num_tokens, 5, 11):
        used.copy_(untouched)
        parts = torch.split(torch.arange(num_tokens), size)
        logits = [_prove_part(model, planner, part, block_size) for part in parts]
        seen.append((torch.cat(logits), used.clone()))
    used.copy_(untouched)
    if not all(_same_bits(logits, seen[0][0]) and _same_bits(kv, seen[0][1]) for logits, kv in seen):
        raise ConfigError(
            f"{type(model.model).__name__} cannot be bit-exact on this machine: what it computes for a token depends "
            "on the other tokens of a batch; leave out --bit-exact"
        )


def _prove_part(model: ExactModel, planner: ExactPlanner, positions: Tensor, block_size: int) -> Tensor:
    """Tokens 0, 1, 0, 1, ... at these positions, in the first blocks of the pool: logits [len(positions), V]."""
    blocks = positions // block_size
    table = range(int(blocks[-1]) + 1)
    step = planner.plan([Chunk(int(positions[0]), len(positions), table)], positions, blocks)
    wanted = torch.arange(len(positions))
    ids, places = (positions % 2)[None], positions[None]
    output: Output = model(ids, position_ids=places, use_cache=False, logits_to_keep=wanted, baton_batch=step)
    return output.logits[0]


def _pieces(
    tables: Tensor, positions: Tensor, block_size: int, window: naive.Window | None
) -> Iterator[Piece]:
    """tables [T, B], positions [T]."""
    own = positions[:, None]
    first = torch.zeros_like(own) if window is None else window.first(positions)[:, None]
    for start in range(int(first.min()) // CONTEXT * CONTEXT, int(positions.max()) + 1, CONTEXT):
        index = torch.arange(start, start + CONTEXT)
        visible = (index >= first) & (index <= own)
        index = torch.where(visible, index, own)
        blocks = tables.gather(1, index // block_size)
        bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        seen = visible.any(-1)[:, None, None, None]
        yield Piece(naive.Positions(blocks, index % block_size), bias[:, None, None], seen)


def attend_in_pieces(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, pieces: Sequence[Piece], options: Options
) -> Tensor:
    """query [T, H, Dk] -> [T, H, Dv]. A token keeps what it has, bit for bit, where a piece has nothing for it."""
    num_kv_heads = k_cache.shape[2]
    grouped = query.view(TILE, num_kv_heads, -1, query.shape[-1])  # [T, Hkv, G, Dk]
    highest = grouped.new_full((*grouped.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(highest)
    out = grouped.new_zeros(*grouped.shape[:3], v_cache.shape[-1])
    for positions, bias, seen in pieces:
        key = naive.read_kv(k_cache, positions)  # [T, C, Hkv, Dk]
        value = naive.read_kv(v_cache, positions)
        scores = grouped @ key.permute(0, 2, 3, 1) * options.scale  # [T, Hkv, G, C]
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = scores + bias
        higher = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights, rest = torch.exp(scores - higher), torch.exp(highest - higher)
        total = torch.where(seen, total * rest + weights.sum(-1, keepdim=True), total)
        out = torch.where(seen, out * rest + weights @ value.transpose(1, 2), out)
        highest = torch.where(seen, higher, highest)
    if options.sinks is not None:
        # A sink takes its share and gives nothing. One far above all scores would overflow: it is the highest then.
        sink = options.sinks.float().view(num_kv_heads, -1, 1)
        higher = torch.maximum(highest, sink)
        rest = torch.exp(highest - higher)
        total, out = total * rest + torch.exp(sink - higher), out * rest
    normalised: Tensor = out / total
    return normalised.flatten(1, 2)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
