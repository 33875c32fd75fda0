"""Runs decoder layers whose parts are all native ops in two calls, see native_layer.

Between the operations of a layer lies the modelling code: ten modules called one by one, a quarter of a millisecond
for a layer. A layer is recognised by what it holds and has to give, on the arguments it gets in a step of the whole
model, what its parts give in the usual order, to the last bit; or it stays. It stays what the model's code knows in any
case: only its `forward` is another, and that is for steps of the native ops alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from baton.model.attention import Attend
from baton.model.calls import Call, calls_of, is_rotated
from baton.model.fuse_attention import RotatedAttention
from baton.model.native_modules import GatedMLP, RMSNorm
from baton.model.native_step import NativeStep
from baton.model.packed import NativeLinear
from baton.model.trim import looks_usual
from baton_kernels.native_layer import LayerParts, Linear, NativeLayer, Norm


class WholeLayer:
    """The `forward` of a decoder layer. Not a module: see above."""

    def __init__(self, layer: Any, native: NativeLayer) -> None:
        self._forward = layer.forward
        self._index: int = layer.self_attn.layer_idx
        self._native = native

    def __call__(self, hidden_states: Tensor, *, baton_batch: Attend, **others: Any) -> Any:
        if not isinstance(baton_batch, NativeStep):
            return self._forward(hidden_states, baton_batch=baton_batch, **others)
        x, cos, sin = (each.contiguous() for each in (hidden_states, *others["position_embeddings"]))
        return baton_batch.run_layer(self._index, self._native, x, cos, sin)


@torch.inference_mode()
def fuse_layers(model: nn.Module) -> int:
    """Once all else of the model is fused. Returns the number of layers. Runs the model where any may do."""
    usual = filter(looks_usual, model.modules())
    parts = {layer: found for layer in usual if (found := _parts(layer)) is not None}
    num_fused = 0
    for layer, call in calls_of(model, parts.__contains__).items():
        if _is_usual(layer, call):
            layer.forward = WholeLayer(layer, NativeLayer(layer.self_attn.native, parts[layer]))  # type: ignore[union-attr,arg-type]
            num_fused += 1
    return num_fused


def _parts(layer: Any) -> LayerParts | None:
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention, RotatedAttention) or not isinstance(mlp, GatedMLP):
        return None
    linears: list[Any] = [attention.qkv, attention.o_proj, mlp.down_proj]
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    of_heads: list[Any] = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    if not all(isinstance(linear, NativeLinear) for linear in linears):
        return None
    if not all(isinstance(norm, RMSNorm) for norm in norms + of_heads):
        return None
    qkv, out, down = (Linear(linear.packed, linear.bias) for linear in linears)
    before, after, *of_heads = (Norm(norm.weight, norm.eps, norm.shifted) for norm in norms + of_heads)
    query, key = of_heads or (None, None)
    num_heads, num_kv_heads, _ = attention.num_heads
    return LayerParts(
        before=before,
        qkv=qkv,
        query=query,
        key=key,
        out=out,
        after=after,
        gate_up=mlp.gate_up,
        down=down,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=qkv.weight.out_features // sum(attention.num_heads),
        scale=attention.options.scale,
        softcap=attention.options.softcap,
        sinks=attention.options.sinks,
    )


def _is_usual(layer: Any, call: Call) -> bool:
    """Whether it is its parts in the usual order, and nothing else."""
    if len(call.args) != 1 or not is_rotated(call, layer.input_layernorm.weight.dtype):
        return False
    (x,) = call.args
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **call.kwargs)
    x = x + attended
    expected = x + layer.mlp(layer.post_attention_layernorm(x))
    given = layer(*call.args, **call.kwargs)
    return isinstance(given, Tensor) and torch.equal(given, expected)
