"""Swaps attention modules whose queries and keys are rotated for ones that compute them where they lie.

    q_proj, k_proj, v_proj      one packed weight
    norms of q and k            stay as they are, where there are any
    rotation                    one call each for q and k, in the product's own memory
    the attention               called at once, without transpositions there and back

A module is recognised by what it holds. Its successor is tried on the arguments that the module gets in a step of the
whole model: it must hand the same on to the attention and make the same of the answer, or the module stays.
"""

from typing import Any

import torch
from torch import Tensor, nn

from baton.model.attention import Attend, Options
from baton.model.calls import calls_of, is_rotated
from baton.model.packed import NativePacker, close
from baton.model.rotated import Witness, looks_rotated


class RotatedAttention(nn.Module):
    """In place of the model's module, for steps of ours alone."""

    def __init__(self, packer: NativePacker, old: Any, head_dim: int, options: Options) -> None:
        super().__init__()
        self.layer_idx = old.layer_idx
        self.is_causal = getattr(old, "is_causal", True)
        self.o_proj = old.o_proj
        self.q_norm, self.k_norm = getattr(old, "q_norm", None), getattr(old, "k_norm", None)
        linears = (old.q_proj, old.k_proj, old.v_proj)
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        self.qkv = packer.pack(torch.cat([linear.weight for linear in linears]), bias)
        self.num_heads = [linear.out_features // head_dim for linear in linears]
        self.native = packer.native
        self.options = options

    def forward(
        self,
        hidden_states: Tensor,  # [1, T, hidden]
        position_embeddings: tuple[Tensor, Tensor],  # [1, T, R] each
        *,
        baton_batch: Attend,
        **others: Any,
    ) -> tuple[Tensor, None]:
        states = self.qkv(hidden_states[0])  # [T, all heads]
        heads = states.view(len(states), sum(self.num_heads), -1)
        query, key, value = heads.split(self.num_heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = position_embeddings
        self.native.rotate(query, cos[0], sin[0])
        self.native.rotate(key, cos[0], sin[0])
        out = baton_batch.attend(self, query, key, value, self.options)
        return self.o_proj(out.to(states.dtype).flatten(1)[None]), None


class AttentionSwap:
    """Where the successors are made. Runs the model once, as it is."""

    def __init__(self, packer: NativePacker, model: nn.Module) -> None:
        self._packer = packer
        self._calls = calls_of(model, looks_rotated)  # whoever is swapped is not held here

    def __call__(self, module: nn.Module) -> nn.Module | None:
        call = self._calls.pop(module, None)
        if call is None or call.args or not is_rotated(call, module.q_proj.weight.dtype):  # type: ignore[union-attr,arg-type]
            return None
        return _successor(self._packer, module, call.kwargs)


def _successor(packer: NativePacker, module: Any, call: dict[str, Any]) -> nn.Module | None:
    told, heard = Witness(), Witness()
    expected = module(**call | {"baton_batch": told})
    linears = (module.q_proj, module.k_proj, module.v_proj)
    if told.options is None or len(expected) != 2:
        return None
    head_dim = told.heads[0].shape[-1]
    if any(
        linear.out_features != heads.shape[1] * heads.shape[2] or heads.shape[2] != head_dim
        for linear, heads in zip(linears, told.heads, strict=True)
    ):
        return None
    new = RotatedAttention(packer, module, head_dim, told.options)
    try:
        out, _ = new(**call | {"baton_batch": heard})
    except RuntimeError:  # norms of something else than a head
        return None
    tolerance = packer.tolerance(module.q_proj.weight)
    pairs = [(out, expected[0]), *zip(heard.heads, told.heads, strict=True)]
    return new if all(close(*pair, tolerance) for pair in pairs) else None
