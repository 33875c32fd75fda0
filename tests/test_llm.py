"""`from baton import LLM`: what a batch job meets. That its tokens are right is in test_llm_parity."""

import io
import logging
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reference import make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import baton
from baton import LLM, RequestOutput, SamplingParams
from baton.clock import SystemClock, VirtualClock
from baton.demo_task import recall_prompt
from baton.progress import LINE_EVERY_S, Progress
from baton.request import FinishReason

VOCAB_SIZE = 211
GREEDY = SamplingParams(max_tokens=12, temperature=0)
ASK = [{"role": "user", "content": "ada oslo, bob lima. bob?"}]
# Answers that say what was asked, as long as the context allows.
ENDLESS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", num_blocks=512) as llm:
        yield llm
        _assert_clean(llm)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A random model in which each token is a word."""
    directory = make_model("gqa", tmp_path_factory.mktemp("words"))
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    with LLM(str(directory), num_blocks=256) as llm:
        yield llm
        _assert_clean(llm)


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(str(make_model("gqa", tmp_path_factory.mktemp("bare"))), num_blocks=256) as llm:
        yield llm
        _assert_clean(llm)


def _assert_clean(llm: LLM) -> None:
    llm.engine.check_integrity()
    assert llm.engine.num_sequences == 0


def _assert_failed(output: RequestOutput, why: str) -> None:
    assert output.finish_reason is FinishReason.ERROR
    assert why in output.error
    assert output.token_ids == [] and output.text == ""


# --- the package ---


def test_the_package_offers_it_and_needs_no_torch_until_then() -> None:
    code = "import sys, baton; from baton import SamplingParams; print('torch' in sys.modules, baton.LLM)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False <class 'baton.llm.LLM'>\n"
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = baton.Llm


def test_without_torch_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from baton import LLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ImportError: LLM needs torch: pip install 'baton-llm[worker]'"


# --- text ---


def test_text_and_token_ids_are_the_same_prompt(words: LLM) -> None:
    [text, ids] = words.generate(["w5 w6 w7", (5, 6, 7)], GREEDY)
    assert (text.text, text.token_ids, text.prompt_token_ids) == (ids.text, ids.token_ids, (5, 6, 7))
    assert text.text.split() == [f"w{token}" for token in text.token_ids]


@pytest.mark.parametrize("prompt", ["w5 w6 w7", [5, 6, 7], (5, 6, 7)])
def test_one_prompt_needs_no_list(words: LLM, prompt: str | list[int]) -> None:
    assert words.generate(prompt, GREEDY)[0].token_ids == words.generate([(5, 6, 7)], GREEDY)[0].token_ids
    assert len(words.generate(prompt)[0].token_ids) == SamplingParams().max_tokens
    assert words.generate([], GREEDY) == []


def test_chat_uses_the_models_template(demo: LLM) -> None:
    [output] = demo.chat(ASK, GREEDY)
    [raw] = demo.generate("<bos><|user|>ada oslo, bob lima. bob?<|assistant|>", GREEDY)
    # The tokenizer puts a <bos> of its own before a prompt; the template has written its own.
    assert raw.prompt_token_ids[1:] == output.prompt_token_ids
    assert output.text.strip() == "bob lima"
    assert output.finish_reason is FinishReason.STOP


def test_many_conversations_are_answered_in_their_order(demo: LLM) -> None:
    rng = random.Random(1)
    tasks = [recall_prompt(rng, 8) for _ in range(20)]
    outputs = demo.chat([[{"role": "user", "content": prompt}] for prompt, _ in tasks], GREEDY)
    assert [output.text.strip() for output in outputs] == [expected for _, expected in tasks]


def test_a_stop_string_ends_the_text_before_it(words: LLM) -> None:
    [free] = words.generate("w5 w6 w7", ENDLESS)
    # Across the border between two tokens, and not at its first character.
    target = free.text.index(" ", len(free.text) // 2)
    stop = free.text[target - 2 : target + 2]
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop=(stop,), logprobs=0)
    [output] = words.generate("w5 w6 w7", sampling)
    assert output.text == free.text[: free.text.index(stop)]
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids == free.token_ids[: len(output.token_ids)]
    assert len(output.logprobs) == len(output.token_ids) < len(free.token_ids)


def test_a_stop_string_ends_only_its_own_request(words: LLM) -> None:
    prompts = [f"w{i} w{i + 1}" for i in range(12)]
    free = words.generate(prompts, ENDLESS)
    stops = [output.text.split()[i] for i, output in enumerate(free)]
    params = [SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop=(f" {s}",)) for s in stops]
    for output, whole, stop in zip(words.generate(prompts, params), free, stops, strict=True):
        before, found, _ = whole.text.partition(f" {stop}")
        assert output.text == before
        assert output.finish_reason is (FinishReason.STOP if found else FinishReason.LENGTH)


def test_n_answers_to_one_prompt(words: LLM) -> None:
    hot = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    one, many = words.generate(["w5 w6"] * 2, [hot, replace(hot, n=4)])
    assert one.outputs == [one]
    assert [len(answer.token_ids) for answer in many.outputs] == [8] * 4
    assert many.token_ids == one.token_ids, "the first is what would have come alone"
    assert len({tuple(answer.token_ids) for answer in many.outputs}) == 4
    assert [answer.text.split() for answer in many.outputs] == [
        [f"w{token}" for token in answer.token_ids] for answer in many.outputs
    ]


def test_no_answer_at_all_cannot_be_asked_for(words: LLM) -> None:
    none, right = words.generate(["w5", "w6"], [replace(GREEDY, n=0), GREEDY])
    _assert_failed(none, "n must be 1 to")
    assert len(right.token_ids) == 12


def test_answers_that_may_not_wait_together_come_one_after_another(words: LLM) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=1.0, n=2, seed=1)
    prompts = [f"w{i}" for i in range(6)]
    with LLM(str(words._directory), num_blocks=64, max_num_waiting=2, max_num_seqs=2) as llm:
        few = [[answer.token_ids for answer in output.outputs] for output in llm.generate(prompts, sampling)]
    assert few == [[a.token_ids for a in output.outputs] for output in words.generate(prompts, sampling)]


# --- errors ---


def test_a_prompt_that_cannot_be_served_fails_alone(words: LLM, caplog: pytest.LogCaptureFixture) -> None:
    too_long, absurd = [1] * 5000, SamplingParams(max_tokens=12, temperature=0, allowed_token_ids=(10**6,))
    prompts = ["w5 w6 w7", too_long, [], [VOCAB_SIZE], [5, 6, 7], "w5 w6 w7"]
    with caplog.at_level(logging.WARNING, "baton.llm"):
        outputs = words.generate(prompts, [GREEDY] * 5 + [absurd])
    assert outputs[0].token_ids == outputs[4].token_ids and len(outputs[0].token_ids) == 12
    _assert_failed(outputs[1], "5000 tokens")
    _assert_failed(outputs[2], "empty")
    _assert_failed(outputs[3], f"token id {VOCAB_SIZE} is not in the vocabulary")
    _assert_failed(outputs[5], "allowed_token_ids")
    assert "4 of 6 prompts failed; the first is prompt 1" in caplog.text
    _assert_clean(words)


def test_a_conversation_that_the_template_refuses_fails_alone(demo: LLM) -> None:
    [wrong, right] = demo.chat([[{"role": "tool", "content": "x"}], ASK], GREEDY)
    _assert_failed(wrong, "unknown role")
    assert right.text.strip() == "bob lima"


def test_without_a_tokenizer_ids_work_and_text_is_refused(without_tokenizer: LLM) -> None:
    stop = SamplingParams(max_tokens=3, temperature=0, stop=("x",))
    [text, ids, stopped] = without_tokenizer.generate(["text", [1, 2], [1]], [GREEDY, GREEDY, stop])
    assert (len(ids.token_ids), ids.text) == (12, "")
    _assert_failed(text, "has no tokenizer.json: give token ids")
    _assert_failed(stopped, "use stop_token_ids")
    _assert_failed(without_tokenizer.chat(ASK)[0], "use generate with token ids")


# --- seeds ---


def test_a_job_repeats_and_its_requests_differ(words: LLM) -> None:
    hot = SamplingParams(max_tokens=12, temperature=1.0)
    directory = str(words._directory)
    runs = []
    for seed in (0, 0, 1):
        with LLM(directory, num_blocks=64, seed=seed) as llm:
            runs.append([output.token_ids for output in llm.generate(["w5 w6"] * 2, hot)])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


# --- progress ---


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal() -> None:
    to = _Terminal()
    with Progress("prompts", 3, SystemClock(), to=to) as progress:
        progress.tokens(5)
        for _ in range(3):
            progress.done()
    assert "prompts: 100%" in to.getvalue() and "3/3" in to.getvalue()


def test_lines_elsewhere_and_not_too_many() -> None:
    to, clock = io.StringIO(), VirtualClock()

    async def job() -> None:
        with Progress("prompts", 100, clock, to=to) as progress:
            for _ in range(100):
                await clock.sleep(LINE_EVERY_S / 40)
                progress.tokens(10)
                progress.done()

    clock.run(job())
    assert to.getvalue().splitlines() == ["39 of 100 prompts, 40 tok/s", "79 of 100 prompts, 40 tok/s"]


@pytest.mark.parametrize("to", [io.StringIO(), _Terminal()])
def test_it_can_be_switched_off(to: io.StringIO) -> None:
    clock = VirtualClock()

    async def job() -> None:
        with Progress("prompts", 1, clock, shown=False, to=to) as progress:
            await clock.sleep(10 * LINE_EVERY_S)
            progress.done()

    clock.run(job())
    assert to.getvalue() == ""


def test_generate_shows_a_bar(words: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    to = _Terminal()
    monkeypatch.setattr(sys, "stderr", to)
    words.generate(["w1"] * 2, GREEDY)
    assert "2/2" in to.getvalue()
    shown = to.getvalue()
    words.generate(["w1"] * 2, GREEDY, use_tqdm=False)
    assert to.getvalue() == shown


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    [example] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "LLM" in block]
    names: dict[str, Any] = {}
    exec(example, names)
    names["llm"].close()
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "bob lima",
        "['tea milk', 'sugar']",
    ]
