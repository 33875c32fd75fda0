"""The last layer computes nothing that nobody asks for.

What a prompt's tokens leave behind is their KV. The last layer's MLP is needed only for those whose logits are wanted:
usually one of a chunk, or none. The modelling code keeps all of them to the end; here the last layer goes on with the
wanted ones as soon as its attention has written the KV of all.

As in `fuse`, nothing is known of any model: the layer is recognised by what it holds, and the model with it has to
give the same logits on a sample, or it stays as it was.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from baton.model.attention import Echo
from baton.model.packed import close

_log = logging.getLogger(__name__)

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_SAMPLE = 5  # tokens
_SAMPLE_WANTED: tuple[list[int], ...] = ([4], [3, 0], [])


class TrimmedModel(nn.Module):
    """In place of the model: logits of the wanted tokens only, however its code takes them."""

    def __init__(self, model: Any, last: "_LastLayer") -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._last = last

    def forward(self, *, input_ids: Tensor, logits_to_keep: Tensor, **others: Any) -> Any:
        """input_ids [1, T]; logits_to_keep: indices of the wanted tokens."""
        if len(logits_to_keep) == input_ids.shape[1]:
            return self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)
        self._last.wanted = logits_to_keep
        try:
            return self.model(input_ids=input_ids, logits_to_keep=0, **others)
        finally:
            self._last.wanted = None


def trimmed(model: nn.Module, num_layers: int) -> nn.Module:
    """The model itself where its last layer is of another kind."""
    layer = _last_layer(model, num_layers)
    if layer is None:
        return model
    last = _LastLayer(layer)
    layer.forward = last
    new = TrimmedModel(model, last)
    if _agrees(new, model, next(model.parameters()).device):
        return new
    layer.forward = last.forward
    _log.info("the last layer computes all tokens: %s is of another kind", type(layer).__name__)
    return model


class _LastLayer:
    """The `forward` of a decoder layer. Not a module: the layer stays what the model's code knows."""

    def __init__(self, layer: nn.Module) -> None:
        self.wanted: Tensor | None = None  # None: all
        self.forward = layer.forward
        self._layer: Any = layer

    def __call__(self, hidden_states: Tensor, **others: Any) -> Any:
        if self.wanted is None:
            return self.forward(hidden_states, **others)
        layer = self._layer
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **others)
        kept = hidden_states[:, self.wanted] + attended[:, self.wanted]
        return kept + layer.mlp(layer.post_attention_layernorm(kept))


def looks_usual(module: nn.Module) -> bool:
    """A decoder layer, by its parts; whether they are put together in the usual way is seen when it is tried."""
    return {name for name, _ in module.named_children()} == _PARTS


def _last_layer(model: nn.Module, num_layers: int) -> nn.Module | None:
    for module in model.modules():
        if looks_usual(module):
            attention = module.get_submodule("self_attn")
            if getattr(attention, "layer_idx", None) == num_layers - 1:
                return module
    return None


@torch.inference_mode()
def _agrees(new: nn.Module, model: nn.Module, device: torch.device) -> bool:
    """On tokens 0, 1, 0, 1, ... What the code of another model does with fewer tokens is its own affair."""
    positions = torch.arange(_SAMPLE, device=device)[None]
    call = {"input_ids": positions % 2, "position_ids": positions, "use_cache": False, "baton_batch": Echo()}
    try:
        return all(
            _same(*(one(**call, logits_to_keep=wanted).logits for one in (new, model)))
            for wanted in (torch.tensor(rows, dtype=torch.int64, device=device) for rows in _SAMPLE_WANTED)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def _same(logits: Tensor, expected: Tensor) -> bool:
    return logits.shape == expected.shape and (len(expected[0]) == 0 or close(logits, expected))
