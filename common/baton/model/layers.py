"""What each layer of a loaded model asks of attention and of the KV pool, learned from the model itself.

Shapes, shared KV and what a module hands over are seen in a forward pass of two tokens through `Probe`. What a
layer may look at comes from the config: some models put it into the attention mask only, which we never make.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baton.errors import ConfigError
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.storage import DTYPES, KVStorage
from baton.model.attention import Echo, Options, PagedLayer
from baton.model.mla import latent_of
from baton_kernels.naive import Window

_KINDS = ("full_attention", "sliding_attention", "chunked_attention")

# Arguments that change nothing for us: there is no training and no Cache object, and positions are in K and Q.
_HARMLESS = (
    "cache_position",
    "dropout",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """`kv` is the layer of the pool that holds its KV, which is that of an earlier one unless `writes`."""

    kv: int
    writes: bool
    shape: LayerLayout
    window: Window | None


def layer_windows(config: Any, max_model_len: int) -> tuple[Window | None, ...]:
    """Of each layer, what the config says it sees; None is everything. Raises ConfigError."""
    sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise ConfigError(f"it has layers of type {', '.join(unknown)}")
    sizes = {"full_attention": None, "sliding_attention": sliding, "chunked_attention": chunk}
    # One that is as long as the longest sequence hides nothing.
    return tuple(
        Window(size, chunked=kind == "chunked_attention") if size and size < max_model_len else None
        for kind, size in ((kind, sizes[kind]) for kind in kinds)
    )


@torch.inference_mode()
def learn_layers(model: nn.Module, config: Any, max_model_len: int) -> tuple[LayerSpec, ...]:
    """Raises ConfigError for what would give wrong answers."""
    probe = _Probe(layer_windows(config, max_model_len), max_model_len)
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1]], device=device)
    try:
        model(input_ids=ids, position_ids=ids, use_cache=False, baton_batch=probe)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"its code does not run with Baton's attention: {error}") from error
    if sorted(probe.specs) != list(range(config.num_hidden_layers)):
        raise ConfigError(f"{len(probe.specs)} of its {config.num_hidden_layers} layers use the attention")
    return tuple(probe.specs[index] for index in range(config.num_hidden_layers))


def plain_layers(layout: KVLayout) -> tuple[LayerSpec, ...]:
    """Every layer has its own KV and sees everything."""
    return tuple(LayerSpec(i, True, shape, None) for i, shape in enumerate(layout.layers))


def kv_layout(layers: tuple[LayerSpec, ...], block_size: int, dtype: str) -> KVLayout:
    """Of those that keep KV of their own."""
    shapes = tuple(layer.shape for layer in layers if layer.writes)
    return KVLayout(block_size, shapes, dtype, DTYPES[dtype].itemsize)


def paged_layers(layers: tuple[LayerSpec, ...], storage: KVStorage) -> tuple[PagedLayer, ...]:
    return tuple(
        PagedLayer(layer.kv, *storage.layer_views(layer.kv), layer.window, layer.writes) for layer in layers
    )


class _Probe(Echo):
    """Notes what the layers ask for, and answers with their values."""

    def __init__(self, windows: tuple[Window | None, ...], max_model_len: int) -> None:
        self.specs: dict[int, LayerSpec] = {}
        self._windows = windows
        self._max_model_len = max_model_len
        # The tensors are kept, so that no two of them can have the same address by chance.
        self._keys: dict[tuple[int, ...], tuple[int, Tensor]] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        index = self._index(module, query, key)
        _refuse_options(module, options)
        v_dim = 0 if latent_of(module) else value.shape[2]
        self.specs[index] = self._spec(index, key, v_dim, options.sliding_window)
        return super().attend(module, query, key, value, options)

    def _index(self, module: nn.Module, query: Tensor, key: Tensor) -> int:
        index = getattr(module, "layer_idx", None)
        name = type(module).__name__
        if not isinstance(index, int) or not 0 <= index < len(self._windows):
            raise ConfigError(f"{name} does not say which layer it is")
        if index in self.specs:
            raise ConfigError(f"layer {index} uses the attention more than once")
        if not query.shape[0] == key.shape[0] == 2:
            raise ConfigError(f"{name} attends to something else than its tokens")
        return index

    def _spec(self, index: int, key: Tensor, v_dim: int, sliding_window: int | None) -> LayerSpec:
        window = self._windows[index]
        said = Window(sliding_window) if sliding_window and sliding_window < self._max_model_len else None
        if said is not None and said != window:
            raise ConfigError(
                f"layer {index} has a window of {said.size} tokens, and its config says {window}"
            )
        owner, _ = self._keys.setdefault((key.data_ptr(), *key.shape), (len(self._keys), key))
        writes = not any(spec.kv == owner for spec in self.specs.values())
        return LayerSpec(owner, writes, LayerLayout(key.shape[1], key.shape[2], v_dim), window)


def _refuse_options(module: nn.Module, options: Options) -> None:
    name = type(module).__name__
    others = {key: value for key, value in options.others.items() if value is not None}
    if getattr(module, "is_causal", True) is False or others.pop("is_causal", True) is False:
        raise ConfigError(f"{name} looks at tokens that come later")
    unknown = sorted(others.keys() - set(_HARMLESS))
    if unknown:
        raise ConfigError(f"{name} asks for {', '.join(unknown)}, which Baton's attention does not know")
