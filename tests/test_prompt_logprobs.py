"""What the engine says of a prompt's own tokens equals a plain forward pass of transformers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_model import make_engine
from reference import VOCAB_SIZE, load_reference, make_model, random_prompts

from baton.engine.prompt_scores import MAX_VALUES
from baton.errors import RequestTooLarge
from baton.llm import LLM, RequestOutput
from baton.request import PromptLogprobs, Request, RequestId, SamplingParams

LENGTHS = [1, 2, 16, 17, 90, 200]
NUM_TOP = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("gqa", tmp_path_factory.mktemp("gqa"), seed=3)


@torch.inference_mode()
def _plain(directory: Path, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log probabilities [N, V] of every position."""
    model = load_reference(directory)
    return [model(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in prompts]


def assert_is(
    said: PromptLogprobs | None, log_probs: torch.Tensor, prompt: Sequence[int], num_top: int
) -> None:
    assert said is not None
    num_scored = len(prompt) - 1
    assert len(said.logprobs) == len(said.ranks) == num_scored
    own = log_probs[range(num_scored), list(prompt[1:])]
    assert list(said.logprobs) == pytest.approx(own.tolist(), rel=1e-3)
    top_ids = np.array(said.top_token_ids, dtype=int).reshape(num_scored, num_top)
    top_logprobs = np.array(said.top_logprobs).reshape(num_scored, num_top)
    for position in range(num_scored):
        assert top_logprobs[position] == pytest.approx(
            log_probs[position].topk(num_top).values.numpy(), rel=1e-3
        )
        assert top_logprobs[position] == pytest.approx(
            log_probs[position][list(top_ids[position])].numpy(), rel=1e-3
        )
        # Between the numbers of tokens that are more likely for certain and perhaps.
        near = 1e-3 * abs(float(own[position]))
        least = int((log_probs[position] > own[position] + near).sum()) + 1
        most = int((log_probs[position] >= own[position] - near).sum())
        assert least <= said.ranks[position] <= most


def _ask(llm: LLM, prompts: Sequence[Sequence[int]], **sampling: int) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=NUM_TOP, **sampling)
    outputs = llm.generate(list(prompts), params)
    llm.engine.check_integrity()
    assert llm.engine.num_used_blocks == 0
    return outputs


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 24}, {"num_blocks": 16}, {"bit_exact": True}], ids=str
)
def test_a_plain_forward_pass_says_the_same(directory: Path, settings: dict[str, int]) -> None:
    """Together, in chunks, and waiting for each other's blocks; twice, because the second time all is cached."""
    prompts = random_prompts(LENGTHS)
    expected = _plain(directory, prompts)
    with LLM(str(directory), **{"num_blocks": 600, "max_num_seqs": 16, **settings}) as llm:
        for _ in range(2):
            for output, log_probs in zip(_ask(llm, prompts), expected, strict=True):
                assert_is(output.prompt_logprobs, log_probs, output.prompt_token_ids, NUM_TOP)
                assert output.num_cached_tokens == 0
        assert llm.generate([prompts[-1]], SamplingParams(max_tokens=1))[0].num_cached_tokens > 0


def test_it_changes_neither_the_tokens_nor_those_of_others(directory: Path) -> None:
    prompts = random_prompts(LENGTHS)
    plain = SamplingParams(max_tokens=8, seed=1, logprobs=1)
    asking = SamplingParams(max_tokens=8, seed=1, logprobs=1, prompt_logprobs=0)
    with LLM(str(directory), num_blocks=600, max_num_seqs=16, max_num_batched_tokens=24) as llm:
        alone = llm.generate(prompts, plain)
        mixed = llm.generate(prompts, [asking if i % 2 else plain for i in range(len(prompts))])
    assert [each.token_ids for each in mixed] == [each.token_ids for each in alone]
    assert [each.prompt_logprobs is not None for each in mixed] == [bool(i % 2) for i in range(len(prompts))]
    for said, before in zip(mixed, alone, strict=True):
        assert [e.logprob for e in said.logprobs] == pytest.approx(
            [e.logprob for e in before.logprobs], rel=1e-3
        )


