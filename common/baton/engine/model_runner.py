"""Runs batches through the model: the engine's only part that touches tensors.

Everything torch does here happens in a thread of its own, so the event loop stays free while a step runs. On a device
that thread is done with a step as soon as it is launched, and goes on to the next one, whose tokens it takes from the
device itself; a second thread waits for the step to end.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.masks import MaskMaker
from baton.engine.sampler import Drawn, draw, joined
from baton.engine.scoring import Scored, score
from baton.engine.structured import Grammars
from baton.errors import ConfigError, InternalError
from baton.kv import pool_size
from baton.kv.storage import KVStorage
from baton.messages import Compatibility
from baton.model import exact, identity, loader, memory
from baton.model.attention import Chunk, StepAttention
from baton.model.fuse import fuse
from baton.model.layers import LayerSpec, kv_layout, paged_layers, plain_layers
from baton.model.split import Split, WholeModel, split
from baton.model.step import (
    attention_on_kernels,
    load_native,
    on_kernels,
    planner_for,
    with_graphs,
)
from baton.model.trim import trimmed
from baton.model_files import resolve_model
from baton.request import BlockId, RequestId, SamplingParams
from baton.tokenizer import load_tokenizer
from baton.transfer.wire import VERSIONS
from baton_kernels.native import Native


class _Inputs(NamedTuple):
    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    paged: StepAttention
    sampled: list[int]  # rows of the batch that get a token, in the order of their logits
    wanted: Tensor  # [len(sampled)], index into T: the positions that they are drawn from
    scored: list[Scored]


class _Launched(NamedTuple):
    drawn: Drawn
    tokens: Tensor  # the same in host memory, once the step has `ended`
    ended: torch.cuda.Event | None  # None: it has
    order: list[int]  # where the token of each sampled row of the batch is among them


class TorchModelRunner:
    """Implements ModelRunner. Owns model and storage; `execute` is the only one to write to the storage,
    apart from the transfer, which writes to blocks that are in no batch."""

    def __init__(
        self,
        model: nn.Module,
        storage: KVStorage,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int = 1,
        num_threads: int = 1,
        cpus: tuple[int, ...] = (),
        layers: tuple[LayerSpec, ...] | None = None,
        grammars: Grammars | None = None,
        bit_exact: bool = False,
        native: Native | None = None,
        parts: Split | None = None,
    ) -> None:
        """`layers` of the model; None: one for each layer of the storage, and nothing special. `native`: ops for
        its attention, see step.planner_for. `parts` of the model, where it has any. Raises
        ConfigError for a model that cannot be bit-exact."""
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.grammars = grammars
        self._model = model
        self._storage = storage
        self._layers = paged_layers(layers or plain_layers(storage.layout), storage)
        self._planner = planner_for(self._layers, storage.layout.block_size, native, bit_exact=bit_exact)
        self._draws_alone = bit_exact
        self._parts = parts or WholeModel(model)
        if bit_exact:
            self._model = self._parts = exact.ExactModel(self._parts)
            exact.prove(self._model, self._layers, storage.data, storage.layout.block_size)
        else:
            self._model = with_graphs(
                model, self._layers, self._planner, max_num_seqs=max_num_seqs, max_model_len=max_model_len
            )
        self._is_on_host = storage.data.device.type == "cpu"
        self._drawn: Tensor | None = None  # by the batch before; stays on the device
        self._masks = MaskMaker()
        self._thread = ThreadPoolExecutor(1, "baton-model", _start_thread, (num_threads, cpus))
        self._waiter = ThreadPoolExecutor(1, "baton-wait")
        if not self._is_on_host:
            self._warm_up()

    @property
    def storage(self) -> KVStorage:
        return self._storage

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        running = (
            self._run_on_host(batch) if self._is_on_host else asyncio.ensure_future(self._run_ahead(batch))
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The step still writes to the pool: it has to end first, however often we are cancelled.
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((running,))
            running.exception()
            raise

    async def aclose(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._waiter.shutdown)
        self._masks.close()

    def _run_on_host(self, batch: Batch) -> asyncio.Future[tuple[int, ...]]:
        loop = asyncio.get_running_loop()
        on_written = _Progress(batch, loop, len(self._layers)).on_written
        return loop.run_in_executor(self._thread, self._run, batch, on_written)

    async def _run_ahead(self, batch: Batch) -> tuple[int, ...]:
        """Layers are not told of: a layer's KV is written some time after the call that asks for it."""
        loop = asyncio.get_running_loop()
        launched = await loop.run_in_executor(self._thread, self._launch, batch, None)
        batch.prepare_next()
        return await loop.run_in_executor(self._waiter, self._collect, launched)

    def _run(self, batch: Batch, on_written: Callable[[int], None] | None) -> tuple[int, ...]:
        return self._collect(self._launch(batch, on_written))

    @memory.out_of_memory_as_baton_error()
    @torch.inference_mode()
    def _launch(self, batch: Batch, on_written: Callable[[int], None] | None) -> _Launched:
        if batch.copies:
            self._storage.copy_blocks(batch.copies)
        with self._masks.beside(row.state for row in batch.rows if row.sample):
            inputs, self._drawn = self._prepare(batch), None
            inputs.paged.on_written = on_written
            logits = self._forward(inputs)
        drawn = self._draw(logits, [batch.rows[i] for i in inputs.sampled])
        place = {row: i for i, row in enumerate(inputs.sampled)}
        order = [place[i] for i, row in enumerate(batch.rows) if row.sample]
        self._drawn = drawn.tokens
        if order != sorted(order):
            self._drawn = self._drawn[memory.to_device(np.array(order), self._drawn.device)]
        return _Launched(drawn, *memory.to_host(drawn.tokens), order)

    @memory.out_of_memory_as_baton_error()
    @torch.inference_mode()
    def _collect(self, launched: _Launched) -> tuple[int, ...]:
        if launched.ended is not None:
            launched.ended.synchronize()
        tokens = launched.tokens.tolist()
        launched.drawn.note_logprobs(tokens)
        return tuple(tokens[i] for i in launched.order)

    def _warm_up(self) -> None:
        """A token and a chunk beside each other: kernels are compiled now, and not when somebody waits for them."""
        params = SamplingParams(temperature=1.0)
        rows = [BatchRow(RequestId(""), 0, (0,) * n, (BlockId(0),), True, params) for n in (1, 2)]
        self._collect(self._launch(Batch(tuple(rows)), None))
        self._drawn = None

    def _forward(self, inputs: _Inputs) -> Tensor:
        """Logits of `inputs.wanted`, [len(wanted), V]; what scored prompts want to know is noted."""
        if inputs.scored:
            states = self._parts.states(inputs.input_ids, inputs.position_ids, inputs.paged)
            score(states, self._parts.logits, inputs.scored)
            logits = self._parts.logits(states[inputs.wanted])
        else:
            logits = self._whole(inputs)
        if inputs.paged.num_layers_seen != len(self._layers):
            raise InternalError(
                f"{inputs.paged.num_layers_seen} of {len(self._layers)} layers called Baton's attention"
            )
        return logits

    def _whole(self, inputs: _Inputs) -> Tensor:
        logits: Tensor = self._model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            logits_to_keep=inputs.wanted,
            baton_batch=inputs.paged,
        ).logits[0]
        if len(logits) != len(inputs.wanted):  # the model does not know `logits_to_keep`
            logits = logits[inputs.wanted]
        return logits

    def _draw(self, logits: Tensor, rows: list[BatchRow]) -> Drawn:
        if self._draws_alone and len(rows) > 1:
            return joined([self._draw(logits[i : i + 1], [row]) for i, row in enumerate(rows)])
        positions = [row.start + len(row.token_ids) for row in rows]
        return draw(logits, [row.sampling for row in rows], positions, [row.state for row in rows])

    def _prepare(self, batch: Batch) -> _Inputs:
        """All tensors of the step, decoding rows first."""
        order = sorted(range(len(batch.rows)), key=lambda i: len(batch.rows[i].token_ids) > 1)
        rows = [batch.rows[i] for i in order]
        block_size, device = self._storage.layout.block_size, self._storage.data.device
        token_ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        ends: list[int] = []  # of the rows, in the step's tokens
        for row in rows:
            span = range(row.start, row.start + len(row.token_ids))
            token_ids.extend(row.token_ids)
            positions.extend(span)
            blocks.extend([row.block_table[position // block_size] for position in span])
            ends.append(len(token_ids))
        on_device = memory.to_device(np.array([token_ids, positions, blocks]), device)
        chunks = [Chunk(row.start, len(row.token_ids), row.block_table) for row in rows]
        paged = self._planner.plan(chunks, on_device[1], on_device[2])
        last = [(i, end - 1) for i, row, end in zip(order, rows, ends, strict=True) if row.sample]
        wanted = memory.to_device(np.array([index for _, index in last], dtype=np.int64), device)
        input_ids = self._known(on_device[:1]) if min(token_ids) < 0 else on_device[:1]
        return _Inputs(input_ids, on_device[1:2], paged, [i for i, _ in last], wanted, _scored(rows, ends))

    def _known(self, token_ids: Tensor) -> Tensor:
        """With the tokens of the batch before in place of -1 - i; anything where it drew none."""
        drawn = torch.zeros(1, dtype=torch.int64) if self._drawn is None else self._drawn.clamp(min=0)
        index = (-1 - token_ids).clamp(min=0, max=len(drawn) - 1)
        return torch.where(token_ids < 0, drawn.to(token_ids.device)[index], token_ids)


def _scored(rows: list[BatchRow], ends: list[int]) -> list[Scored]:
    """What is asked of the prompts themselves. `ends` of the rows in the step's tokens."""
    scored: list[Scored] = []
    for row, end in zip(rows, ends, strict=True):
        num_tokens = len(row.token_ids)
        if row.scores is not None and (targets := row.scores.targets(row.start, num_tokens)):
            scored.append(Scored(row.scores, row.start, end - num_tokens, len(targets)))
    return scored


class _Progress:
    """How far a batch is. `on_written` is called in the model's thread with each layer's index; a layer out of order
    and all after it are left to the end of the step."""

    def __init__(self, batch: Batch, loop: asyncio.AbstractEventLoop, num_layers: int) -> None:
        self._batch = batch
        self._loop = loop
        self._ends = frozenset(batch.listener.ends if batch.listener else ())
        self._late = max(1, num_layers * 3 // 4)  # the host needs about a millisecond for the next batch
        self._num_written = 0

    def on_written(self, layer: int) -> None:
        if layer != self._num_written:
            return
        self._num_written += 1
        if self._num_written in self._ends and self._batch.listener:
            self._loop.call_soon_threadsafe(self._batch.listener.written, self._num_written)
        if self._num_written == self._late:
            self._loop.call_soon_threadsafe(self._batch.prepare_next)


def _start_thread(num_threads: int, cpus: tuple[int, ...]) -> None:
    """How many OpenMP threads there are, and on which cores, are properties of the thread that starts them."""
    if cpus:
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(num_threads)


def _check_cpus(cpus: tuple[int, ...]) -> None:
    strange = sorted(set(cpus) - os.sched_getaffinity(0))
    if strange:
        raise ConfigError(f"engine.cpus: this process may not run on core {strange[0]}")


class LoadedModel(NamedTuple):
    runner: TorchModelRunner
    fingerprint: str
    compatibility: Compatibility


def load_runner(
    model: ModelConfig, engine: EngineConfig, *, fill_nan: bool = False, surveyed: bool = True
) -> LoadedModel:
    """Weights, KV pool and thread of one worker. Raises ConfigError. `fill_nan`: see KVStorage; `surveyed`: see
    load_config."""
    directory = resolve_model(model.model, model.revision)
    config = loader.load_config(directory, surveyed=surveyed)
    max_model_len = loader.model_length(config, model.max_model_len)
    device = loader.resolve_device(engine.device)
    dtype = loader.resolve_dtype(config, model.dtype, device)
    _check_cpus(engine.cpus)
    torch.set_num_threads(engine.num_threads)
    if engine.bit_exact:
        exact.check(dtype, device)
    is_fast = device.type == "cpu" and engine.native_ops and not engine.bit_exact
    if engine.quantization is not None and not is_fast:
        raise ConfigError(f"--quantization {engine.quantization} runs on the native CPU ops only")
    native = load_native() if is_fast else None
    module = loader.load_model(directory, config, dtype, device)
    if not engine.bit_exact:
        on_kernels(module, device)
    if is_fast:
        fuse(module, native, int8=engine.quantization == "int8")
    layers = loader.learn_layers(module, config, max_model_len)
    if not engine.bit_exact:
        attention_on_kernels(module, layers, device)
    parts = split(module)
    if not engine.bit_exact:
        module = trimmed(module, len(layers))
    layout = kv_layout(layers, engine.block_size, dtype)
    num_blocks = pool_size.num_blocks(engine, layout, memory.measured(device), model.max_model_len)
    storage = KVStorage(layout, num_blocks, device, fill_nan=fill_nan)
    vocab_size = config.get_text_config().vocab_size
    runner = TorchModelRunner(
        module,
        storage,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=engine.max_num_seqs,
        num_threads=engine.num_threads,
        cpus=engine.cpus,
        layers=layers,
        grammars=Grammars(lambda: load_tokenizer(directory, num_threads=0), vocab_size),
        bit_exact=engine.bit_exact,
        native=native,
        parts=parts,
    )
    arithmetic = exact.arithmetic() if engine.bit_exact else engine.quantization or ""
    compatibility = identity.compatibility(directory, config, layout, VERSIONS, arithmetic)
    return LoadedModel(runner, identity.fingerprint(compatibility, layout), compatibility)
