"""The decode step as CUDA graphs: one for each padded number of sequences, captured at load, replayed every step.

A graph repeats the launches it saw on the addresses it saw. So everything that changes between steps (token ids,
positions, slots, block tables, lengths) is copied into buffers that stay where they are, and the kernels read lengths
from them only, never from the host. Padding is sequences of length 0 whose KV goes nowhere.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baton.model.attention import PagedLayer, Planner, StepAttention
from baton.model.triton_step import TritonPlanner, TritonStep

_log = logging.getLogger(__name__)

SIZES = (1, 2, 4, *range(8, 257, 8))

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]  # what it returns runs the same on the same addresses


class Output(NamedTuple):
    logits: Tensor  # [1, T, V]


class GraphedModel(nn.Module):
    """In place of the model: steps in which every sequence decodes are replayed, others go through. Owns the buffers;
    the logits of a step are overwritten by the next."""

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[PagedLayer, ...],
        capture: Capture,
        *,
        num_sms: int,
        max_num_seqs: int,
        max_num_blocks: int,  # of a sequence
    ) -> None:
        super().__init__()
        self._sizes = [size for i, size in enumerate(SIZES) if i == 0 or SIZES[i - 1] < max_num_seqs]
        self._model = model
        self._layers = layers
        self._num_sms = num_sms
        most, device = self._sizes[-1], layers[0].k_cache.device
        self._ids = torch.zeros(2, most, dtype=torch.int64, device=device)  # token ids, positions
        self._slots = torch.full((most,), -1, dtype=torch.int64, device=device)
        self._tables = torch.zeros(most, max_num_blocks, dtype=torch.int32, device=device)
        self._lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, device=device)
        # The largest first: the others fit in its memory.
        self._replays = {size: capture(self._run_of(size)) for size in reversed(self._sizes)}

    def forward(
        self, *, input_ids: Tensor, position_ids: Tensor, baton_batch: StepAttention, **others: Any
    ) -> Any:
        if not self._covers(baton_batch):
            ids = {"input_ids": input_ids, "position_ids": position_ids}
            return self._model(**ids, baton_batch=baton_batch, **others)
        assert isinstance(baton_batch, TritonStep)
        num_seqs = baton_batch.num_decodes
        size = next(size for size in self._sizes if size >= num_seqs)
        self._ids[0, :num_seqs] = input_ids[0]
        self._ids[1, :num_seqs] = position_ids[0]
        self._slots[:num_seqs] = baton_batch.slots
        self._slots[num_seqs:size] = -1
        self._lens[:num_seqs] = baton_batch.context_lens
        self._lens[num_seqs:size] = 0
        self._tables[:num_seqs, : baton_batch.block_tables.shape[1]] = baton_batch.block_tables
        baton_batch.num_layers_seen = len(self._layers)
        logits = self._replays[size]()[:num_seqs]
        return Output(logits[others["logits_to_keep"]][None])

    def _covers(self, step: StepAttention) -> bool:
        return isinstance(step, TritonStep) and step.num_decodes == len(step.slots) <= self._sizes[-1]

    def _run_of(self, size: int) -> Run:
        def run() -> Tensor:
            step = TritonStep(
                layers=self._layers,
                slots=self._slots[:size],
                block_tables=self._tables[:size],
                context_lens=self._lens[:size],
                query_starts=self._lens[:0],
                num_decodes=size,
                num_sms=self._num_sms,
            )
            logits: Tensor = self._model(
                input_ids=self._ids[:1, :size],
                position_ids=self._ids[1:, :size],
                use_cache=False,
                logits_to_keep=self._rows[:size],
                baton_batch=step,
            ).logits[0]
            return logits

        return run


def graphed(
    model: nn.Module, layers: tuple[PagedLayer, ...], planner: Planner, max_num_seqs: int, max_model_len: int
) -> nn.Module:
    """The model itself where the step does not run on the kernels, or the model's code cannot be captured."""
    if not isinstance(planner, TritonPlanner):
        return model
    block_size = layers[0].k_cache.shape[1]
    try:
        with torch.inference_mode():
            return GraphedModel(
                model,
                layers,
                cuda_capture(),
                num_sms=planner.num_sms,
                max_num_seqs=max_num_seqs,
                max_num_blocks=-(-max_model_len // block_size),
            )
    except RuntimeError as error:  # it reads tensors on the host, as the routing of some experts does
        _log.warning("decoding without CUDA graphs: %s", str(error).partition("\n")[0])
        return model


def cuda_capture() -> Capture:
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> Run:
        # The first run compiles the kernels, and lets libraries allocate what they keep.
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    return capture
