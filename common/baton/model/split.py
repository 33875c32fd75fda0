"""A model in two: its layers, and the head that makes logits of what they give.

The logits of a whole chunk of a prompt can be larger than all else in a step: 2,048 tokens of a vocabulary of 152 Ki
are 600 MB in bfloat16. Whoever wants little of each row takes the states first, and then the logits of a few rows at a
time.

As in `trim`, nothing is known of any model. The head is the model's own code, run with a decoder in place of its own
that gives what it is told to; it has to give the same logits on a sample, or the model stays in one piece.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from baton.model.attention import Attend, Echo
from baton.model.packed import close

_log = logging.getLogger(__name__)

_SAMPLE = 5  # tokens


class Split(Protocol):
    model: Any

    def states(self, input_ids: Tensor, position_ids: Tensor, baton_batch: Attend) -> Tensor:
        """What is below the head, [T, ...], of input_ids [1, T]. The KV of all of them is written."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """[R, V] of R of the states."""
        ...


def split(model: nn.Module) -> Split:
    decoder = _decoder(model)
    if decoder is not None:
        parts = SplitModel(model, decoder)
        if _agrees(parts, model):
            return parts
    _log.info("the logits of scored prompts are made at once: %s is of another kind", type(model).__name__)
    return WholeModel(model)


class SplitModel:
    """Implements Split."""

    def __init__(self, model: Any, decoder: nn.Module) -> None:
        self.model = model
        self._decoder = decoder
        self._output: Callable[..., Any] | None = None  # the class of what the decoder returns

    def states(self, input_ids: Tensor, position_ids: Tensor, baton_batch: Attend) -> Tensor:
        forward = self._decoder.forward
        states: list[Tensor] = []

        def keep(*args: Any, **others: Any) -> Any:
            output = forward(*args, **others)
            self._output = type(output)
            states.append(output.last_hidden_state)
            output.last_hidden_state = states[0][:, :0]  # nothing is left to do for the head
            return output

        with self._instead(keep):
            _run(self.model, input_ids, position_ids, baton_batch)
        return states[0][0]

    def logits(self, states: Tensor) -> Tensor:
        assert self._output is not None, "states come first"
        output = self._output(last_hidden_state=states[None])
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        with self._instead(lambda *_, **__: output):
            return _run(self.model, ids, ids, None)

    @contextlib.contextmanager
    def _instead(self, forward: Callable[..., Any]) -> Iterator[None]:
        decoder: Any = self._decoder
        usual, decoder.forward = decoder.forward, forward
        try:
            yield
        finally:
            decoder.forward = usual


class WholeModel:
    """Implements Split: the states are the logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def states(self, input_ids: Tensor, position_ids: Tensor, baton_batch: Attend) -> Tensor:
        return _run(self.model, input_ids, position_ids, baton_batch)

    def logits(self, states: Tensor) -> Tensor:
        return states


def _run(model: Any, input_ids: Tensor, position_ids: Tensor, baton_batch: Attend | None) -> Tensor:
    """Logits of all, [T, V]."""
    logits: Tensor = model(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=0,
        baton_batch=baton_batch,
    ).logits[0]
    return logits


def _decoder(model: Any) -> nn.Module | None:
    """The smallest module that holds the embedding and all layers, and is not the model itself."""
    needed = {module for module in model.modules() if hasattr(module, "layer_idx")}
    needed.add(model.get_input_embeddings())
    holders = [
        module for module in model.modules() if module is not model and needed <= set(module.modules())
    ]
    return holders[-1] if holders else None


@torch.inference_mode()
def _agrees(parts: SplitModel, model: nn.Module) -> bool:
    """On tokens 0, 1, 0, 1, ...: some first, then the others."""
    positions = torch.arange(_SAMPLE, device=next(model.parameters()).device)[None]
    call = (positions % 2, positions, Echo())
    try:
        expected, states = _run(model, *call), parts.states(*call)
        logits = torch.cat([parts.logits(states[:2]), parts.logits(states[2:])])
        return len(states) == _SAMPLE and close(logits, expected)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
