"""The last layer leaves out what nobody asks for; logits of what somebody asks for, and all KV, are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import KINDS, make_model

from baton.config import EngineConfig, ModelConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.model_runner import TorchModelRunner, load_runner
from baton.model import loader
from baton.model.attention import Echo
from baton.model.trim import TrimmedModel, trimmed
from baton.request import BlockId, RequestId, SamplingParams

GREEDY = SamplingParams(temperature=0)


def _runner(directory: Path, dtype: str) -> TorchModelRunner:
    engine = EngineConfig(num_blocks=32)
    return load_runner(ModelConfig(str(directory), dtype=dtype), engine, fill_nan=True).runner


def _row(tokens: range, blocks: range, *, start: int = 0, sample: bool = True) -> BatchRow:
    return BatchRow(RequestId("r"), start, tuple(tokens), tuple(map(BlockId, blocks)), sample, GREEDY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_logits_and_kv_of_whole_models(kind: str, dtype: str, tmp_path: Path) -> None:
    """Of a chunk that ends nowhere, one that ends, and sequences that decode, in one step."""
    runner = _runner(make_model(kind, tmp_path), dtype)
    model = runner._model
    assert isinstance(model, TrimmedModel)
    first = Batch((_row(range(7, 40), range(3)), _row(range(90, 120), range(3, 6), sample=False)))
    second = Batch((
        _row(range(1), range(3), start=33),
        _row(range(50, 61), range(3, 6), start=30),
        _row(range(20), range(6, 8), sample=False),
    ))  # fmt: skip
    results = []
    untouched = runner.storage.data.clone()
    for each in (model, model.model):
        runner._model = each
        logits = []
        for batch in (first, second):
            with torch.inference_mode():
                logits.append(runner._forward(runner._prepare(batch)).float())
        results.append((logits, runner.storage.data[:8].view(torch.int16).clone()))
        runner.storage.data.copy_(untouched)
    await runner.aclose()
    (ours, our_kv), (theirs, their_kv) = results
    assert [len(each) for each in ours] == [1, 2]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(our_kv, their_kv)


def _load(directory: Path) -> Any:
    config = loader.load_config(directory)
    return loader.load_model(directory, config, "float32", torch.device("cpu"))


def test_a_layer_that_only_looks_alike_stays(tmp_path: Path) -> None:
    """It holds the same parts, and does something else with them."""
    model = _load(make_model("gqa", tmp_path))
    layer = model.model.layers[-1]
    usual = layer.forward
    layer.forward = lambda hidden_states, **others: hidden_states + usual(hidden_states, **others)
    kept = layer.forward
    assert trimmed(model, 2) is model
    layer = model.model.layers[-1]
    assert layer.forward is kept


def test_the_layer_before_the_last_is_not_the_last(tmp_path: Path) -> None:
    model = _load(make_model("head-dim", tmp_path))
    assert trimmed(model, 4) is model
    assert isinstance(trimmed(model, 3), TrimmedModel)


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    model = _load(make_model("gqa", tmp_path))
    new = trimmed(model, 2)
    ids = torch.arange(4)[None]
    with pytest.raises(IndexError):
        new(input_ids=ids, position_ids=ids, logits_to_keep=torch.tensor([9]), baton_batch=Echo())
    assert (
        new(input_ids=ids, position_ids=ids, logits_to_keep=ids[0], baton_batch=Echo()).logits.shape[1] == 4
    )
