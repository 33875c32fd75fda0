"""Our attention, called by transformers' modelling code in place of its own.

A step is one ragged row of tokens, [1, T]: first one token for each sequence that decodes, then the chunks of
prompts. What each of them sees is in a `StepAttention`, which travels through the model as a keyword argument:

    model(input_ids, position_ids=..., baton_batch=batch)  -->  paged_attention(..., baton_batch=batch)

Before the first step `layers.learn_layers` sends a `Probe` the same way, which notes what every layer asks for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from baton.errors import ConfigError
from baton.model.mla import latent_of
from baton_kernels.naive import Window

NAME = "baton_paged"


class Options(NamedTuple):
    """What a layer asks for besides softmax(q k^T) v."""

    scale: float
    sliding_window: int | None  # as the module says it; what is done follows the config, see layers.py
    softcap: float | None
    sinks: Tensor | None  # [H]
    others: dict[str, Any]
    # cos, sin [T, R/2]: query and key are still to be turned, see baton_kernels.naive.rope
    rope: tuple[Tensor, Tensor] | None = None


class Attend(Protocol):
    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        """query [T, H, Dk], key [T, Hkv, Dk], value [T, Hkv, Dv] -> [T, H, Dv]."""
        ...


class Echo:
    """Implements Attend without any KV: every token sees itself. What a model is tried out with at load."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


class PagedLayer(NamedTuple):
    kv: int  # layer of the pool
    k_cache: Tensor  # see baton_kernels.naive
    v_cache: Tensor
    window: Window | None
    writes: bool  # False: it reads the KV of an earlier layer


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of one sequence; the KV of positions below `start` is there already."""

    start: int
    num_tokens: int
    block_table: Sequence[int]  # covers start + num_tokens positions


class StepAttention(Attend, Protocol):
    """Made once per step, called by every layer: writes the tokens' K and V to the pool, then attends to what is in
    the pool."""

    num_layers_seen: int  # that have called
    on_written: Callable[[int], None] | None  # told each layer of the pool once its KV is there


class Planner(Protocol):
    """What a worker computes attention with, chosen at load (`step.planner_for`)."""

    def plan(self, chunks: Sequence[Chunk], positions: Tensor, blocks: Tensor) -> StepAttention:
        """The chunks of one token come first. positions and blocks [T] int64 on the device: of each token of the
        step, and the block in which its KV goes."""
        ...


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


def step_of(module: nn.Module, handed_down: Attend | None) -> Attend:
    """Raises ConfigError."""
    relay = getattr(module, "baton_relay", None)
    step = relay.step if handed_down is None and isinstance(relay, Relay) else handed_down
    if step is None:
        raise ConfigError(f"{type(module).__name__} does not hand arguments on to the attention")
    return step


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
    step = step_of(module, baton_batch)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = Options(scale, sliding_window, softcap, s_aux, {"attention_mask": attention_mask, **others})
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    latent = latent_of(module)
    if latent is None:
        out = step.attend(module, query, key, value, options)
    else:
        out = latent.expand(step.attend(module, latent.absorb(query), key, value, options))
    return out[None].to(query.dtype), None
