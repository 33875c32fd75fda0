"""Our attention, called by transformers' modelling code in place of its own.

A step is one ragged row of tokens, [1, T]: first one token for each sequence that decodes, then the chunks of
prompts. What each of them sees is in a `PagedBatch`, which travels through the model as a keyword argument:

    model(input_ids, position_ids=..., baton_batch=batch)  -->  paged_attention(..., baton_batch=batch)

Before the first step `layers.learn_layers` sends a `Probe` the same way, which notes what every layer asks for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from baton.errors import ConfigError
from baton.model.mla import latent_of
from baton_kernels import naive

NAME = "baton_paged"


class Options(NamedTuple):
    """What a layer asks for besides softmax(q k^T) v."""

    scale: float
    sliding_window: int | None  # as the module says it; what is done follows the config, see layers.py
    softcap: float | None
    sinks: Tensor | None  # [H]
    others: dict[str, Any]


class Attend(Protocol):
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        """query [T, H, Dk], key [T, Hkv, Dk], value [T, Hkv, Dv] -> [T, H, Dv]."""
        ...


class PagedLayer(NamedTuple):
    kv: int  # layer of the pool
    k_cache: Tensor  # see baton_kernels.naive
    v_cache: Tensor
    window: naive.Window | None
    writes: bool  # False: it reads the KV of an earlier layer


@dataclass(slots=True)
class PagedBatch:
    """Made once per step, read by every layer. `num_layers_seen` counts their calls."""

    layers: tuple[PagedLayer, ...]
    writes: naive.Positions  # [T], where the KV of this step's tokens goes
    num_decodes: int
    # Plans for each window that a layer has:
    decode: dict[naive.Window | None, naive.DecodePlan]  # of the first num_decodes tokens; empty without any
    prefills: tuple[tuple[int, int, dict[naive.Window | None, naive.PrefillPlan]], ...]  # tokens [start, end)
    on_written: Callable[[int], None] | None = None  # told each layer of the pool once its KV is there
    num_layers_seen: int = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        """Writes the tokens' K and V to the pool, then attends to what is in the pool."""
        self.num_layers_seen += 1
        kv, k_cache, v_cache, window, writes = self.layers[module.layer_idx]  # type: ignore[index]
        if writes:
            value_kept = value[..., : v_cache.shape[-1]].to(v_cache.dtype)
            naive.write_kv(key.to(k_cache.dtype), value_kept, k_cache, v_cache, self.writes)
            if self.on_written is not None:
                self.on_written(kv)
        if v_cache.shape[-1] == 0:  # V is the front of K, see mla.py
            v_cache = k_cache[..., : value.shape[-1]]
        query, scale = query.to(k_cache.dtype), options.scale
        extra: dict[str, Any] = {"softcap": options.softcap, "sinks": options.sinks}
        outs = []
        if self.decode:
            decoding, decode = query[: self.num_decodes], self.decode[window]
            outs.append(naive.paged_decode_attention(decoding, k_cache, v_cache, decode, scale, **extra))
        for start, end, plans in self.prefills:
            chunk, plan = query[start:end], plans[window]
            outs.append(naive.paged_prefill_attention(chunk, k_cache, v_cache, plan, scale, **extra))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class Relay:
    """Where the attention modules of a model find the step when its code does not hand keyword arguments down to
    them."""

    def __init__(self, model: nn.Module) -> None:
        self.step: Attend | None = None
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.baton_relay = self  # type: ignore[assignment]
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step = kwargs["baton_batch"]


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
    baton_batch: Attend | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, Dv]."""
    if baton_batch is None:
        baton_batch = getattr(getattr(module, "baton_relay", None), "step", None)
    if baton_batch is None:
        raise ConfigError(f"{type(module).__name__} does not hand arguments on to the attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = Options(scale, sliding_window, softcap, s_aux, {"attention_mask": attention_mask, **others})
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    latent = latent_of(module)
    if latent is None:
        out = baton_batch.attend(module, query, key, value, options)
    else:
        out = latent.expand(baton_batch.attend(module, latent.absorb(query), key, value, options))
    return out[None].to(query.dtype), None
