"""Swaps modules of transformers' models, in place and at load, for ones that do the same in fewer and faster steps.

    a linear layer                          a packed weight
    attention with rotated heads            see fuse_attention
    q_proj, k_proj, v_proj of any other     one packed weight
    gate_proj, up_proj and SiLU between     one packed weight, and the product in the same step
    RMSNorm                                 one call
    a layer of such parts alone             two calls, see fuse_layer

A module is recognised by what it holds, and then has to be matched: on a sample its successor must give the same
output, or it stays. So nothing is known of any model here, and nothing is assumed.
"""

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from baton.model.fuse_attention import AttentionSwap
from baton.model.fuse_layer import fuse_layers
from baton.model.mla import latent_of
from baton.model.native_modules import GatedMLP, RMSNorm
from baton.model.packed import (
    NativePacker,
    PackedEmbedding,
    Packer,
    close,
    merge,
    packer_for,
    sample_input,
)
from baton_kernels.native import Native, PackedWeight

_log = logging.getLogger(__name__)

_QKV = ("q_proj", "k_proj", "v_proj")
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_TURN = 32  # rows of gate_proj and up_proj in turns, see Native.gated_linear
_EPSILONS = ("variance_epsilon", "eps")


@torch.inference_mode()
def fuse(model: nn.Module, native: Native | None, *, int8: bool = False) -> None:
    """For a model on the CPU, in evaluation mode. `int8`: weights are rounded to 8 bits, but for those of the output
    layer and of layers that choose experts. Raises ConfigError where that cannot be."""
    packer = packer_for(native, next(model.parameters()).dtype, int8=int8)
    if packer is None:
        _log.info("linear layers by plain torch: neither native ops nor oneDNN work here")
        return
    swapped: Counter[str] = Counter()
    if isinstance(packer, NativePacker):
        swapped["attention"] = _swap(model, AttentionSwap(packer, model))
    swapped["qkv"] = sum(_merge_qkv(packer, module) for module in list(model.modules()))
    if isinstance(packer, NativePacker):
        swapped["gated"] = _swap(model, lambda module: _gated(packer, module))
        swapped["norm"] = _swap(model, lambda module: _norm(packer.native, module))
        swapped["tied"] = _pack_tied(packer, model)
    swapped["linear"] = _swap(model, _LinearSwap(packer, model))
    swapped["whole layer"] = fuse_layers(model)
    _log.info("linear layers by %s: %s", packer.name, ", ".join(f"{n} {name}" for name, n in swapped.items()))


def _swap(model: nn.Module, successor: Callable[[nn.Module], nn.Module | None]) -> int:
    """Every module that has a successor, wherever it is used. Returns the number of places. A module is given up as
    soon as it was swapped, so there is memory for one more at a time."""
    users = Counter(child for parent in model.modules() for child in parent.children())
    shared: dict[nn.Module, nn.Module | None] = {child: None for child, n in users.items() if n > 1}
    del users
    visited: set[nn.Module] = set()

    def swap_children(parent: nn.Module) -> int:
        num_swapped = 0
        for name in [name for name, _ in parent.named_children()]:
            child = parent.get_submodule(name)
            new = shared.get(child) or successor(child)
            if child in shared:
                shared[child] = new
            if new is not None:
                setattr(parent, name, new)
                num_swapped += 1
            elif child not in visited:
                num_swapped += swap_children(child)
        visited.add(parent)
        return num_swapped

    return swap_children(model)


def _is_linear(module: object) -> bool:
    return type(module) is nn.Linear


