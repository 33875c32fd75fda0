"""What the modules of a model are called with, to try their successors on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from baton.model.attention import Echo

_SAMPLE = ([0, 1, 0, 1], [0, 1, 5, 11])  # tokens and their positions


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[nn.Module, Call]:
    """By module; none where the model cannot be run like that. Each hands an Echo down as `baton_batch`."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = Call(args, kwargs)

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if wanted(module)
    ]
    token_ids, positions = (torch.tensor([row]) for row in _SAMPLE)
    try:
        if hooks:
            model(input_ids=token_ids, position_ids=positions, use_cache=False, baton_batch=Echo())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def is_rotated(call: Call, dtype: torch.dtype) -> bool:
    """By two tensors [1, T, R] of that type."""
    angles = call.kwargs.get("position_embeddings")
    return (
        "baton_batch" in call.kwargs
        and isinstance(angles, tuple)
        and len(angles) == 2
        and all(isinstance(each, Tensor) and each.dim() == 3 and each.dtype == dtype for each in angles)
    )
