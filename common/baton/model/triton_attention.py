"""The attention modules of transformers' models with fewer launches around the attention itself:

    q_proj, k_proj, v_proj                  one product
    RoPE of query and key, write to the KV  one launch, see baton_kernels.cache_write

As in `triton_fuse`, a module is recognised by what it holds, and its successor has to prove itself: in one pass through
the model each candidate computes the same inputs in both ways, and has to hand the same query, key and value to the
attention, and give the same output, or it stays as it was.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baton.model.attention import Attend, Options, step_of
from baton.model.packed import close
from baton.model.rotated import PROJECTIONS, Witness, looks_rotated

_log = logging.getLogger(__name__)

_POSITIONS = (0, 1, 2, 3, 5, 8, 13, 21)  # of the sample, no two distances alike

Forward = Callable[..., tuple[Tensor, None]]


@torch.inference_mode()
def fuse_attention(model: nn.Module) -> int:
    """How many modules were swapped. Their weights stay where they are seen, as parts of a merged one."""
    candidates = [_Trial(module) for module in model.modules() if looks_rotated(module)]
    _run_sample(model)
    swapped = [trial for trial in candidates if trial.ends()]
    _log.info("attention with one projection and RoPE in the write: %d layers", len(swapped))
    return len(swapped)


class FusedAttention:
    """The `forward` of an attention module. Not a module: the layer stays what the model's code knows."""

    def __init__(self, module: Any, options: Options) -> None:
        linears = [getattr(module, name) for name in PROJECTIONS]
        self._module = module
        self._options = options
        self._sizes = [linear.out_features for linear in linears]
        self._has_norms = hasattr(module, "q_norm")
        self._weight = torch.cat([linear.weight for linear in linears])
        self._bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])

    def give_weights(self) -> None:
        """The projections become views of the merged weight, so that there is one copy."""
        for name, part in zip(PROJECTIONS, torch.split(self._weight, self._sizes), strict=True):
            getattr(self._module, name).weight.data = part

    def __call__(
        self,
        hidden_states: Tensor,  # [1, T, D]
        *,
        position_embeddings: tuple[Tensor, Tensor],  # cos, sin [1, T, R], both halves alike
        baton_batch: Attend | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        module = self._module
        step = step_of(module, baton_batch)
        qkv = F.linear(hidden_states[0], self._weight, self._bias)
        query, key, value = (x.view(len(x), -1, module.head_dim) for x in torch.split(qkv, self._sizes, -1))
        if self._has_norms:
            query, key = module.q_norm(query), module.k_norm(key)
        cos, sin = (x[0, :, : x.shape[-1] // 2] for x in position_embeddings)
        out = step.attend(module, query, key, value, self._options._replace(rope=(cos, sin)))
        return module.o_proj(out.flatten(1))[None], None


class _Trial:
    """In place of a module's forward during the pass: the module does what it always did, then its successor the
    same."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._usual: Forward = module.forward
        self._proven: FusedAttention | None = None
        module.forward = self

    def __call__(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        expected = self._usual(hidden_states, **others)
        try:
            self._proven = self._try(expected[0], hidden_states, others)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            self._proven = None
        return expected

    def ends(self) -> bool:
        del self._module.forward
        if self._proven is None:
            return False
        self._proven.give_weights()
        self._module.forward = self._proven
        return True

    def _try(self, expected: Tensor, hidden_states: Tensor, others: dict[str, Any]) -> FusedAttention | None:
        step: Any = step_of(self._module, others.get("baton_batch"))
        theirs = step.heads
        new = FusedAttention(self._module, step.options._replace(others={}))
        out, _ = new(hidden_states, **others)
        pairs = zip((out, *step.heads), (expected, *theirs), strict=True)
        return new if all(_agree(ours, wanted) for ours, wanted in pairs) else None


def _agree(ours: Tensor, wanted: Tensor) -> bool:
    return ours.shape == wanted.shape and close(ours, wanted)


def _run_sample(model: nn.Module) -> None:
    device = next(model.parameters()).device
    positions = torch.tensor([_POSITIONS], device=device)
    ids = torch.arange(len(_POSITIONS), device=device)[None] % 2
    model(input_ids=ids, position_ids=positions, use_cache=False, baton_batch=Witness())
