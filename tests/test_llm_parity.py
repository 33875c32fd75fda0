"""Greedy tokens equal those of transformers' own `generate`, and seeded ones never depend on the batch.

All in one process and one engine: the control in which no KV is transferred. What the pool holds before
anything is written is NaN, so a position that is read without having been written shows in every answer.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from reference import (
    KINDS,
    Reference,
    load_reference,
    make_model,
    random_prompts,
    reference_generate,
)

from baton.config import EngineConfig
from baton.errors import ConfigError, InvalidRequest
from baton.llm import LLM, RequestOutput
from baton.request import FinishReason, SamplingParams

BLOCK = EngineConfig().block_size
LENGTHS = [1, 2, 7, 100, 150, 200, 300, *(n * BLOCK + d for n in (1, 2, 3, 4, 8, 16) for d in (-1, 0, 1))]
NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)


class Case(NamedTuple):
    directory: Path
    references: list[Reference]  # those whose answer rounding cannot change

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [reference.prompt for reference in self.references]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = make_model(request.param, tmp_path_factory.mktemp(request.param))
    return _case(directory)


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _case(make_model("gqa", tmp_path_factory.mktemp("gqa"), seed=1))


def _case(directory: Path) -> Case:
    references = reference_generate(load_reference(directory), random_prompts(LENGTHS), NUM_TOKENS)
    clear = [reference for reference in references if reference.clear]
    assert len(clear) >= 0.9 * len(references), "the margin drops more prompts than rounding can explain"
    assert len({reference.token_ids for reference in clear}) > 0.9 * len(clear), "all answers are alike"
    return Case(directory, clear)


def _llm(case: Case, **settings: int | bool) -> LLM:
    return LLM(str(case.directory), **{"num_blocks": 600, "max_num_seqs": 16, **settings})


def _generate(llm: LLM, case: Case) -> list[RequestOutput]:
    """Also checks that the engine is left clean."""
    llm.runner.storage.data.view(torch.float32).fill_(torch.nan)
    outputs = llm.generate(case.prompts, GREEDY)
    _assert_clean(llm)
    return outputs


def _assert_clean(llm: LLM) -> None:
    llm.engine.check_integrity()
    assert llm.engine.num_used_blocks == 0


def _assert_equal(outputs: list[RequestOutput], case: Case) -> None:
    wrong = {
        len(reference.prompt): (tuple(output.token_ids), reference.token_ids)
        for output, reference in zip(outputs, case.references, strict=True)
        if tuple(output.token_ids) != reference.token_ids
    }
    assert not wrong
    assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 24},  # chunks that end anywhere in a block
        {"max_num_seqs": 1},
        {"block_size": 4, "num_blocks": 3000, "max_num_batched_tokens": 64},
    ],
    ids=["together", "chunked", "one-by-one", "small-blocks"],
)
def test_greedy_equals_generate(case: Case, settings: dict[str, int]) -> None:
    with _llm(case, **settings) as llm:
        _assert_equal(_generate(llm, case), case)


def test_a_prefix_hit_equals_generate(case: Case) -> None:
    with _llm(case) as llm:
        _generate(llm, case)
        outputs = llm.generate(case.prompts, GREEDY)
        _assert_equal(outputs, case)
        hits = [output.num_cached_tokens for output in outputs]
        assert hits == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in case.prompts]


def test_preemption_equals_generate(case: Case) -> None:
    with _llm(case, num_blocks=21, max_num_batched_tokens=100) as llm:
        _assert_equal(_generate(llm, case), case)
        assert llm.engine.pressure.num_preemptions > 0


def test_a_wrong_block_breaks_the_answer(case: Case) -> None:
    """The power of the tests above: each block of a prompt matters."""
    prompt = max(case.prompts, key=len)
    with _llm(case) as llm:
        [right] = llm.generate([prompt], GREEDY)
        hashes = list(llm.engine.cached_hashes())
        broken = 0
        for index in range(0, len(prompt) // BLOCK, 4):
            block_id = llm.engine._kv._pool.lookup(hashes[index])
            assert block_id is not None
            saved = llm.runner.storage.data[block_id].clone()
            llm.runner.storage.data[block_id] = llm.runner.storage.data[block_id + 1]
            broken += llm.generate([prompt], GREEDY)[0].token_ids != right.token_ids
            llm.runner.storage.data[block_id] = saved
        assert broken == len(range(0, len(prompt) // BLOCK, 4))
        assert llm.generate([prompt], GREEDY)[0].token_ids == right.token_ids


def test_seeded_tokens_depend_on_nothing_but_the_request(gqa: Case) -> None:
    params = [
        SamplingParams(
            max_tokens=20, temperature=0.8 + i % 3 / 4, top_k=i % 4 * 10, top_p=1 - i % 5 / 10, seed=i
        )
        for i in range(len(gqa.prompts))
    ]
    answers = []
    for settings in (
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 20},
        {"num_blocks": 21, "max_num_batched_tokens": 100},
        {"enable_prefix_caching": False},
    ):
        with _llm(gqa, **settings) as llm:
            answers.append([output.token_ids for output in llm.generate(gqa.prompts, params)])
            if "num_blocks" in settings:
                assert llm.engine.pressure.num_preemptions > 0
    assert all(answer == answers[0] for answer in answers[1:])
    assert answers[0] != [list(reference.token_ids) for reference in gqa.references]


def test_stop_tokens_and_eos(gqa: Case) -> None:
    reference = next(r for r in gqa.references if len(set(r.token_ids[:5])) == 5)
    with _llm(gqa) as llm:
        stop = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, stop_token_ids=(reference.token_ids[3],))
        [output] = llm.generate([reference.prompt], stop)
    assert tuple(output.token_ids) == reference.token_ids[:4]
    assert output.finish_reason is FinishReason.STOP


def test_more_prompts_than_may_wait(gqa: Case) -> None:
    with _llm(gqa, max_num_waiting=2, max_num_seqs=2) as llm:
        _assert_equal(_generate(llm, gqa), gqa)


def test_bad_arguments_are_named(gqa: Case) -> None:
    with pytest.raises(ConfigError, match="num_blokcs"):
        _llm(gqa, num_blokcs=3)
    with _llm(gqa) as llm, pytest.raises(InvalidRequest, match="2 prompts, 1 sampling"):
        llm.generate([[1], [2]], [GREEDY])
