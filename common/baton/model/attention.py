"""Our attention, called by transformers' modelling code in place of its own.

A step is one ragged row of tokens, [1, T]: first one token for each sequence that decodes, then the chunks of
prompts. What each of them sees is in a `PagedBatch`, which travels through the model as a keyword argument:

    model(input_ids, position_ids=..., **batch.kwargs)  -->  paged_attention(..., baton_batch=batch)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baton_kernels import naive

NAME = "baton_paged"

# Arguments that change the result and that we do not honour yet. Refused when they are there, not ignored.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(slots=True)
class PagedBatch:
    """Made once per step, read by every layer. `num_layers_seen` counts their calls."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # K and V cache of each layer, see baton_kernels.naive
    writes: naive.Positions  # [T], where the KV of this step's tokens goes
    num_decodes: int
    decode: naive.DecodePlan | None  # of the first num_decodes tokens
    prefills: tuple[tuple[int, int, naive.PrefillPlan], ...]  # tokens [start, end) of the step are one chunk
    max_model_len: int  # no sequence is longer; a sliding window of at least this much changes nothing
    on_written: Callable[[int], None] | None = None  # told each layer's index once its KV is in the pool
    num_layers_seen: int = 0

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"baton_batch": self}


def register() -> None:
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, Dk]
    key: Tensor,  # [1, Hkv, T, Dk]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    *,
    baton_batch: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, Dv]. Writes the tokens' K and V to the pool, then attends to what is in the pool."""
    batch = baton_batch
    if attention_mask is not None or any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise NotImplementedError(f"{type(module).__name__} asks for attention that Baton does not do yet")
    if sliding_window is not None and sliding_window < batch.max_model_len:
        raise NotImplementedError(f"{type(module).__name__} has a sliding window of {sliding_window} tokens")
    batch.num_layers_seen += 1
    k_cache, v_cache = batch.layers[module.layer_idx]  # type: ignore[index]
    query = query[0].transpose(0, 1)  # [T, H, Dk]
    naive.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k_cache, v_cache, batch.writes)
    if batch.on_written is not None:
        batch.on_written(module.layer_idx)  # type: ignore[arg-type]

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outs = []
    if batch.decode is not None:
        decoding = query[: batch.num_decodes]
        outs.append(naive.paged_decode_attention(decoding, k_cache, v_cache, batch.decode, scale))
    for start, end, plan in batch.prefills:
        outs.append(naive.paged_prefill_attention(query[start:end], k_cache, v_cache, plan, scale))
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None
