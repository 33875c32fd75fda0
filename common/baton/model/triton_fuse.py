"""Swaps modules of transformers' models, in place and at load, for ones that call the Triton kernels:

    RMSNorm                                                     one launch
    gate_proj and up_proj, SiLU of the one times the other      one product, one launch

A module is recognised by what it holds. On samples its successor must give the same output, or the module stays: so
nothing is known of any model here.
"""

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baton.model.packed import close, sample_input
from baton_kernels.rms_norm import add_rms_norm
from baton_kernels.silu_mul import silu_mul

_log = logging.getLogger(__name__)

_EPSILONS = ("variance_epsilon", "eps")
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedRMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps, self._offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return add_rms_norm(rows, None, self.weight, self._eps, offset=self._offset).view(x.shape)


class FusedGatedMLP(nn.Module):
    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.cat((gate.weight, up.weight)), requires_grad=False)
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        gate_up = F.linear(x.reshape(-1, x.shape[-1]), self.gate_up)
        out: Tensor = self.down_proj(silu_mul(gate_up))
        return out.view(*x.shape[:-1], out.shape[-1])


@torch.inference_mode()
def fuse(model: nn.Module) -> Counter[str]:
    """How many modules of which class were swapped."""
    swapped: Counter[str] = Counter()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            new = _successor(module)
            if new is not None:
                setattr(parent, name, new)
                swapped[type(module).__name__] += 1
    _log.info("modules on kernels: %s", dict(swapped))
    return swapped


def _successor(module: nn.Module) -> nn.Module | None:
    return _norm(module) or _gated_mlp(module)


def _norm(module: nn.Module) -> nn.Module | None:
    eps = next((e for name in _EPSILONS if isinstance(e := getattr(module, name, None), float)), None)
    parameters = dict(module.named_parameters())
    if eps is None or parameters.keys() != {"weight"} or parameters["weight"].dim() != 1:
        return None
    weight = parameters["weight"]
    candidates = [FusedRMSNorm(weight, eps, offset) for offset in (0.0, 1.0)]
    # The small sample shows whether eps is where it belongs.
    return next((new for new in candidates if _agree(module, new, weight, (1.0, 1e-3))), None)


def _gated_mlp(module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    if children.keys() != _GATED or any(True for _ in module.parameters(recurse=False)):
        return None
    gate, up, down, activation = (children[name] for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if not (_is_linear(gate) and _is_linear(up) and _is_linear(down)):
        return None
    assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    x = sample_input(64, gate.weight.dtype).to(gate.weight.device)
    if (
        gate.bias is not None
        or up.bias is not None
        or not close(activation(x), F.silu(x), _tolerance(x.dtype))
    ):
        return None
    new = FusedGatedMLP(gate, up, down)
    return new if _agree(module, new, gate.weight, (1.0,)) else None


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _agree(
    old: Callable[[Tensor], Tensor],
    new: Callable[[Tensor], Tensor],
    weight: Tensor,
    scales: tuple[float, ...],
) -> bool:
    size, dtype, device = weight.shape[-1], weight.dtype, weight.device
    samples = [sample_input(size, dtype, scale).to(device) for scale in scales]
    return all(close(new(x), old(x), _tolerance(dtype)) for x in samples)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype is torch.float32 else 2e-2
