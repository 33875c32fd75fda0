"""Attention modules that project, rotate and attend: how they are recognised, and what they hand to the attention.

For `fuse_attention` and `triton_attention`, which swap them for faster ones that have to hand over the same.
"""

from torch import Tensor, nn

from baton.model.attention import Echo, Options
from baton_kernels.naive import rope

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_PARTS = {*PROJECTIONS, "o_proj"}
_NORMS = {"q_norm", "k_norm"}  # of each head, before it is turned


class Witness(Echo):
    """Notes what the last module handed over."""

    def __init__(self) -> None:
        self.heads: tuple[Tensor, ...] = ()  # query, key, value, turned
        self.options: Options | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options
    ) -> Tensor:
        if options.rope is not None:
            query, key = (rope(x, *options.rope) for x in (query, key))
        self.heads, self.options = (query, key, value), options
        return super().attend(module, query, key, value, options)


def looks_rotated(module: nn.Module) -> bool:
    """By its parts; whether it rotates is seen when it is tried."""
    children = dict(module.named_children())
    if children.keys() not in (_PARTS, _PARTS | _NORMS) or not hasattr(module, "layer_idx"):
        return False
    if not all(type(children[name]) is nn.Linear for name in _PARTS):
        return False
    return len({children[name].bias is None for name in PROJECTIONS}) == 1