class _LinearSwap:
    """Plain linear layers. Not those whose weight has another user: there would be two copies."""

    def __init__(self, packer: Packer, model: nn.Module) -> None:
        self._packer = packer
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        self._num_users = Counter(id(layer.weight) for layer in layers)
        # Latent attention uses this weight in parts.
        self._kept = {id(module.kv_b_proj) for module in model.modules() if latent_of(module)}
        embeddings = {layer.weight.shape for layer in layers if isinstance(layer, nn.Embedding)}
        self._outputs = {id(m) for m in layers if isinstance(m, nn.Linear) and m.weight.shape in embeddings}

    def __call__(self, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or not _is_linear(module) or id(module) in self._kept:
            return None
        packer = self._packer.exact() if id(module) in self._outputs else self._packer
        if self._num_users[id(module.weight)] > 1 or not packer.takes(module.weight):
            return None
        packed = packer.pack(module.weight, module.bias)
        return packed if packer.agrees(packed, module.weight, module.bias) else None


def _merge_qkv(packer: Packer, attention: nn.Module) -> bool:
    linears = [module for name in _QKV if isinstance(module := getattr(attention, name, None), nn.Linear)]
    if len(linears) < len(_QKV) or not all(map(_is_linear, linears)):
        return False
    if len({(linear.in_features, linear.bias is None) for linear in linears}) > 1:
        return False
    parts = merge(packer, linears)
    for name, part in zip(_QKV, parts or (), strict=False):
        setattr(attention, name, part)
    return parts is not None


def _gated(packer: NativePacker, module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    if children.keys() != _GATED or any(True for _ in module.parameters(recurse=False)):
        return None
    gate, up, down, act = (children[name] for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if not all(map(_is_linear, (gate, up, down))):
        return None
    assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    if (
        gate.bias is not None
        or up.bias is not None
        or gate.weight.shape != up.weight.shape
        or not _is_silu(act, gate)
    ):
        return None
    if not all(packer.takes(linear.weight) for linear in (gate, down)):
        return None
    new = GatedMLP(packer.native, _in_turns(packer, gate, up), packer.pack(down.weight, down.bias))
    x = sample_input(gate.in_features, gate.weight.dtype)
    return new if close(new(x), module(x), packer.tolerance(gate.weight)) else None


def _in_turns(packer: NativePacker, gate: nn.Linear, up: nn.Linear) -> PackedWeight:
    size = gate.out_features
    weights = torch.stack((gate.weight, up.weight))  # [2, N, K]
    padded = F.pad(weights, (0, 0, 0, -size % _TURN)).view(2, -1, _TURN, gate.in_features)
    turns = padded.transpose(0, 1).flatten(0, 2)
    return packer.arrange(turns)._replace(out_features=2 * size)


def _is_silu(activation: nn.Module, gate: nn.Linear) -> bool:
    x = sample_input(64, gate.weight.dtype)
    return bool((activation(x) - F.silu(x)).abs().max() < 1e-2)


def _norm(native: Native, module: nn.Module) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    eps = next((e for name in _EPSILONS if isinstance(e := getattr(module, name, None), float)), None)
    parameters = list(module.parameters())
    if eps is None or not isinstance(weight, nn.Parameter) or len(parameters) != 1 or weight.dim() != 1:
        return None
    if not native.supports(weight.dtype) or any(True for _ in module.children()):
        return None
    # The smaller one shows whether eps is where it belongs.
    samples = [sample_input(len(weight), weight.dtype, scale) for scale in (1.0, 0.001)]
    for shifted in (False, True):
        new = RMSNorm(native, weight, eps, shifted=shifted)
        if all(close(new(x), module(x)) for x in samples):
            return new
    return None


def _pack_tied(packer: NativePacker, model: nn.Module) -> int:
    """An output layer that shares its weight with the embedding of the input tokens: both use the packed one."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_linear(module)]
    embeddings = {id(module.weight): module for module in model.modules() if type(module) is nn.Embedding}
    packer = packer.exact()
    for head in linears:
        embedding = embeddings.get(id(head.weight))
        if embedding is None or not packer.takes(head.weight):
            continue
        packed = packer.pack(head.weight, head.bias)
        if packer.agrees(packed, head.weight, head.bias):
            successors: dict[nn.Module, nn.Module] = {head: packed, embedding: PackedEmbedding(packed.packed)}
            return _swap(model, successors.get)
    return 0
