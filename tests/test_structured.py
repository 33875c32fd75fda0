"""Answers of a model with random weights match the grammar they were asked to match, and what is wrong with a grammar
is said before anything is generated."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from reference import make_model
from router_parts import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from baton.engine.lark_size import largest_terminal
from baton.engine.masks import MaskMaker
from baton.engine.sampling_state import SamplingState
from baton.engine.structured import MAX_COMPILED, MAX_SOURCE_CHARS, Grammars
from baton.errors import InternalError, InvalidRequest
from baton.llm import LLM, RequestOutput
from baton.request import FinishReason, Grammar, GrammarKind, Request, RequestId, SamplingParams

BYTE_VOCAB_SIZE = 260
EOS = 256
NUM_SCHEMAS = 1000


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """One token per byte, and an end of sequence."""
    directory = make_model("gqa", tmp_path_factory.mktemp("bytes"), vocab_size=BYTE_VOCAB_SIZE)
    byte_tokenizer().backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    with LLM(str(directory), num_blocks=1000, max_num_seqs=64) as llm:
        yield llm


def _json(schema: Any) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def _random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Tiny; only what ends by itself, so that a random model comes to an end, too."""
    leaves: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": rng.randrange(-9, 1), "maximum": rng.randrange(1, 500)},
        {"enum": [f"v{rng.randrange(5)}", rng.randrange(100), None]},
        {"const": {"k": rng.randrange(10)}},
        {"type": "string", "maxLength": rng.randrange(1, 6)},
        {"type": "string", "pattern": f"^[a-f]{{1,{rng.randrange(2, 5)}}}$"},
    ]
    if depth == 2 or rng.random() < 0.3:
        return rng.choice(leaves)
    kind = rng.randrange(3)
    if kind == 0:
        size = rng.randrange(3)
        items = _random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": size, "maxItems": size + rng.randrange(2)}
    if kind == 1:
        return {"anyOf": [_random_schema(rng, depth + 1) for _ in range(2)]}
    names = [f"p{i}" for i in range(rng.randrange(4))]
    return {
        "type": "object",
        "properties": {name: _random_schema(rng, depth + 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def _generate(llm: LLM, grammars: list[Grammar], **sampling: Any) -> list[RequestOutput]:
    params = [
        SamplingParams(**{"max_tokens": 120, "seed": seed, "grammar": grammar, **sampling})
        for seed, grammar in enumerate(grammars)
    ]
    outputs = llm.generate([[1, 2, seed % 200] for seed in range(len(grammars))], params)
    llm.engine.check_integrity()
    assert all(output.error == "" for output in outputs)
    return outputs


def test_every_answer_to_a_random_schema_validates(llm: LLM) -> None:
    rng = random.Random(0)
    schemas = [_random_schema(rng) for _ in range(NUM_SCHEMAS)]
    outputs = _generate(llm, [_json(schema) for schema in schemas])
    finished = [(s, o) for s, o in zip(schemas, outputs, strict=True) if o.finish_reason is FinishReason.STOP]
    assert len(finished) > 0.8 * NUM_SCHEMAS, "the others ran out of tokens, most of them spaces"
    for schema, output in finished:
        jsonschema.validate(json.loads(output.text), schema)
    assert len({output.text for _, output in finished}) > 0.3 * NUM_SCHEMAS


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        (GrammarKind.REGEX, "[a-c]{2,5}-[0-9]+x", "[a-c]{2,5}-[0-9]+x"),
        (GrammarKind.REGEX, "(ab)?", "(ab)?"),
        (GrammarKind.CHOICE, '["yes","no","ja \\"ä\\""]', 'yes|no|ja "ä"'),
        (GrammarKind.LARK, 'start: "<" WORD ">"\nWORD: /[xyz]{3}/', "<[xyz]{3}>"),
        (
            GrammarKind.LARK,
            'start: U\nU: H{4} ("-" H~2){2} // "x"\nH: /[0-9a-f]/',
            "[0-9a-f]{4}(-[0-9a-f]{2}){2}",
        ),
        (GrammarKind.LARK, 'root ::= "(" [0-9] ")"', r"\(\d\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_kinds_of_grammar(
    llm: LLM, kind: GrammarKind, source: str, pattern: str, temperature: float
) -> None:
    outputs = _generate(llm, [Grammar(kind, source)] * 8, temperature=temperature)
    ended = [output for output in outputs if output.finish_reason is FinishReason.STOP]
    assert ended or temperature == 0, "a greedy model may say digits for ever"
    for output in ended:
        assert re.fullmatch(pattern, output.text), output.text


def test_the_answer_ends_with_the_grammar(llm: LLM) -> None:
    """Without an end-of-sequence token where nothing else may follow; a stop token as well ends it."""
    [output] = _generate(llm, [_json({"const": [1, 2]})], ignore_eos=True, max_tokens=1000)
    assert json.loads(output.text) == [1, 2] and output.finish_reason is FinishReason.STOP
    assert output.token_ids[-1] == ord("]")
    [output] = _generate(llm, [Grammar(GrammarKind.CHOICE, '["abc"]')])
    assert output.token_ids == [*b"abc"] and output.finish_reason is FinishReason.STOP
    [output] = _generate(llm, [Grammar(GrammarKind.CHOICE, '["abc"]')], stop_token_ids=(ord("b"),))
    assert output.token_ids == [*b"ab"] and output.finish_reason is FinishReason.STOP
    [output] = _generate(llm, [Grammar(GrammarKind.CHOICE, '["abc"]')], max_tokens=2)
    assert output.token_ids == [*b"ab"] and output.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar(GrammarKind.REGEX, "["), "cannot be compiled"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "cannot be"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[]"), "cannot be"),
        (_json({"type": "colour"}), "colour"),
        (_json({"not": {"type": "null"}}), "not"),
        (Grammar(GrammarKind.LARK, "start: nothing"), "nothing"),
        (Grammar(GrammarKind.LARK, "a" * (MAX_SOURCE_CHARS + 1)), "characters"),
        # Each of these would hold the engine up for minutes, or takes more memory or stack than there is.
        (Grammar(GrammarKind.REGEX, "a?" * 3000 + "a" * 3000), "has 9000 characters; at most 1024"),
        (_json({"items": {"pattern": "a?" * 900}}), "has 1800 characters; at most 1024"),
        (_json({"patternProperties": {"a?" * 900: {}}}), "has 1800 characters; at most 1024"),
        (Grammar(GrammarKind.LARK, "start: A\nA: /" + "a?" * 900 + "/"), "characters; at most 1024"),
        (
            Grammar(GrammarKind.LARK, f'start: A\nA: {"B? " * 3000}{"B " * 3000}\nB: "a"'),
            "terminal A stands for",
        ),
        (Grammar(GrammarKind.LARK, 'start: A\nA: B{0,1000} C~1000\nB: "a"\nC: "a"'), "terminal A stands for"),
        (
            Grammar(
                GrammarKind.LARK,
                "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(14)) + 'A14: "a"?',
            ),
            "terminal A0 stands for",
        ),
        (
            Grammar(
                GrammarKind.LARK,
                "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(3000)) + 'A3000: "a"',
            ),
            "terminal A0 stands for",
        ),
        (Grammar(GrammarKind.REGEX, "(" * 500 + "a" + ")" * 500), "cannot be compiled"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[" * 30_000 + "]" * 30_000), "recursion limit"),
        (_json({"allOf": [{"type": "string", "pattern": f"^.*{c}.*$"} for c in "abcdefghijkl"]}), "empty"),
        (_json({"type": "number", "minimum": -1e300, "maximum": 1.2345678901234e300}), "float range"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_grammar_is_refused_and_nothing_is_left(llm: LLM, grammar: Grammar, why: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(why)) as caught:
        llm.engine.add(Request(RequestId("bad"), (1,), SamplingParams(grammar=grammar)))
    assert caught.value.param == "grammar"
    assert llm.engine.num_sequences == 0
    llm.engine.check_integrity()


@pytest.mark.parametrize("name", ["min_tokens", "allowed_token_ids"])
def test_what_cannot_be_combined_is_refused(llm: LLM, name: str) -> None:
    params = {"min_tokens": 2} if name == "min_tokens" else {"allowed_token_ids": (5,)}
    with pytest.raises(InvalidRequest, match="structured") as caught:
        sampling = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a+"), **params)  # type: ignore[arg-type]
        llm.engine.add(Request(RequestId("bad"), (1,), sampling))
    assert caught.value.param == name


def test_a_tokenizer_of_words_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = byte_tokenizer()
    tokenizer.backend = words
    with pytest.raises(InvalidRequest, match="BPE or Unigram"):
        Grammars(lambda: tokenizer, 2).matcher(Grammar(GrammarKind.REGEX, "a"))


def test_matchers_of_one_grammar_do_not_share_their_place() -> None:
    grammars = Grammars(byte_tokenizer, BYTE_VOCAB_SIZE)
    first, second = (grammars.matcher(Grammar(GrammarKind.REGEX, "abc")) for _ in range(2))
    first.accept(ord("a"))
    assert _allowed(first.mask()) == {ord("b")}
    assert _allowed(second.mask()) == {ord("a")}
    with pytest.raises(InternalError, match="refused token 99"):
        second.accept(ord("c"))


async def test_a_grammar_is_compiled_beside_the_event_loop() -> None:
    """Reading the tokenizer and compiling happen in a thread of their own, once; what is wrong is said there."""
    threads = []

    def load() -> Tokenizer:
        threads.append(threading.current_thread())
        return byte_tokenizer()

    grammars = Grammars(load, BYTE_VOCAB_SIZE)
    grammar = Grammar(GrammarKind.REGEX, "ab+")
    await asyncio.gather(*(grammars.prepare(grammar) for _ in range(3)))
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    [compiled] = grammars._compiled.values()
    assert _allowed(grammars.matcher(grammar).mask()) == {ord("a")}
    assert list(grammars._compiled.values()) == [compiled]
    with pytest.raises(InvalidRequest, match="cannot be compiled"):
        await grammars.prepare(Grammar(GrammarKind.REGEX, "("))


def test_masks_are_made_while_the_model_runs() -> None:
    """Once for each token, in another thread, and there when the forward pass has ended."""
    started, may_end, threads = threading.Event(), threading.Event(), []

    class Slow:
        has_ended = False

        def accept(self, token_id: int) -> None:
            pass

        def mask(self) -> Any:
            threads.append(threading.current_thread())
            started.set()
            assert may_end.wait(30)
            return np.array([len(threads)], dtype=np.int32)

    request = Request(RequestId("r"), (1,), SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a")))
    state, maker = SamplingState(request, 32, Slow()), MaskMaker()
    for number in (1, 2):
        with maker.beside([state, None]):
            assert started.wait(30), "the forward pass would have to wait for the mask"
            may_end.set()
        assert [state.mask(), state.mask()] == [np.array([number])] * 2
        assert len(threads) == number and threads[-1] is not threading.current_thread()
        state.append(5)
    maker.close()


def test_only_the_last_grammars_are_kept() -> None:
    grammars = Grammars(byte_tokenizer, BYTE_VOCAB_SIZE)
    for number in range(MAX_COMPILED + 10):
        grammars.matcher(Grammar(GrammarKind.REGEX, f"a{{{number + 1}}}"))
    assert len(grammars._compiled) == MAX_COMPILED


def _allowed(mask: Any) -> set[int]:
    return {token for token in range(BYTE_VOCAB_SIZE) if mask[token // 32] >> token % 32 & 1}


@pytest.mark.parametrize(
    ("body", "size"),
    [('"ab"{,}', 2), ('"ab"{,3}', 6), ("/a+b/~2..4", 12), ('("ab" | B)~3', 15), ('"a" // B{9}', 1)],
)
def test_the_size_of_a_terminal(body: str, size: int) -> None:
    assert largest_terminal(f'start: A\nA: {body}\nB: "abc"') == ("A" if size > 3 else "B", max(size, 3))
