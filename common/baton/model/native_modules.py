"""Modules on the native ops that `fuse` puts in the place of a model's own."""

from torch import Tensor, nn

from baton_kernels.native import Native, PackedWeight


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, native: Native, gate_up: PackedWeight, down: nn.Module) -> None:
        super().__init__()
        self._native = native
        self.gate_up = gate_up
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self._native.gated_linear(x, self.gate_up))
        return out


class RMSNorm(nn.Module):
    def __init__(self, native: Native, weight: nn.Parameter, eps: float, *, shifted: bool) -> None:
        super().__init__()
        self._native = native
        self.weight = weight
        self.eps, self.shifted = eps, shifted

    def forward(self, x: Tensor) -> Tensor:
        return self._native.rms_norm(x, self.weight, self.eps, shifted=self.shifted)
