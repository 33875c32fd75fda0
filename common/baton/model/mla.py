"""Multi-head latent attention (DeepSeek-V2 and V3, GLM-4 lite, MiniCPM3, ...) over the latent itself.

A token's K and V of all heads are linear in one short vector, the latent c, plus one rotated key r for all heads:

    k_h = [W_k,h c | r]    v_h = W_v,h c

transformers' code expands c to all heads before it calls the attention. Here the pool holds [c | r] only, and W
moves to the other side: the query becomes [W_k,h^T q | q_rot], one KV head serves all, and what comes out is W_v,h
of the sum. A token of DeepSeek-V3 takes 576 numbers per layer instead of 40,960.

    H heads, T tokens, L size of the latent, R size of the rotated key, N size of the other part of the query
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Latent:
    """Set as `baton_latent` of an attention module whose keys are [c | r] and whose values are c."""

    key_weight: Tensor  # [H, N, L]
    value_weight: Tensor  # [H, L, V]

    def absorb(self, query: Tensor) -> Tensor:
        """[T, H, N + R] -> [T, H, L + R]."""
        num_plain = self.key_weight.shape[1]
        plain, rotated = query[..., :num_plain], query[..., num_plain:]
        return torch.cat((_per_head(plain, self.key_weight), rotated), -1)

    def expand(self, out: Tensor) -> Tensor:
        """[T, H, L] -> [T, H, V]."""
        return _per_head(out, self.value_weight)


def keep_latents(model: nn.Module) -> None:
    """From now on the attention modules that can hand over the latent do. The weights are shared, not copied."""
    for module in model.modules():
        if hasattr(module, "expand_kv") and _is_plain(getattr(module, "kv_b_proj", None)):
            module.baton_latent = _latent(module)  # type: ignore[assignment]
            module.expand_kv = _join  # type: ignore[assignment]


def latent_of(module: nn.Module) -> Latent | None:
    latent = getattr(module, "baton_latent", None)
    return latent if isinstance(latent, Latent) else None


def _latent(module: nn.Module) -> Latent:
    num_plain, v_dim = int(module.qk_nope_head_dim), int(module.v_head_dim)  # type: ignore[arg-type]
    weight = module.kv_b_proj.weight.unflatten(0, (-1, num_plain + v_dim))  # type: ignore[operator,union-attr]
    key_weight, value_weight = weight.split((num_plain, v_dim), dim=1)
    return Latent(key_weight, value_weight.mT)


def _is_plain(projection: object) -> bool:
    return type(projection) is nn.Linear and projection.bias is None


def _join(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Instead of expand_kv: [1, 1, T, L] and [1, 1, T, R]."""
    return torch.cat((latent, rotated), -1), latent


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, A], weight [H, A, B] -> [T, H, B]."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