def test_every_token_of_the_vocabulary_may_be_the_most_likely_one(directory: Path) -> None:
    """The prompt is what the model itself says: all of rank 1."""
    with LLM(str(directory), num_blocks=600) as llm:
        [said] = llm.generate([(5, 6, 7)], SamplingParams(max_tokens=40, temperature=0, logprobs=0))
        [again] = _ask(llm, [(5, 6, 7, *said.token_ids)])
    assert again.prompt_logprobs is not None
    assert set(again.prompt_logprobs.ranks[2:]) == {1}
    expected = [each.logprob for each in said.logprobs]
    assert list(again.prompt_logprobs.logprobs[2:]) == pytest.approx(expected, rel=1e-3)
    assert max(again.prompt_logprobs.top_token_ids) < VOCAB_SIZE


@pytest.mark.parametrize("first_token", [None, 7])
def test_a_prompt_whose_kv_did_not_arrive_is_scored_where_it_is_computed_in_its_place(
    directory: Path, first_token: int | None
) -> None:
    """Unless the first token was told already: its prompt's log probabilities were told with it."""
    [prompt] = random_prompts([90])
    [log_probs] = _plain(directory, [prompt])
    request = Request(RequestId("r"), prompt, SamplingParams(max_tokens=2, prompt_logprobs=NUM_TOP))
    with LLM(str(directory), num_blocks=64, max_num_batched_tokens=64) as llm:
        _ask(llm, [prompt])  # all of it is cached now

        async def recompute() -> list[PromptLogprobs]:
            llm.engine.reserve(request)
            llm.engine.admit()
            llm.engine.recompute(request.request_id, first_token)
            said = []
            while llm.engine.num_sequences:
                said += [
                    row.prompt_logprobs for row in (await llm.engine.step()).outputs if row.prompt_logprobs
                ]
            return said

        said = llm._loop.run(recompute())
        llm.engine.check_integrity()
    assert len(said) == (first_token is None)
    for each in said:
        assert_is(each, log_probs, prompt, NUM_TOP)


def test_siblings_of_a_scored_prompt_are_the_answers_to_seeds_of_their_own(directory: Path) -> None:
    prompts = random_prompts(LENGTHS)
    asked = SamplingParams(max_tokens=8, seed=5, n=3, prompt_logprobs=1, logprobs=0)
    with LLM(str(directory), num_blocks=600, max_num_seqs=8) as llm:
        families = llm.generate(prompts, asked)
        llm.engine.check_integrity()
        assert llm.engine.num_used_blocks == 0
        for sample in (1, 2):
            alone = llm.generate(prompts, SamplingParams(max_tokens=8, seed=5 + sample))
            siblings = [family.siblings[sample - 1] for family in families]
            assert [each.token_ids for each in siblings] == [each.token_ids for each in alone]
            assert {len(each.logprobs) for each in siblings} == {8}
    assert all(family.prompt_logprobs is not None for family in families)
    assert not any(sibling.prompt_logprobs for family in families for sibling in family.siblings)


@pytest.mark.parametrize("num_top", [0, 20])
def test_more_than_anybody_reads_is_refused_before_anything_is_computed(num_top: int) -> None:
    engine, _ = make_engine(max_model_len=MAX_VALUES + 2, num_blocks=MAX_VALUES)
    num_tokens = MAX_VALUES // (num_top + 1) + 1
    sampling = SamplingParams(prompt_logprobs=num_top)
    with pytest.raises(RequestTooLarge, match=f"at most {MAX_VALUES}") as error:
        engine.add(Request(RequestId("r"), (1,) * num_tokens, sampling))
    assert error.value.param == "prompt_logprobs"
    assert engine.num_sequences == 0
    engine.add(Request(RequestId("r"), (1,) * (num_tokens - 1), sampling))
